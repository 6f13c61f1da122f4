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
from mmroute.tasks._texts import IMAGE, PAD, Words, coordinate
from mmroute.tasks.base import Generated, Spec

__all__ = ["IGNORED", "Batch", "Item", "collate", "item", "on_canvas", "place_words"]

IGNORED = -100
"""Label of a position without loss."""


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
    board = [(row, column) for row in range(spec.n) for column in range(spec.n)]
    seen = {task.tile(spec, cell): task._seen(spec, cell) for cell in board}
    tiles = task.codes(spec).astype(np.int64) * _skins.VARIANTS + _skins.variants(spec.seed, spec.canvas)
    return Item(task.words(spec, mode), tiles, seen)


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
    named = np.full((len(items), side * side, 3), IGNORED, dtype=np.int64)
    named[:, :, 0] = place_words(index, side)
    for b, it in enumerate(items):
        for tile, words in it.seen.items():
            named[b, tile, 1 : 1 + len(words)] = [index[word] for word in words]
    tiles = np.stack([it.tiles for it in items]).reshape(len(items), -1)
    return Batch(
        torch.from_numpy(ids), torch.from_numpy(labels), torch.from_numpy(tiles), torch.from_numpy(named), first, side
    )


def place_words(index: Mapping[str, int], side: int) -> Int[Tensor, " P"]:
    """The coordinate word of each vision token."""
    return torch.tensor([index[coordinate(row, column)] for row in range(side) for column in range(side)])
