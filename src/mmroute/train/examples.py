"""Generated items as training batches: token ids, labels and atlas tiles, never pixels of whole pictures.

Legend: B batch, N positions, P vision tokens of one image (side * side).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmroute.tasks import _skins
from mmroute.tasks._texts import IMAGE, PAD, Words
from mmroute.tasks.base import Generated, Spec
from mmroute.train.naming import IGNORED, names_of_tiles

__all__ = ["IGNORED", "Batch", "Item", "collate", "item", "on_canvas", "seen_tiles"]


@dataclass(frozen=True)
class Item:
    """One question with the tiles of its picture."""

    words: Words
    tiles: Int[np.ndarray, "side side"]
    """Rows of the flattened atlas: code * variants + variant; the picture that the task draws has the same."""
    seen: Mapping[int, Sequence[str]]
    """By tile id, the words of what a board tile shows."""


@dataclass(frozen=True)
class Batch:
    """Items padded on the right; all have the same side and the image at the same column."""

    ids: Int[Tensor, "B N"]
    labels: Int[Tensor, "B N"]
    """What stands at this column where it is learned, else `IGNORED`."""
    tiles: Int[Tensor, "B P"]
    """Rows of the flattened atlas."""
    named: Int[Tensor, "B P 3"]
    """Words that name each vision token: its coordinate, then what it shows; `IGNORED` where there are fewer."""
    first: int
    """Column of the first vision token."""
    side: int

    def to(self, device: torch.device) -> "Batch":
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("ids", "labels", "tiles", "named")
        }
        return dataclasses.replace(self, **moved)


def on_canvas(spec: Spec, side: int, rng: np.random.Generator) -> Spec:
    """The item on a canvas of another side, at a random place; a smaller canvas is an easier picture to learn first."""
    row, column = (int(x) for x in rng.integers(side - spec.n + 1, size=2))
    return dataclasses.replace(spec, canvas=side, offset=(row, column))


def item(task: Generated, spec: Spec, mode: Literal["cot", "direct", "latent", "probe"]) -> Item:
    """The words and the picture of one spec, before any hop."""
    tiles = task.codes(spec).astype(np.int64) * _skins.VARIANTS + _skins.variants(spec.seed, spec.canvas)
    return Item(task.words(spec, mode), tiles, seen_tiles(task, spec))


def collate(items: Sequence[Item], index: Mapping[str, int], answer: bool = True) -> Batch:
    """Items as one batch.

    Args:
        items: with pictures of one side and prompts that place the image at one column.
        index: word to token id.
        answer: with the responses; False gives the bare prompts, which must then be of one length.
    """
    side = items[0].tiles.shape[0]
    first = items[0].words.prompt.index(IMAGE)
    rows = [[*it.words.prompt, *(it.words.response if answer else [])] for it in items]
    length = max(map(len, rows))
    assert answer or all(len(row) == length for row in rows)
    ids = np.full((len(items), length), index[PAD], dtype=np.int64)
    labels = np.full_like(ids, IGNORED)
    for b, (row, it) in enumerate(zip(rows, items, strict=True)):
        assert it.tiles.shape == (side, side)
        assert it.words.prompt.index(IMAGE) == first
        ids[b, : len(row)] = [index[word] for word in row]
        if answer:
            start = len(it.words.prompt)
            learned = np.flatnonzero(it.words.supervised) + start
            labels[b, learned] = ids[b, learned]
    named = names_of_tiles([it.seen for it in items], side, index)
    tiles = np.stack([it.tiles for it in items]).reshape(len(items), -1)
    return Batch(torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(tiles), named, first, side)


def seen_tiles(task: Generated, spec: Spec) -> dict[int, list[str]]:
    """By tile id, the words of what a board tile shows."""
    board = [(row, column) for row in range(spec.n) for column in range(spec.n)]
    return {task.tile(spec, cell): task._seen(spec, cell) for cell in board}
