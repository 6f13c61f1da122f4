"""What the window search of the closer look picks: where most copies of a latent step lie, against what must be seen.

Legend: B batch, K copies.

Source: Vedas (arXiv 2604.10500), figure 6.
Deviates: windows are held against the cells that the simulator says some hop must see, and against every other place
    that a window of the size could have; the paper shows pictures.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmroute.bench.items import Plan
from mmroute.bench.lessons import Study, opened
from mmroute.bench.svg import Photo, sheet
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe
from mmroute.rollout import Rollout
from mmroute.tasks.base import Sample
from mmroute.train.coherence import Window, sides, windows_of
from mmroute.train.lessons import Lesson

__all__ = ["Crop", "Crops", "Step", "lines", "measure_crops", "picture"]

_SHOWN = 12
"""Steps of the first items that are drawn, at most."""


@dataclass(frozen=True)
class Crop:
    """The window of one latent step of one item."""

    item: str
    step: int
    """From 1."""
    image: int
    cells: tuple[int, int, int, int]
    """Row, column, height and width, in image tokens."""
    box: tuple[int, int, int, int]
    """Left, top, right and bottom in pixels of the native image."""
    picks: list[tuple[int, int]]
    """Row and column of the tokens of this image that the step copies."""
    attention: list[float]
    """On each of them, as a share of all attention on what is copied."""
    inside: float
    """Share of the copies that lie in the window."""
    hit: bool | None
    """Whether the window holds a cell that some hop must see; None without ground truth."""
    chance: float | None
    """Share of all windows of the size that do."""
    iou: float | None
    """Cells in the window that must be seen over cells in either."""


@dataclass(frozen=True)
class Step:
    """All windows of one step number."""

    n: int
    hit: float | None
    chance: float | None
    iou: float | None
    inside: float
    """Share of the copies that lie in their window."""


@dataclass(frozen=True)
class Crops:
    """All of it, of one recipe on one task."""

    task: str
    recipe: str
    n: int
    seed: int
    steps: dict[str, Step]
    crops: list[Crop]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def measure_crops(
    model: Any,
    recipe: Recipe,
    plan: Plan,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Crops, list[tuple[Crop, Image.Image]]]:
    """Takes the latent steps of a plan's items as training does and looks for the window of each.

    Args:
        model: a loaded stock model with its processor, or a name.
        recipe: copies image tokens (`ivtlr`, `vedas`); its `train.window_share` or `window_cells` is the window's size.
        plan: a generated world, items, seed and batch.
        progress: told what is done, items done and items in all.

    Returns:
        What was found, and some of it with the native images.

    Raises:
        ConfigError: the recipe copies no image tokens, or the task is no generated world.
    """
    think = recipe.build("think")
    if not think.needs_row or not think.config.replay_tokens:
        raise ConfigError(f"recipe {recipe.name} copies no image tokens; use ivtlr or vedas with replay_tokens above 0")
    crops: list[Crop] = []
    shown: list[tuple[Crop, Image.Image]] = []
    with opened(model, recipe, plan) as study:
        done = 0
        for samples, lesson in study.lessons():
            rollout = study.passes.prompt(lesson, study.routed.new_cache())
            every = [len(groups) for groups in lesson.groups]
            rollout.run(study.passes.counts(every, "all"))
            found = _crops(study, samples, lesson, rollout)
            crops += found
            pictures = {sample.id: sample.images[0] for sample in samples}
            shown += [(crop, pictures[crop.item]) for crop in found[: max(0, _SHOWN - len(shown))]]
            done += len(samples)
            if progress is not None:
                progress("crops", done, plan.n)
    return Crops(plan.task, recipe.name, plan.n, plan.seed, _by_step(crops), crops), shown


def _crops(study: Study, samples: Sequence[Sample], lesson: Lesson, rollout: Rollout) -> list[Crop]:
    """Row by row, step by step."""
    c, family = study.config, study.routed.family
    out: list[list[Crop]] = [[] for _ in samples]
    for t, (thought, share) in enumerate(zip(rollout.thoughts, rollout.shares, strict=True), start=1):
        windows = windows_of(thought, share, lesson.grids, c.window_share, c.window_cells)
        for b, window in enumerate(windows):
            if window is None:
                continue
            grid = lesson.grids[b][window.image]
            first = sum(r * k for r, k in lesson.grids[b][: window.image])
            copied = [
                (i - first, a) for i, a in zip(thought.source[b].tolist(), share[b].tolist(), strict=True) if i >= 0
            ]
            total = sum(a for _, a in copied) or 1.0
            here = [(divmod(i, grid[1]), a / total) for i, a in copied if 0 <= i < grid[0] * grid[1]]
            inside = sum(
                window.row <= r < window.row + window.height and window.column <= k < window.column + window.width
                for (r, k), _ in here
            )
            cells = (window.row, window.column, window.height, window.width)
            box = family.grid_to_pixels(samples[b].images[window.image].size, grid, cells)
            hit, chance, iou = _against(_needed(samples[b], grid), window, c.window_share, c.window_cells)
            out[b].append(
                Crop(
                    samples[b].id, t, window.image, cells, box,
                    [cell for cell, _ in here], [a for _, a in here], inside / len(copied), hit, chance, iou,
                )
            )  # fmt: skip
    return [crop for row in out for crop in row]


def _needed(sample: Sample, grid: tuple[int, int]) -> np.ndarray | None:
    """(rows, columns): what some hop must see; None where tokens are not tiles."""
    canvas = sample.meta.get("canvas")
    if not canvas or (canvas[0], canvas[1]) != tuple(grid):
        return None
    known = sample.meta["relevant"]
    flat = np.zeros(grid[0] * grid[1], dtype=bool)
    for tiles in (known["start"], *(hop.relevant for hop in sample.hops), known["answer"]):
        flat[list(tiles)] = True
    return flat.reshape(grid)


def _against(
    needed: np.ndarray | None, window: Window, share: float, cells: tuple[int, int] | None
) -> tuple[bool | None, float | None, float | None]:
    """Whether the window hits, how often any window would, and its overlap with what is needed."""
    if needed is None:
        return None, None, None
    height, width = sides(needed.shape, share, cells)  # type: ignore[arg-type]
    views = np.lib.stride_tricks.sliding_window_view(needed, (height, width))
    inside = needed[window.row : window.row + height, window.column : window.column + width]
    both = int(inside.sum())
    either = height * width + int(needed.sum()) - both
    return both > 0, float(views.any((2, 3)).mean()), both / either


def _by_step(crops: Sequence[Crop]) -> dict[str, Step]:
    rows: dict[int, list[Crop]] = defaultdict(list)
    for crop in crops:
        rows[crop.step].append(crop)

    def mean(values: Sequence[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return fmean(known) if known else None

    return {
        str(step): Step(
            len(own),
            mean([c.hit for c in own]),
            mean([c.chance for c in own]),
            mean([c.iou for c in own]),
            fmean(c.inside for c in own),
        )
        for step, own in sorted(rows.items())
    }


def lines(found: Crops) -> list[str]:
    """What a person wants to know of it."""
    out = [
        f"{found.task}, seed {found.seed}, {found.n} items, recipe {found.recipe}: windows where most copies lie",
        "step  windows  hold what is needed  by chance    IoU  copies inside",
    ]
    for step, row in found.steps.items():
        told = [f"{x:.3f}" if x is not None else "-" for x in (row.hit, row.chance, row.iou)]
        out.append(f"{step:>4} {row.n:8}  {told[0]:>19}  {told[1]:>9}  {told[2]:>5}  {row.inside:13.3f}")
    return out


def picture(shown: Sequence[tuple[Crop, Image.Image]], title: str) -> str:
    """The images with what is copied, by its attention, and the window; SVG."""
    panels = []
    for crop, image in shown:
        row, column, height, width = crop.cells
        left, top, right, bottom = crop.box
        wide, tall = (right - left) / width, (bottom - top) / height
        most = max(crop.attention, default=0.0) or 1.0
        cells = [
            (left + wide * (c - column), top + tall * (r - row), left + wide * (c - column + 1),
             top + tall * (r - row + 1), a / most)
            for (r, c), a in zip(crop.picks, crop.attention, strict=True)
        ]  # fmt: skip
        panels.append(Photo(f"{crop.item}, step {crop.step}", image, cells, [(*crop.box, "window")]))
    return sheet(title, panels, columns=4)
