"""Rows on top of a flash backend, which takes no mask: stood in for by its definition, causal from the lower right."""

from types import SimpleNamespace

import flash
import pytest
import torch

from mmroute.engine import attention
from mmroute.rows import Rows

H, K, E = 4, 2, 8


class _Module(torch.nn.Module):
    """What flash asks of an attention module."""

    num_key_value_groups, is_causal, layer_idx = H // K, True, 0

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(_attn_implementation="mmroute_flash_attention_2")
        self.o_proj = torch.nn.Linear(1, 1)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("cached", [[4, 4], [5, 2], [0, 0]])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_on_flash_see_what_rows_on_sdpa_see(
    monkeypatch: pytest.MonkeyPatch, width: int, cached: list[int], packed: bool
) -> None:
    asked = flash.install(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    k = [n + width for n in cached]
    rows = Rows([width, width], k, packed)
    query = torch.randn(1 if packed else 2, H, width * (2 if packed else 1), E, generator=generator)
    key, value = torch.zeros(2, 2, K, max(k), E)
    for b, n in enumerate(k):
        key[b, :, :n] = torch.randn(K, n, E, generator=generator)
        value[b, :, :n] = torch.randn(K, n, E, generator=generator)
    want, _ = attention._attend("sdpa", _Module(), query, key, value, None, rows=rows)
    out, _ = attention._attend("flash_attention_2", _Module(), query, key, value, None, rows=rows)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    assert asked == ["flash_attention_2"]  # the backend's own name, not the one it is registered under
