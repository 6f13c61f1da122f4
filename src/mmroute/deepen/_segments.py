"""How many positions of each segment run again, and which: what the deepeners share.

Legend: B batch, N positions of this call.
"""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmroute import select
from mmroute.tokens import Tokens

__all__ = ["at_random", "best", "budgets"]


def budgets(
    sizes: list[list[int]], latents: list[list[int]], tokens: int, share: float | None, chunk: int
) -> list[list[int]]:
    """[row][segment]: positions that run again.

    Args:
        sizes: [row][segment]: positions that ran the layer.
        latents: [row][segment]: how many of them are latents.
        tokens: of a segment of given positions.
        share: in place of `tokens`, share of the segment.
        chunk: of a segment that ends in a latent, which is always among them.

    A segment of one given position would always choose itself, so it chooses nothing.
    """
    out = []
    for row, marks in zip(sizes, latents, strict=True):
        wanted = []
        for n, latent in zip(row, marks, strict=True):
            given = tokens if share is None else round(share * n)
            wanted.append(min(n, max(chunk, latent)) if latent and chunk else 0 if latent or n < 2 else min(n, given))
        out.append(wanted)
    return out


def best(
    score: Float[Tensor, "B N"], tokens: Tokens, ran: Bool[Tensor, "B N"], budget: list[list[int]]
) -> Bool[Tensor, "B N"]:
    """The best of each segment among those that ran; ties go to the lower column. No device read.

    Args:
        score: larger runs again.
        budget: [row][segment], at most as many as ran there; a segment is a hop of this call.
    """
    first = tokens.hop.min()
    mask = torch.zeros_like(ran)
    for h in range(len(budget[0])):
        take = [row[h] for row in budget]
        if not any(take):
            continue
        mask |= select.best(score, ran & (tokens.hop == first + h), torch.tensor(take, device=score.device))
    return mask


def at_random(tokens: Tokens, seed: int, layer: int) -> Float[Tensor, "B N"]:
    """Scores in [0, 1): a hash of (seed, layer, hop, place among what the hop was given).

    Written words that a training pass brings along do not count: on a cache they entered before.
    """
    return select.hashed(replace(tokens, valid=tokens.valid & ~tokens.generated), seed, layer)
