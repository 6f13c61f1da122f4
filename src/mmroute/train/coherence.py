"""Spatially coherent self-distillation: what is replayed is pulled towards a closer look at where most of it lies.

The densest window of the image tokens that a step replays is cut out of the native picture, encoded once more at full
size, and its mean is what a small network should make of the mean replayed token. Training only.

Legend: B batch, V most image tokens of a row, K copies, D hidden.

Source: Vedas (arXiv 2604.10500), equations 7 and 8.
Deviates: the window is a share of the real grid; ties go to the larger attention, then to the first; the crop is cut
    from the native picture, not from the shrunken one; the mean of the copies is weighted, so that the loss reaches the
    language model; the squared error is a mean over D, and both sides are divided by the size of the closer look's
    tokens (`relative`): towers differ in it by orders, and on one whose tokens are large the loss drowned all others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from torch import Tensor, nn

from mmroute.engine.attach import Routed
from mmroute.errors import InputError
from mmroute.rollout import Grid, Rollout
from mmroute.think.base import Thought

__all__ = ["TokenSR", "Window", "closer_look", "coherence_loss", "densest", "pooled", "sides", "windows_of"]


@dataclass(frozen=True)
class Window:
    """A rectangle of one image's tokens."""

    image: int
    row: int
    column: int
    height: int
    width: int


class TokenSR(nn.Module):
    """What turns the mean replayed token into the mean token of the closer look; fp32, in and out."""

    def __init__(self, hidden: int, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
        return self.second(F.relu(self.first(x.float())))


def sides(grid: Grid, share: float, cells: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of a window: a share of the grid's, at least 2 where there are as many.

    Example:
        >>> sides((10, 10), 0.3), sides((1, 30), 0.3), sides((10, 4), 0.3, (4, 6))
        ((3, 3), (1, 9), (4, 4))
    """
    wanted = cells or (round(share * grid[0]), round(share * grid[1]))
    if min(grid) < 1:
        raise InputError(f"an image of {grid[0]} x {grid[1]} tokens has no window; use a larger image")
    least = (1, 1) if cells else (2, 2)
    return min(max(wanted[0], least[0]), grid[0]), min(max(wanted[1], least[1]), grid[1])


def densest(
    picked: np.ndarray, mass: np.ndarray, share: float, cells: tuple[int, int] | None = None
) -> tuple[int, int, int, float]:
    """The window of one image with the most picks.

    Args:
        picked: (rows, columns), 1 where a token is replayed.
        mass: (rows, columns): its attention.
        share: see `sides`.
        cells: likewise.

    Returns:
        Its first row and column, its picks and their attention.
    """
    shape = sides(picked.shape, share, cells)
    count = sliding_window_view(picked, shape).sum((2, 3))
    weight = sliding_window_view(np.where(picked > 0, mass, 0.0).astype(np.float64), shape).sum((2, 3))
    best = np.where(count == count.max(), weight, -1.0)
    row, column = np.unravel_index(int(best.argmax()), best.shape)  # the first of equals, row by row
    return int(row), int(column), int(count[row, column]), float(weight[row, column])


def windows_of(
    thought: Thought,
    share_of: Float[Tensor, "B K"],
    grids: Sequence[Sequence[Grid]],
    share: float = 0.3,
    cells: tuple[int, int] | None = None,
) -> list[Window | None]:
    """[row]: where most of what one step replays lies; None where nothing is replayed. One device read.

    Args:
        thought: the step.
        share_of: attention on each copy's source.
        grids: [row][image].
        share: side of the window as a share of the grid's.
        cells: rows and columns of the window in place of it.
    """
    sources = thought.source.tolist()
    masses = share_of.detach().float().tolist()
    alive = thought.valid[:, -1].tolist()
    out: list[Window | None] = []
    for source, mass, images, on in zip(sources, masses, grids, alive, strict=True):
        flat = np.zeros((2, sum(r * c for r, c in images)))
        for i, m in zip(source, mass, strict=True):
            if i >= 0 and on:
                flat[:, i] = 1, m
        best: tuple[int, float] | None = None
        window, at = None, 0
        for number, (rows, columns) in enumerate(images):
            here = flat[:, at : at + rows * columns].reshape(2, rows, columns)
            at += rows * columns
            row, column, count, weight = densest(here[0], here[1], share, cells)
            if count and (best is None or (count, weight) > best):
                best, window = (count, weight), Window(number, row, column, *sides((rows, columns), share, cells))
        out.append(window)
    return out


@torch.no_grad()
def closer_look(
    routed: Routed, images: Sequence[Image.Image], windows: Sequence[Window], grids: Sequence[Grid]
) -> Float[Tensor, "n D"]:
    """Mean token of each window's part of its native picture, enlarged to the size of the whole; one vision call.

    Args:
        routed: an attached model with its processor.
        images: the native picture of each window.
        windows: what to look at.
        grids: of each picture.
    """
    family, model = routed.family, routed.model
    crops = []
    for image, window, grid in zip(images, windows, grids, strict=True):
        box = family.grid_to_pixels(image.size, grid, (window.row, window.column, window.height, window.width))
        crops.append(image.crop(box).resize(image.size, Image.Resampling.BILINEAR))
    taken = routed.processor.image_processor(images=crops, return_tensors="pt")
    dtype = model.get_input_embeddings().weight.dtype
    batch = {k: v.to(model.device, dtype if v.is_floating_point() else None) for k, v in taken.items()}
    return torch.stack([tokens.float().mean(0) for tokens in family.image_features(model, batch)])


def pooled(thought: Thought) -> Float[Tensor, "B D"]:
    """Mean of the copies of one step, as they entered."""
    K = thought.embeds.shape[1] - 1
    here = thought.valid[:, :K, None].float()
    return (thought.embeds[:, :K].float() * here).sum(1) / here.sum(1).clamp(min=1)


def coherence_loss(
    routed: Routed,
    rollout: Rollout,
    shares: Sequence[Float[Tensor, "B K"]],
    head: TokenSR,
    images: Sequence[Sequence[Image.Image]],
    grids: Sequence[Sequence[Grid]],
    share: float = 0.3,
    cells: tuple[int, int] | None = None,
    relative: bool = True,
) -> Tensor:
    """Mean over steps and rows that replay something of the squared error; 0 where none does.

    Args:
        routed: the attached model; its vision tower gets no gradient.
        rollout: the steps that were taken.
        shares: by step: attention on each copy's source.
        head: trained with the model.
        images: [row][image], native.
        grids: [row][image].
        share: see `windows_of`.
        cells: likewise.
        relative: the error of tokens divided by the root mean square of the closer look; about 1 at the start.
    """
    looked, made = [], []
    for thought, attention in zip(rollout.thoughts, shares, strict=True):
        found = windows_of(thought, attention, grids, share, cells)
        rows = [b for b, window in enumerate(found) if window is not None]
        if rows:
            looked += [(b, found[b]) for b in rows]
            made.append(pooled(thought)[rows])
    if not made:
        return rollout.mind.hidden.new_zeros((), dtype=torch.float32)
    at = [(b, window) for b, window in looked if window is not None]
    target = closer_look(
        routed, [images[b][w.image] for b, w in at], [w for _, w in at], [grids[b][w.image] for b, w in at]
    )
    size = target.square().mean().sqrt().clamp(min=1e-6) if relative else target.new_ones(())
    return F.mse_loss(head(torch.cat(made) / size), target / size)
