"""Attention with gates on its keys, for the dense training executor: exact gradients at the cost of plain attention.

A key of gate z weighs z times as much in every later query's softmax, which is an additive log z. Handed over as a mask
that takes a gradient, that would cost the fused kernel. So the logarithms ride along as further columns of the keys,
which the queries read with ones; the kernel's own gradient of those columns is the gradient of log z. What a query sees
of itself is never gated: that part is put right after the kernel, in both directions, one number per query.

Legend: B batch, N positions of this call, G groups of queries that see gates of their own, H query heads, K key-value
heads, E head dim, W = E + G rounded up.

Source: DARE, an additive mask in training.
Deviates: see `train.py`, which says where the gates come from.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Gate", "attend", "serves"]

MOST_GROUPS = 16
"""Further columns that still pay; more hops than that take the mask."""
_forward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_backward = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


@dataclass
class Gate:
    """How much each query sees of the keys before it."""

    log: Float[Tensor, "B G N"]
    """Logarithm of each key's gate, for each group of queries."""
    group: Int[Tensor, "B N"] | None
    """Which group a query belongs to; None where there is one."""

    def mask(self, dtype: torch.dtype) -> Float[Tensor, "B 1 N N"]:
        """The same as an additive mask: causal, and 0 where a position sees itself."""
        N = self.log.shape[2]
        seen = self.log
        if self.group is not None:
            seen = seen.gather(1, self.group[..., None].expand(-1, -1, N))
        # One N x N operation that keeps a graph: below the diagonal the gate, on it 0, above it nothing.
        below = torch.ones(N, N, dtype=torch.bool, device=seen.device).tril(-1)
        fixed = torch.full((N, N), torch.finfo(torch.float32).min, device=seen.device).triu(1)
        return torch.where(below, seen, fixed)[:, None].to(dtype)

    def row(self, at: Int[Tensor, " B"]) -> Float[Tensor, "B N"]:
        """The mask's row of one query per batch row."""
        rows, column = torch.arange(len(at), device=at.device), torch.arange(self.log.shape[2], device=at.device)
        seen = self.log[rows, 0 if self.group is None else self.group[rows, at]]
        seen = seen.masked_fill(column > at[:, None], torch.finfo(torch.float32).min)
        return seen.masked_fill(column == at[:, None], 0.0)


def serves(query: Tensor, gate: Gate) -> bool:
    """Whether `attend` takes this call: the kernel is the CPU's, and in half precision a gradient would get lost."""
    if torch.is_autocast_enabled(query.device.type):
        return False
    fits = query.device.type == "cpu" and query.dtype in (torch.float32, torch.float64)
    return fits and None not in (_forward, _backward) and gate.log.shape[1] <= MOST_GROUPS


def attend(
    query: Float[Tensor, "B H N E"],
    key: Float[Tensor, "B K N E"],
    value: Float[Tensor, "B K N E"],
    gate: Gate,
    scaling: float | None,
) -> Float[Tensor, "B N H E"]:
    """Causal attention under the gates; equal to a call with `gate.mask`, and so are its gradients."""
    B, H, N, E = query.shape
    key, value = (x.repeat_interleave(H // x.shape[1], 1) for x in (key, value))
    group = torch.zeros(B, N, dtype=torch.long, device=query.device) if gate.group is None else gate.group
    scale = E**-0.5 if scaling is None else scaling
    return _Gated.apply(query, key, value, gate.log.to(query.dtype), group, scale).transpose(1, 2)


class _Gated(torch.autograd.Function):
    """Both directions of `attend`, on heads that are repeated already."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log: Tensor, group: Tensor, scale: float) -> Tensor:
        H, E, G = q.shape[1], q.shape[3], log.shape[1]
        W = -(-(E + G) // 8) * 8
        # A query reads the column of its own group.
        reads = torch.nn.functional.one_hot(group, G).to(q.dtype)[:, None].expand(-1, H, -1, -1)
        gates = (log / scale).transpose(1, 2)[:, None].expand(-1, H, -1, -1)
        wide_q, wide_k, wide_v = (_widened(x, more, W) for x, more in ((q, reads), (k, gates), (v, None)))
        out, total = _forward(wide_q, wide_k, wide_v, 0.0, True, scale=scale)  # type: ignore[misc]
        itself = (q * k).sum(-1) * scale
        gated = log.gather(1, group[:, None]).expand(-1, H, -1)  # of a position as its own query sees it
        # What the kernel left out of a query's own key is e^itself (1 - z): nothing at z = 1, too much of it above 1.
        left_out = -torch.expm1(gated)
        missing = itself + left_out.clamp(min=0).log()
        whole = torch.logaddexp(total, missing)
        above = left_out.clamp(max=0) * (itself - whole).clamp(max=0).exp()  # there a weight below 1, so no overflow
        whole = whole + torch.log1p(above)
        share = (missing - whole).exp() + above * (total - whole).exp()
        out = out * (total - whole).exp()[..., None] + share[..., None] * wide_v
        ctx.save_for_backward(wide_q, wide_k, wide_v, out, whole, share, (itself + gated - whole).exp(), group)
        ctx.sizes = E, G, scale
        return out[..., :E]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        wide_q, wide_k, wide_v, out, whole, share, counted, group = ctx.saved_tensors
        E, G, scale = ctx.sizes
        wide = _widened(grad, None, out.shape[-1])
        q, k, v = _backward(wide, wide_q, wide_k, wide_v, out, whole, 0.0, True, scale=scale)  # type: ignore[misc]
        # Softmax's gradient at a query's own key: its weight times how far its value stands out.
        stands_out = (grad * (wide_v - out)[..., :E]).sum(-1)
        own = (share * stands_out * scale)[..., None]
        log = k[..., E : E + G].sum(1).transpose(1, 2) / scale
        log = log.scatter_add(1, group[:, None], -(counted * stands_out).sum(1, keepdim=True))
        return (
            q[..., :E] + own * wide_k[..., :E],
            k[..., :E] + own * wide_q[..., :E],
            v[..., :E] + share[..., None] * grad,
            log,
            None,
            None,
        )


def _widened(x: Tensor, more: Tensor | None, width: int) -> Tensor:
    """`x` (B, H, N, E) with further columns and then zeros up to `width`."""
    parts = [x] if more is None else [x, more]
    rest = width - sum(part.shape[-1] for part in parts)
    return torch.cat([*parts, x.new_zeros(*x.shape[:-1], rest)], dim=-1)
