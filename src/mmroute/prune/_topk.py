"""Choosing the best k with a gradient: a soft top-k whose mass is exactly k, and gates that are hard in value.

Legend: B rows, n candidates (or layers, for keep rates).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["clip_outliers", "logistic_noise", "soft_topk", "straight_through"]

_STEPS = 30
_REACH = 30.0
"""How far beyond the outermost logit the threshold is looked for, in temperatures."""


def soft_topk(
    logits: Float[Tensor, "B n"],
    k: Float[Tensor, "B 1"],
    temperature: float,
    among: Bool[Tensor, "B n"],
    weight: Float[Tensor, "B n"] | None = None,
    margin: float = 0.01,
) -> Float[Tensor, "B n"]:
    """How far each candidate is among the best k: sigmoid((a - t) / temperature), t such that the (weighted) sum is k.

    The gradient is exact in `logits` and in `k`: with w = m (1 - m) and W = sum w it is (w_i d_ij - w_i w_j / W) / tau
    and w_i / W.

    Args:
        logits: larger stays.
        k: how many, a real number; moved to `margin` inside [0, number of candidates].
        temperature: above 0; small is hard.
        among: the candidates; others get 0.
        weight: what each counts in the sum; 1 if not given.
        margin: keeps the threshold finite where nothing or everything is kept.
    """
    share = among.to(logits.dtype) if weight is None else weight * among
    total = share.sum(-1, keepdim=True)
    edge = torch.minimum(torch.full_like(total, margin), total / 2)
    k = torch.minimum(torch.maximum(k.to(logits.dtype), edge), total - edge)
    with torch.no_grad():
        a = logits.detach()
        low = a.masked_fill(~among, torch.inf).amin(-1, keepdim=True).nan_to_num(posinf=0.0) - _REACH * temperature
        high = a.masked_fill(~among, -torch.inf).amax(-1, keepdim=True).nan_to_num(neginf=0.0) + _REACH * temperature
        for _ in range(_STEPS):
            middle = (low + high) / 2
            over = (share * torch.sigmoid((a - middle) / temperature)).sum(-1, keepdim=True) > k
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        threshold = (low + high) / 2
        m = torch.sigmoid((a - threshold) / temperature)
        slope = (share * m * (1 - m)).sum(-1, keepdim=True).clamp_min(1e-12 if weight is not None else 1e-3)
    # One Newton step whose slope carries no gradient: this alone makes the derivatives those of the exact solution.
    surplus = (share * torch.sigmoid((logits - threshold) / temperature)).sum(-1, keepdim=True) - k
    threshold = threshold + temperature * surplus / slope
    return torch.sigmoid((logits - threshold) / temperature).masked_fill(~among, 0)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` in value, to the last bit, with the gradient of `soft`."""
    return hard.to(soft.dtype) + (soft - soft.detach())


def logistic_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """logit(u) for uniform u: what a Gumbel pair adds to a logit.

    It belongs on logits, not on scores in (0, 1): there its spread of 1.8 would drown every difference.
    """
    u = torch.rand(like.shape, generator=generator, device="cpu" if generator is None else generator.device)
    return torch.logit(u.clamp(1e-6, 1 - 1e-6)).to(like.device, like.dtype)


def clip_outliers(gate: Tensor, quantile: float) -> None:
    """Clips the gradient that will reach `gate`: at this quantile of the absolute values it has where the gate is open.

    Leaving out an attention sink changes everything, and the derivative of letting a closed one in grows like e^d with
    its lead of d over the keys that are open: 1e17 was seen. Open gates have the scale that a step can use.
    """
    if quantile >= 1 or not gate.requires_grad:
        return
    is_open = gate.detach() > 0.5

    def clip(gradient: Tensor) -> Tensor:
        size = gradient[is_open].abs()
        if size.numel() == 0:
            return gradient
        bound = size.kthvalue(max(1, int(quantile * size.numel()))).values
        return gradient.nan_to_num().clamp(-bound, bound)

    gate.register_hook(clip)
