"""What each position of one forward call is; knows no model.

Legend: B batch, N positions of this call.
"""

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

__all__ = ["MAX_HOPS", "NUM_MODALITIES", "Modality", "Tokens"]

MAX_HOPS = 32
"""Hops that are told apart in one call; later ones count as the last of them."""


class Modality(IntEnum):
    """What a position holds."""

    TEXT = 0
    VISION = 1
    LATENT = 2


NUM_MODALITIES = len(Modality)


@dataclass(frozen=True)
class Tokens:
    """The N new positions of this call."""

    modality: Int[Tensor, "B N"]
    """`Modality` values."""
    hop: Int[Tensor, "B N"]
    """Reasoning hop, from 0 (the prompt)."""
    valid: Bool[Tensor, "B N"]
    """False at padding."""
    protected: Bool[Tensor, "B N"]
    """Never pruned: the first positions of each hop, the last of each segment, delimiters."""
    generated: Bool[Tensor, "B N"]
    """Written by the model (or teacher-forced in its place) rather than given to it."""
    position: Int[Tensor, "B N"]
    """Logical column: index in the whole padded sequence of this session, cached part included."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.modality.shape[0], self.modality.shape[1]

    @cached_property
    def rank(self) -> Int[Tensor, "B N"]:
        """How many valid positions of the same hop stand before each position in this call.

        Counted from the row's own first valid position, so that padding never moves it, and from the hop's start, so
        that a hop that enters a cache alone counts as it does in one pass over all hops.
        """
        before = self.valid.long().cumsum(1) - self.valid.long()
        starts = torch.ones_like(self.valid)
        starts[:, 1:] = self.hop[:, 1:] != self.hop[:, :-1]
        return before - before.masked_fill(~starts, 0).cummax(1).values
