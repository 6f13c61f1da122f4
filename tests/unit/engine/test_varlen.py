"""When rows of unequal length run in one kernel call, and that the call computes what the rows do one by one."""

import logging
from types import SimpleNamespace
from typing import Any

import flash
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from mmroute.engine import attention, varlen
from mmroute.rows import Rows

H, K, E = 4, 2, 8
PACKED, CHUNK = Rows([2, 3], [2, 3], packed=True), Rows([2, 2], [5, 5], packed=False)


def _on_cuda(**changed: Any) -> Any:
    """What `serves` asks of a query on a CUDA device."""
    fields = {
        "is_cuda": True,
        "dtype": torch.bfloat16,
        "requires_grad": False,
        "shape": (1, H, 5, 64),
        "device": "cuda",
    }
    return SimpleNamespace(**(fields | changed))


def _serves(query: Any, rows: Rows, **options: Any) -> bool:
    return varlen.serves(query, SimpleNamespace(shape=(2, K, 5, 64), requires_grad=False), rows, options)  # type: ignore[arg-type]


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "_proven", lambda *_: True)


@pytest.mark.usefixtures("proven")
def test_it_serves_packed_rows_and_chunks_behind_a_cache_in_half_precision_on_cuda() -> None:
    assert _serves(_on_cuda(), PACKED)
    assert _serves(_on_cuda(), CHUNK)
    assert _serves(_on_cuda(dtype=torch.float16), PACKED)
    assert not _serves(_on_cuda(dtype=torch.float32), PACKED)
    assert not _serves(_on_cuda(is_cuda=False), PACKED)
    assert not _serves(_on_cuda(shape=(1, H, 5, 20)), PACKED)  # no kernel has such heads
    assert not _serves(_on_cuda(shape=(1, H, 5, 512)), PACKED)


@pytest.mark.usefixtures("proven")
def test_it_leaves_alone_what_one_call_without_a_mask_does_as_well() -> None:
    assert not _serves(_on_cuda(), Rows([5, 5], [5, 5], packed=False))
    assert not _serves(_on_cuda(shape=(2, H, 1, 64)), Rows([1, 1], [5, 9], packed=False))


@pytest.mark.usefixtures("proven")
def test_gradients_dropout_and_a_ban_on_flash_keep_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    learning = _on_cuda(requires_grad=True)
    assert not _serves(learning, PACKED)
    with torch.no_grad():
        assert _serves(learning, PACKED)
    assert _serves(_on_cuda(), PACKED, dropout=0.0)
    assert not _serves(_on_cuda(), PACKED, dropout=0.1)
    monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: False)
    assert not _serves(_on_cuda(), PACKED)


def _rows(q: list[int], k: list[int], packed: bool, cached: bool) -> tuple[Rows, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = Rows(q, k, packed)
    query = torch.randn(1 if packed else len(q), H, sum(q) if packed else q[0], E, generator=generator)
    shape = (len(q), K, max(k), E) if cached else (1, K, sum(k), E)
    return rows, query, torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize(
    ("q", "k", "packed", "cached"),
    [
        ([2, 5, 0], [2, 5, 0], True, False),
        ([2, 5, 1], [2, 5, 1], True, True),
        ([2, 0, 4], [9, 3, 4], True, True),
        ([3, 3], [7, 7], False, True),
        ([3], [8], False, True),
    ],
)
def test_one_call_computes_what_rows_compute_one_by_one(
    monkeypatch: pytest.MonkeyPatch, q: list[int], k: list[int], packed: bool, cached: bool
) -> None:
    rows, query, key, value = _rows(q, k, packed, cached)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = H // K, True
    scale = 0.3  # not the default, so that a kernel that ignores it is found out
    want, _ = attention._attend("sdpa", module, query, key, value, None, scaling=scale, rows=rows)
    monkeypatch.setattr(varlen, "serves", lambda *_: True)
    monkeypatch.setattr(varlen, "kernel", lambda: varlen.reference)
    out, _ = attention._attend("sdpa", module, query, key, value, None, scaling=scale, rows=rows)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)


def _of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
    return _answer(query, key, value, cu_seq_q, cu_seq_k, scale, is_causal)


def _of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    return _answer(query, key, value, cu_seq_q, cu_seq_k, scale, window_size == (-1, 0))


def _of_2_13(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    assert enable_gqa
    return _answer(query, key, value, cu_seq_q, cu_seq_k, scale, window_size == (-1, 0))


def _answer(query: Tensor, key: Tensor, value: Tensor, q: Tensor, k: Tensor, scale: Any, causal: bool) -> Tensor:
    spans = zip(q[:-1], q[1:], k[:-1], k[1:], strict=True)
    return torch.cat([flash.by_definition(query[a:b], key[c:d], value[c:d], scale, causal) for a, b, c, d in spans])


@pytest.mark.parametrize("release", [_of_2_10, _of_2_11, _of_2_13])
def test_each_release_of_torch_is_called_by_its_own_arguments(monkeypatch: pytest.MonkeyPatch, release: Any) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", release)
    run = varlen.kernel.__wrapped__()
    assert run is not None
    rows, query, key, value = _rows([2, 4], [5, 4], packed=True, cached=True)
    packed = varlen.pack(query, key, value, rows)
    torch.testing.assert_close(run(packed, 0.3), varlen.reference(packed, 0.3), rtol=0, atol=1e-6)


def test_a_release_whose_arguments_are_unknown_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_varlen, "varlen_attn", lambda query, key, value, lengths: query)
    assert varlen.kernel.__wrapped__() is None


def _unmasked(p: varlen.Packed, scaling: float | None) -> Tensor:
    return _answer(p.query, p.key, p.value, p.ends_q, p.ends_k, scaling, causal=False)


def _raises(p: varlen.Packed, scaling: float | None) -> Tensor:
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("kernel", "trusted"), [(varlen.reference, True), (_unmasked, False), (_raises, False), (None, False)]
)
def test_a_kernel_is_trusted_after_it_has_given_the_right_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernel: Any, trusted: bool
) -> None:
    monkeypatch.setattr(varlen, "kernel", lambda: kernel)
    with caplog.at_level(logging.INFO):
        assert varlen._proven.__wrapped__(torch.device("cpu"), torch.bfloat16, H, K, 64) is trusted
    assert ("one by one" in caplog.text) is not trusted
