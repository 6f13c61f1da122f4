"""The dense training executor: every position runs and gates decide what counts, with exact straight-through gradients.

Legend: B batch, N positions of this call.

Source: DARE, straight-through selection with an additive mask in training.
Deviates: the paper masks hidden states; here a key is gated by log(z + 1e-8), which is the derivative of the masked
    softmax, and the update by z. Scaling hidden states instead would be undone by the next norm.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["dense_bias"]

EPSILON = 1e-8
"""A true -inf gives pruned keys no gradient; errors of the gradient: 1e-8 4e-7, 1e-6 5e-6, 1e-4 5e-4."""


def dense_bias(z: Float[Tensor, "B N"], valid: Bool[Tensor, "B N"], dtype: torch.dtype) -> Float[Tensor, "B 1 N N"]:
    """Additive attention mask: causal, keys gated by z, padding seen by nobody but itself.

    A pruned position's own key stays open on its diagonal (its update is gated off), so no softmax row is empty.

    Args:
        z: 0 or 1 in value, with the gradient of the soft selection.
    """
    N = z.shape[1]
    gate = torch.log(z.float() + EPSILON)
    low = torch.finfo(torch.float32).min
    gate = gate.masked_fill(~valid, low)
    causal = torch.ones(N, N, dtype=torch.bool, device=z.device).tril()
    eye = torch.eye(N, dtype=torch.bool, device=z.device)
    bias = torch.where(causal, gate[:, None, :], low)
    return torch.where(eye, 0.0, bias)[:, None].to(dtype)
