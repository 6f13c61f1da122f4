"""Which vision tokens matter, known from the simulator: the ground truth of pruners, routers and replay.

Legend: P vision tokens of one image.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from mmroute.errors import InputError
from mmroute.tasks._schema import Sample

__all__ = ["Relevance", "relevant_tokens"]


@dataclass(frozen=True)
class Relevance:
    """Which vision tokens of the prompt image matter, known from the simulator."""

    needed: Bool[np.ndarray, " P"]
    """Looked at by some hop or by the answer."""
    board: Bool[np.ndarray, " P"]
    """Part of the board at all."""
    hops: list[list[int]]
    """Token ids by hop: 0 is the look-up of the start, then the hops, last the answer."""


def relevant_tokens(sample: Sample, grid_thw: Sequence[int], merge: int) -> Relevance:
    """Which vision tokens of the prompt image the answer depends on.

    Args:
        sample: of a generated task, tiles skin.
        grid_thw: frames, rows and columns of patches as the processor gives them.
        merge: patches per token and side.

    Returns:
        Tokens of which the tiles in question cover a quarter or more.

    Raises:
        InputError: the sample does not know its tiles.
    """
    if not sample.meta.get("canvas"):
        raise InputError(f"{sample.id} has no tiles to map (skin {sample.meta.get('skin')!r}); use the tiles skin")
    rows, cols, _ = sample.meta["canvas"]
    height, width = int(grid_thw[1]) // merge, int(grid_thw[2]) // merge
    down, across = _overlap(rows, height), _overlap(cols, width)

    def tokens(tiles: Iterable[int]) -> Bool[np.ndarray, " P"]:
        mask = np.zeros((rows, cols))
        mask.reshape(-1)[list(tiles)] = 1
        return (down @ mask @ across.T >= 0.25 - 1e-9).reshape(-1)

    related = sample.meta["relevant"]
    masks = [tokens(t) for t in (related["start"], *(h.relevant for h in sample.hops), related["answer"])]
    return Relevance(
        needed=np.logical_or.reduce(masks),
        board=tokens(sample.meta["board"]),
        hops=[np.flatnonzero(m).tolist() for m in masks],
    )


def _overlap(tiles: int, tokens: int) -> np.ndarray:
    """(tokens, tiles): share of each token's side that each tile covers."""
    low, high = np.arange(tokens)[:, None] / tokens, (np.arange(tokens)[:, None] + 1) / tokens
    left, right = np.arange(tiles)[None] / tiles, (np.arange(tiles)[None] + 1) / tiles
    return np.clip(np.minimum(high, right) - np.maximum(low, left), 0, None) * tokens
