"""Causal attention of a few hundred positions on a CPU, a band of queries at a time.

Torch's CPU kernel walks keys in blocks of 512 and cuts none of them where causality ends, so up to 512 positions cost
the whole square; a band of queries that is handed only the keys up to its own last one costs what it sees. Routing is
what makes such lengths common: a thousand positions are served well by the kernel itself, the 480 kept of them not.

Legend: B batch, Q positions, H query heads, K key-value heads, E head dim.

Source: none; the papers describe no executor.
Deviates: equal to the stock kernel up to rounding, not bit by bit (the order of its sums changes).
"""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["attend", "serves"]

_BAND = 96
"""Queries of a band: measured between 64 and 192; narrower ones lose in products what they save in keys."""
_SHORTEST, _LONGEST = 256, 767
"""Below, calls cost more than keys; from 768 on the kernel takes queries by 256 and bands of 96 would undo that."""


def serves(query: Tensor, fresh: bool, options: dict[str, Any]) -> bool:
    """Whether bands are worth it for (B, H, Q, E) queries whose keys are all new."""
    if not fresh or query.device.type != "cpu" or options.get("dropout"):
        return False
    return _SHORTEST <= query.shape[2] <= _LONGEST


def attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of (B, H, Q, E) queries to (B, K, Q, E) keys: (B, Q, H, E)."""
    length = query.shape[2]
    width = -(-length // round(length / _BAND))  # bands of one width, so that none is a sliver
    grouped = query.shape[1] != key.shape[1]
    bands = []
    for start in range(0, length, width):
        end = min(start + width, length)
        band = scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, :end],
            value[:, :, :end],
            attn_mask=_hidden(query.dtype, end - start, end) if start else None,
            is_causal=start == 0,
            scale=scaling,
            enable_gqa=grouped,
        )
        bands.append(band.transpose(1, 2))
    return torch.cat(bands, dim=1)


def _hidden(dtype: torch.dtype, width: int, end: int) -> Tensor:
    """(width, end): -inf where one of the last `width` of `end` positions would see a later one."""
    corner = _LONGEST + width
    return _corner(dtype)[:width, corner - end : corner]


@functools.cache
def _corner(dtype: torch.dtype) -> Tensor:
    """Zeros and behind them a triangle: every band's mask is a slice of it, so that none is made twice."""
    widest = 2 * _BAND
    with torch.inference_mode(False):
        triangle = torch.full((widest, widest), float("-inf"), dtype=dtype, device="cpu").triu_(1)
        return torch.cat([triangle.new_zeros(widest, _LONGEST), triangle], dim=1)
