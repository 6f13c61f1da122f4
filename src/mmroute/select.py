"""Static-count selection: which candidates stay is decided on the device, how many is known in Python.

What is meant to be random is a hash: a row must choose alone what it chooses in a batch.

Legend: B batch, N positions of this call, W candidates of a group.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmroute.tokens import NUM_MODALITIES, Modality, Tokens

__all__ = ["Group", "best", "first_true", "group_positions", "hashed", "narrow", "top"]

_MASK = 0xFFFFFFFF
_ODD = 0x45D9F3B  # 27 bits: times a 32-bit number it stays inside int64
_FRESH = 0x9E3779B1

_Bits = TypeVar("_Bits", int, Tensor)


@dataclass
class Group:
    """The positions of one (hop, modality) in one call, and which of them may still compete."""

    hop: int
    modality: int
    size: list[int]
    """[row]: valid positions, protected ones included; the base of every keep rate."""
    protected: list[int]
    """[row]: of these, protected."""
    width: list[int]
    """[row]: free positions that may compete at this layer."""
    free: Tensor
    """(B, W) int64: their columns, ascending; beyond `width` meaningless."""
    generated: bool = False
    """Positions the model wrote, in a call that brings them whole (teacher forcing): all run, none competes."""


def first_true(mask: Tensor, count: int) -> Tensor:
    """Columns of the first `count` True entries of each row, ascending; no device sync.

    Args:
        mask: (..., N) bool with at least `count` True entries in some row.
    """
    return (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., :count]


def group_positions(tokens: Tokens, num_hops: int, first_hop: int = 0) -> tuple[list[Group], list[int]]:
    """All (hop, modality) groups of a call, with sizes per row from ONE device read.

    Generated positions beside given ones (teacher forcing, drafts) are groups of their own in which nothing competes:
    a keep rate counts what was given.

    Returns:
        The groups that are not empty, and the number of valid positions per row.
    """
    B = tokens.shape[0]
    codes = ((tokens.hop - first_hop).clamp(0, num_hops - 1) * NUM_MODALITIES + tokens.modality) * 3
    codes = codes + tokens.protected.long().masked_fill(tokens.generated, 2)
    num_codes = num_hops * NUM_MODALITIES * 3
    table = torch.zeros(B, num_codes, dtype=torch.long, device=codes.device)
    sizes = table.scatter_add_(1, codes, tokens.valid.long()).tolist()
    groups = []
    for code in range(num_codes // 3):
        free, protected, generated = ([row[3 * code + kind] for row in sizes] for kind in range(3))
        hop, modality = first_hop + code // NUM_MODALITIES, code % NUM_MODALITIES
        if any(free) or any(protected):
            size = [f + p for f, p in zip(free, protected, strict=True)]
            candidates = first_true(tokens.valid & (codes == 3 * code), max(free))
            groups.append(Group(hop, modality, size, protected, free, candidates))
        if any(generated):
            nobody = torch.zeros(B, 0, dtype=torch.long, device=codes.device)
            groups.append(Group(hop, modality, generated, generated, [0] * B, nobody, generated=True))
    return groups, [sum(row) for row in sizes]


def narrow(group: Group, scores: Tensor, take: list[int]) -> Group:
    """The group after only the best `take` of its candidates per row went on.

    Ties go to the lower column: candidates are ascending and the descending sort is stable.

    Args:
        scores: (B, N); larger stays.
        take: [row], at most `group.width`.
    """
    if take == group.width:
        return group
    columns = _taken(group, scores, take).sort(dim=1).values.clamp(max=scores.shape[1] - 1)
    return Group(group.hop, group.modality, group.size, group.protected, list(take), columns, group.generated)


def _taken(group: Group, scores: Tensor, take: list[int]) -> Tensor:
    """(B, max take) columns of the best candidates, best first; N behind what a row takes."""
    most = max(take)
    columns = group.free
    if take != group.width:
        ranked = scores.gather(1, columns)
        if min(group.width) < columns.shape[1]:
            width = torch.tensor(group.width, device=scores.device)
            beyond = torch.arange(columns.shape[1], device=scores.device) >= width[:, None]
            ranked = ranked.masked_fill(beyond, float("-inf"))
        columns = columns.gather(1, ranked.argsort(dim=1, descending=True, stable=True)[:, :most])
    if min(take) < most:
        spare = torch.arange(most, device=scores.device) >= torch.tensor(take, device=scores.device)[:, None]
        columns = columns.masked_fill(spare, scores.shape[1])
    return columns


def top(
    scores: Tensor, tokens: Tokens, groups: list[Group], take: dict[int, list[int]]
) -> tuple[Tensor, list[list[int]]]:
    """Protected positions and the best free ones of each group.

    Args:
        scores: (B, N) fp32; larger stays.
        take: group index to [row] counts, protected ones included.

    Returns:
        (B, N) bool, and [row][modality] counts.
    """
    B, N = tokens.shape
    # One spare column takes the writes of rows that keep fewer than the widest row.
    mask = torch.zeros(B, N + 1, dtype=torch.bool, device=scores.device)
    mask[:, :N] = (tokens.protected | tokens.generated) & tokens.valid
    ran = [[0] * len(Modality) for _ in range(B)]
    for i, group in enumerate(groups):
        free = [k - p for k, p in zip(take[i], group.protected, strict=True)]
        if any(free):
            mask.scatter_(1, _taken(group, scores, free), True)
        for b in range(B):
            ran[b][group.modality] += take[i][b]
    return mask[:, :N], ran


def best(score: Float[Tensor, "B N"], among: Bool[Tensor, "B N"], k: Int[Tensor, " B"]) -> Bool[Tensor, "B N"]:
    """The k best of each row; the lower column first where scores are equal."""
    order = score.masked_fill(~among, float("-inf")).argsort(dim=1, descending=True, stable=True)
    turn = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return among & (torch.empty_like(order).scatter_(1, order, turn) < k[:, None])


def hashed(tokens: Tokens, seed: int, layer: int) -> Float[Tensor, "B N"]:
    """Uniform numbers in [0, 1) that depend on (seed, layer, hop, rank in the hop) alone: not on batch or device."""
    key = _mix(_mix(_MASK & (seed * _FRESH + layer)) ^ (tokens.hop.long() * _ODD & _MASK))
    # 24 bits are exact in fp32.
    return (_mix(key ^ tokens.rank) >> 8).float() / (1 << 24)


def _mix(x: _Bits) -> _Bits:
    """32-bit integer avalanche; tensors are int64, so that every device computes the same numbers."""
    x = ((x >> 16) ^ x) * _ODD & _MASK
    x = ((x >> 16) ^ x) * _ODD & _MASK
    return (x >> 16) ^ x
