"""Attention rows without attention maps: mapping what the attention function recorded back to positions.

Legend: B batch, N positions of this call, S key slots.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["by_column"]


def by_column(row: Float[Tensor, "B S"], columns: Int[Tensor, "B S"], start: int, num: int) -> Float[Tensor, "B num"]:
    """A slot-aligned attention row by logical column.

    Args:
        row: attention of one query over a row's slots.
        columns: logical column of each slot, -1 at free ones.
        start: first column wanted; slots outside [start, start + num) are left out.
        num: how many columns.

    Returns:
        fp32; 0 at columns that this layer does not hold.
    """
    at = columns.long() - start
    at = at.masked_fill((at < 0) | (at >= num), num)
    out = torch.zeros(row.shape[0], num + 1, dtype=torch.float32, device=row.device)
    return out.scatter_add_(1, at, row.float())[:, :num]
