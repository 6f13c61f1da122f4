"""The second loss of models that learn to look: each vision token names where it lies and what it shows.

Legend: B batch, P vision tokens of one image, K words of a token, D hidden, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmroute.tasks._texts import coordinate

__all__ = ["IGNORED", "names_of_tiles", "naming_loss", "place_words"]

IGNORED = -100
"""Label of a position without loss."""
_GAIN = 4.0
"""Raised logits leave most of a token's direction to other things."""
_WORDS = 3


def naming_loss(
    early: Float[Tensor, "B P D"], named: Int[Tensor, "B P K"], head: Float[Tensor, "V D"]
) -> Float[Tensor, ""]:
    """How badly vision tokens name themselves, in nats a word.

    Args:
        early: their states behind one of the first layers.
        named: their words; `IGNORED` where there are fewer.
        head: weight of the language-model head.
    """
    logits = F.linear(early, head.to(early.dtype)).float() * _GAIN
    said = logits.log_softmax(-1).gather(-1, named.clamp(min=0))
    return -said[named != IGNORED].mean()


def names_of_tiles(
    seen: Sequence[Mapping[int, Sequence[str]]], side: int, index: Mapping[str, int]
) -> Int[Tensor, "B P K"]:
    """Words that name each vision token: its coordinate, then what it shows; `IGNORED` where there are fewer.

    Args:
        seen: of each item, by tile id, the words of what a board tile shows.
        side: tiles of one side of the picture.
        index: word to token id.
    """
    named = torch.full((len(seen), side * side, _WORDS), IGNORED)
    named[:, :, 0] = place_words(index, side)
    for b, tiles in enumerate(seen):
        for tile, words in tiles.items():
            named[b, tile, 1 : 1 + len(words)] = torch.tensor([index[word] for word in words])
    return named


def place_words(index: Mapping[str, int], side: int) -> Int[Tensor, " P"]:
    """The coordinate word of each vision token."""
    return torch.tensor([index[coordinate(row, column)] for row in range(side) for column in range(side)])
