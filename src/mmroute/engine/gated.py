"""Attention with gates on its keys, for the dense training executor: the forward pass of physical removal, and a
gradient for what was removed.

A gate is 0 or 1 in value. A closed key is masked, so the output is that of attention without it, whatever its score.
Its gradient is the change that letting it in would make, w (v - out), where w = e^s / (sum over open keys + e^s) is the
weight it would then have. Both matter on trained models: an additive log(z + eps) lets a closed key leak once it leads
the open ones by more than -log(eps); leads of 60 were seen, and training then learns from what inference never sees.
And the derivative at z = 0, e^s / (sum over open keys), grows like e^lead: gradients of 1e17 were seen (docs/log.md).

Legend: B batch, N positions of this call, G groups of queries that see gates of their own, H query heads, K key-value
heads, R query heads of one key-value head, E head dim.

Source: DARE, an additive mask in training.
Deviates: the secant of opening a key in place of the derivative at 0; they agree where w is small.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot, scaled_dot_product_attention

__all__ = ["Gate", "attend"]


@dataclass
class Gate:
    """What each query sees of the keys before it; itself it sees always."""

    value: Float[Tensor, "B G N"]
    """0 or 1, for each group of queries, with a gradient to what decided."""
    seen: Bool[Tensor, "B N"]
    """Keys that are no padding."""
    group: Int[Tensor, "B N"] | None = None
    """Which group a query belongs to; None where there is one."""

    def open(self) -> Bool[Tensor, "B N N"]:
        """[query, key]: seen by the query; its own key is."""
        is_open = (self.value.detach() > 0.5) & self.seen[:, None]
        N = is_open.shape[2]
        if self.group is not None:
            is_open = is_open.gather(1, self.group[..., None].expand(-1, -1, N))
        before = torch.ones(N, N, dtype=torch.bool, device=is_open.device).tril(-1)
        return is_open & before | torch.eye(N, dtype=torch.bool, device=is_open.device)


def attend(
    query: Float[Tensor, "B H N E"],
    key: Float[Tensor, "B K N E"],
    value: Float[Tensor, "B K N E"],
    gate: Gate,
    scaling: float | None,
) -> Float[Tensor, "B N H E"]:
    """Causal attention to the open keys; see the module for its gradient."""
    group = torch.zeros_like(gate.seen, dtype=torch.long) if gate.group is None else gate.group
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Gated.apply(query, key, value, gate.value, gate.open(), gate.seen, group, scale).transpose(1, 2)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        value: Tensor,
        is_open: Tensor,
        seen: Tensor,
        group: Tensor,
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, is_open, seen, group)
        ctx.scale, ctx.shape, ctx.dtype = scale, value.shape, value.dtype
        return scaled_dot_product_attention(q, k, v, attn_mask=is_open[:, None], scale=scale, enable_gqa=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, is_open, seen, group = ctx.saved_tensors
        (B, H, N, E), K, wide = q.shape, k.shape[1], torch.promote_types(q.dtype, torch.float32)
        # Query heads of one key-value head lie side by side, as rows of one product.
        q, grad = (x.to(wide).reshape(B, K, H // K * N, E) for x in (q, grad))
        k, v = k.to(wide), v.to(wide)
        rows = (B, K, H // K, N, N)
        opened = is_open[:, None, None]
        score = (q @ k.transpose(-1, -2) * ctx.scale).view(rows)
        score -= score.masked_fill(~opened, -torch.inf).logsumexp(-1, keepdim=True)
        # An open key's share is e^score; a closed one's, if it were let in, e^score / (1 + e^score).
        weight = torch.where(opened, score.exp(), score.sigmoid())
        share = weight * opened
        change = (grad @ v.transpose(-1, -2)).view(rows)
        change -= (share * change).sum(-1, keepdim=True)  # how far each value stands out from the output
        weight *= change
        # A gate acts on later queries, and on those of its own group only.
        gates = weight.sum((1, 2)).tril_(-1) * seen[:, None]
        gates = one_hot(group, ctx.shape[1]).to(wide).transpose(1, 2) @ gates
        slope = (share * change).view(B, K, -1, N)
        share = share.view(B, K, -1, N)
        return (
            (slope @ k * ctx.scale).view(B, H, N, E).to(ctx.saved_tensors[0].dtype),
            (slope.transpose(-1, -2) @ q * ctx.scale).to(ctx.saved_tensors[1].dtype),
            (share.transpose(-1, -2) @ grad).to(ctx.saved_tensors[2].dtype),
            gates.to(ctx.dtype),
            None,
            None,
            None,
            None,
        )
