"""Static-count selection: which candidates stay is decided on the device, how many is known in Python.

Legend: B batch, N positions of this call, W candidates of a group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mmroute.tokens import NUM_MODALITIES, Modality, Tokens

__all__ = ["Group", "first_true", "group_positions", "hashed", "narrow", "top"]


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
    most = max(take)
    if take == group.width:
        return group
    ranked = scores.gather(1, group.free)
    if min(group.width) < group.free.shape[1]:
        width = torch.tensor(group.width, device=scores.device)
        beyond = torch.arange(group.free.shape[1], device=scores.device) >= width[:, None]
        ranked = ranked.masked_fill(beyond, float("-inf"))
    order = ranked.argsort(dim=1, descending=True, stable=True)[:, :most]
    if min(take) < most:  # rows with fewer: push what they do not take behind what they do, then sort by column
        spare = torch.arange(most, device=scores.device) >= torch.tensor(take, device=scores.device)[:, None]
        columns = group.free.gather(1, order).masked_fill(spare, scores.shape[1]).sort(dim=1).values
        columns = columns.clamp(max=scores.shape[1] - 1)
    else:
        columns = group.free.gather(1, order).sort(dim=1).values
    return Group(group.hop, group.modality, group.size, group.protected, list(take), columns, group.generated)


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
            chosen = narrow(group, scores, free)
            columns = chosen.free
            if min(free) < columns.shape[1]:
                spare = torch.arange(columns.shape[1], device=scores.device)
                columns = columns.masked_fill(spare >= torch.tensor(free, device=scores.device)[:, None], N)
            mask.scatter_(1, columns, True)
        for b in range(B):
            ran[b][group.modality] += take[i][b]
    return mask[:, :N], ran


def hashed(position: Tensor, seed: int, layer: int) -> Tensor:
    """Scores in [0, 1) that depend on (seed, layer, position) only; a row scores alone as it scores in a batch.

    Args:
        position: (B, N) integers.
    """
    mixed = position.long() * 2654435761 + (seed * 40503 + layer + 1) * 2246822519
    for multiplier in (2146121005, 2221713035):
        mixed = (mixed ^ ((mixed & 0xFFFFFFFF) >> 16)) * multiplier & 0xFFFFFFFF
    return (mixed ^ (mixed >> 15)).float() / 2**32
