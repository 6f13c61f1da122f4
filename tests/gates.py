"""A slow reference of gated attention, for gates of any value: attention whose weights the gates multiply.

A closed key enters with the weight that it would have if it were let in, e^s / (sum of the open ones + e^s).

Legend: B batch, H query heads, K key-value heads, N positions, E head dim.
"""

import torch
from torch.nn.functional import softplus


def softmax_times_gate(q, k, v, gate, scaling):
    """(B, H, N, E) from (B, H, N, E), (B, K, N, E) twice, and a gate (B, N, N) of each query on each key."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    score = q @ k.transpose(-1, -2) * scaling
    is_open = (gate.detach() > 0.5)[:, None]
    total = score.detach().masked_fill(~is_open, -torch.inf).logsumexp(-1, keepdim=True)
    closed = score.detach() - softplus(score.detach() - total)
    weight = (torch.where(is_open, score, closed) - total).exp() * gate[:, None]
    return weight / weight.sum(-1, keepdim=True) @ v


def of_queries(gate):
    """(B, N, N) of an engine's `Gate` with one group: each earlier key's gate, 1 on the diagonal."""
    N = gate.value.shape[2]
    return (gate.value * gate.seen[:, None]).expand(-1, N, -1).tril(-1) + torch.eye(N, dtype=gate.value.dtype)
