"""Rows on top of a flash backend, which takes no mask: stood in for by its definition, causal from the lower right."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mmroute.engine import attention
from mmroute.engine.rows import Rows

H, K, E = 4, 2, 8


def _flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> tuple:
    assert mask is None or query.shape[2] == 1, "flash reads a mask as left padding of queries and keys alike"
    Q, S = query.shape[2], key.shape[2]
    sees = torch.ones(Q, S, dtype=torch.bool).tril(S - Q)
    if mask is not None:
        sees = sees & mask.bool()[:, None, None, :]
    key, value = (x.repeat_interleave(H // K, 1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, sees).transpose(1, 2), None


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("cached", [[4, 4], [5, 2], [0, 0]])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_on_flash_see_what_rows_on_sdpa_see(
    monkeypatch: pytest.MonkeyPatch, width: int, cached: list[int], packed: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    k = [n + width for n in cached]
    rows = Rows([width, width], k, packed)
    query = torch.randn(1 if packed else 2, H, width * (2 if packed else 1), E, generator=generator)
    key, value = torch.zeros(2, 2, K, max(k), E)
    for b, n in enumerate(k):
        key[b, :, :n] = torch.randn(K, n, E, generator=generator)
        value[b, :, :n] = torch.randn(K, n, E, generator=generator)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = H // K, True
    want, _ = attention._attend("sdpa", module, query, key, value, None, rows=rows)
    monkeypatch.setattr(attention, "_function", lambda base, module: _flash)
    out, _ = attention._attend("flash_attention_2", module, query, key, value, None, rows=rows)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
