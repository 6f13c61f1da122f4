"""What a task hands out: samples in the schema `mmhop/1`, scores, and the specs and states behind generated items."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from mmroute.errors import InputError
from mmroute.tasks._grid import Cell

__all__ = ["Card", "Choice", "Hop", "Origin", "Sample", "Score", "Spec", "State"]


@dataclass(frozen=True)
class Choice:
    """One possible answer."""

    label: str
    """What is answered: a letter, or the word itself (`yes`, `red`)."""
    text: str = ""
    """What a letter stands for; empty where the picture says it."""


@dataclass(frozen=True)
class Hop:
    """One written step towards the answer; `hops[i]` is hop i + 1."""

    text: str
    image: int = -1
    """Index into the sample's images of the picture after this hop; -1 is none."""
    boxes: list[list[float]] = field(default_factory=list)
    """xyxy as shares of the sides of image `box_image`."""
    box_image: int = -1
    state: str = ""
    """Where the simulator stands after the hop, as a coordinate word."""
    relevant: list[int] = field(default_factory=list)
    """Tile ids that must be seen to take this hop."""


@dataclass(frozen=True)
class Sample:
    """One question in the schema `mmhop/1`; `meta` is plain JSON."""

    id: str
    task: str
    split: str
    group: str
    """Ties the items of one quad or pair; empty where an item stands alone."""
    question: str
    images: list[Any]
    """Pillow images or paths, in order of first use."""
    prompt_images: list[int]
    hops: list[Hop]
    choices: list[Choice]
    answer: str
    answer_index: int
    answer_text: str
    difficulty: dict[str, Any]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """What one completion is worth."""

    correct: float | None
    """1 or 0; None where the sample has no gold answer."""
    prediction: str | None
    parsed: bool
    scorer: str


@dataclass(frozen=True)
class Card:
    """What a reader must know before quoting a figure on the task."""

    ids: tuple[str, ...]
    splits: dict[str, int]
    license: str
    protocol: Literal["generate", "likelihood", "teacher_forced", "rollout"]
    metric: str
    chance: float


@dataclass(frozen=True)
class Origin:
    """Which data a figure rests on."""

    id: str
    """Of the data set on the Hub, or the name of the file."""
    revision: str
    """The Hub's commit, or `sha256:` of the files that hold the questions (not of pictures apart); empty if unknown."""
    labels: str = ""
    """Which labels, where several are about."""


@dataclass(frozen=True)
class Spec:
    """One generated item without pixels; plain JSON both ways."""

    task: str
    version: int
    preset: str
    split: str
    index: int
    n: int
    canvas: int
    offset: Cell
    """Tile where the board's first cell lies."""
    seed: int
    """Draws background, tile variants and probe cells; the items of a quad that share a board share it."""
    world: dict[str, Any]
    """Board, start, actions and so on, as the task's file says."""
    answer: int
    """Index into the task's choices."""
    layout_hash: str
    group: str = ""
    fog: tuple[int, ...] = ()
    """Tile ids covered by fog; not empty only in unsolvable items."""

    def to_json(self) -> str:
        """Canonical text: the same spec gives the same bytes."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Spec":
        """The spec back from its parsed JSON.

        Raises:
            InputError: a field is missing or unknown.
        """
        try:
            return cls(**{**data, "offset": (data["offset"][0], data["offset"][1]), "fog": tuple(data["fog"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"not a spec of mmroute's generated tasks: {error}") from None


@dataclass(frozen=True)
class State:
    """What the picture shows after a step; two states that look alike are equal."""

    cell: Cell | None
    """Where the agent (the star, the marked object) is; None before anything is marked."""
    step: int = field(default=0, compare=False)
    event: str = field(default="", compare=False)
    """What the step met, as the word of the written chain: `ice`, `wall`, `right` ..."""
    shows: str = ""
    """What else the picture says, where there is more: `carrying`, `on` ..."""
