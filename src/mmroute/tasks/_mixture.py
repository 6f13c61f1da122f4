"""Held-out questions of several worlds and sizes in fixed shares: what queries are routed on.

Layouts are those of the splits val and test, which no backbone was trained on: val teaches and calibrates a rater, test
judges it.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mmroute import hub
from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.tasks._presets import PRESETS
from mmroute.tasks.base import Generated, Sample, Spec

__all__ = ["Drawn", "Part", "draw_mixture"]

_STRIDE = 100_000
"""Items between the first ones of two seeds."""


@options
class Part:
    """One kind of question."""

    task: str
    """World, or `world:preset`."""
    share: Annotated[float, Field(gt=0)]
    """Of the mixture; shares are divided by their sum."""
    name: str = ""
    """What tables call it; the task's name if not given."""
    sizes: tuple[int, int] | None = None
    """Least and largest side of the board; None is the preset's own."""
    fog: Literal["none", "decisive", "harmless"] = "none"
    """`decisive` hides what the answer hangs on, `harmless` all that it does not."""

    @property
    def label(self) -> str:
        return self.name or self.task


@dataclass(frozen=True)
class Drawn:
    """One question of a mixture."""

    sample: Sample
    task: Generated
    part: Part

    @property
    def group(self) -> str:
        """What must not be split: the quad, or the layout."""
        return self.sample.group or self.sample.meta["layout_hash"]


def draw_mixture(parts: Sequence[Part], n: int, split: Literal["val", "test"], seed: int = 0) -> list[Drawn]:
    """n questions, the parts in turn so that any beginning of the list has about their shares.

    Args:
        parts: kinds and their shares.
        n: how many.
        split: `val` or `test`.
        seed: other seeds give other questions.

    Raises:
        ConfigError: a part whose task, preset or sizes do not exist.
    """
    if not parts or n < 1 or seed < 0:
        raise ConfigError(f"a mixture needs parts, n >= 1 and seed >= 0, given {len(parts)}, {n}, {seed}")
    share = np.array([part.share for part in parts])
    share = share / share.sum()
    # The next one is the part that lags its share most: no draw, so a longer list begins with the shorter one.
    counts = np.zeros(len(parts), int)
    turn = []
    for i in range(n):
        turn.append(int(np.argmax(share * (i + 1) - counts)))
        counts[turn[-1]] += 1
    worlds = [_world(part) for part in parts]
    made: list[list[Drawn]] = [
        [Drawn(_sample(task, part, split, seed * _STRIDE + i), task, part) for i in range(count)]
        for part, task, count in zip(parts, worlds, counts, strict=True)
    ]
    streams = [iter(items) for items in made]
    return [next(streams[which]) for which in turn]


def _world(part: Part) -> Generated:
    name, _, preset = part.task.partition(":")
    # Parts of one world draw from seeds of their own: the same quad under fog and without would be in two strata.
    own = int.from_bytes(
        hashlib.sha256(f"{part.label} {part.task} {part.fog} {part.sizes}".encode()).digest()[:4], "big"
    )
    given: dict[str, Any] = {"seed": own} | ({"preset": preset} if preset else {})
    task = hub.load("tasks", name, **given)
    if part.sizes is not None:
        low, high = PRESETS[task.preset.name].sizes
        if not low <= part.sizes[0] <= part.sizes[1] <= high:
            raise ConfigError(f"mix: {part.label}: sizes lie in {low} .. {high} at {part.task}, given {part.sizes}")
        task.preset = dataclasses.replace(task.preset, sizes=part.sizes)
    return task


def _sample(task: Generated, part: Part, split: Literal["val", "test"], index: int) -> Sample:
    spec = task.spec(split, index)
    if part.fog == "decisive":
        spec = task._fogged(spec)
    elif part.fog == "harmless":
        spec = dataclasses.replace(spec, fog=tuple(sorted(_needless(task, spec))))
    sample = task.sample(spec)
    # Items of two parts may have one index: the id says which part an item is of.
    return dataclasses.replace(
        sample, id=f"{part.label}/{sample.id}", group=f"{part.label}/{sample.group}" if sample.group else ""
    )


def _needless(task: Generated, spec: Spec) -> set[int]:
    """Board tiles that no hop and not the answer looks at."""
    needed = {tile for hop in range(len(task.trace(spec)) + 1) for tile in task.relevant(spec, hop)}
    return set(task.board(spec)) - needed
