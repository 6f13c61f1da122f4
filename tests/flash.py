"""A flash kernel by its definition, put under Transformers' own flash attention: causal from the lower right, no mask.

Legend: B batch, T queries of all rows, S keys of all rows, H query heads, K key-value heads, E head dim.
"""

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils as flash_utils

__all__ = ["by_definition", "install"]


def by_definition(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
    """One row: (Q, H, E) queries and (S, K, E) keys -> (Q, H, E)."""
    (Q, H, _), (S, K, _) = query.shape, key.shape
    sees = torch.ones(Q, S, dtype=torch.bool).tril(S - Q) if causal else None
    q, k, v = (x.transpose(0, 1)[None] for x in (query, key, value))
    k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, sees, scale=scale)[0].transpose(0, 1)


def _kernel(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale: float | None = None, dropout_p: float = 0.0
) -> Tensor:
    assert dropout_p == 0.0
    rows = [by_definition(q[b], k[b], v[b], softmax_scale, causal) for b in range(len(q))]
    return torch.stack(rows)


def _lengths_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    assert dropout_p == 0.0
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    spans = list(zip(ends_q[:-1], ends_q[1:], ends_k[:-1], ends_k[1:], strict=True))
    assert (ends_q[-1], ends_k[-1]) == (len(q), len(k))
    assert max(b - a for a, b, _, _ in spans) == max_seqlen_q
    assert max(d - c for _, _, c, d in spans) == max_seqlen_k
    return torch.cat([by_definition(q[a:b], k[c:d], v[c:d], softmax_scale, causal) for a, b, c, d in spans])


def install(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Transformers loads these kernels wherever it would load flash's; the list fills with the names it asks for."""
    asked: list[str] = []

    def load(implementation: str, *_: object, **__: object) -> tuple:
        asked.append(implementation)
        return _kernel, _lengths_kernel, None, flash_utils._pad_input, flash_utils._unpad_input

    monkeypatch.setattr(flash_utils, "_lazy_imports", load)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    return asked
