"""Attention by bands of queries computes what one causal call computes, and says for which calls it is there."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mmroute.engine import triangle

H, K, E = 4, 2, 16


def _made(length: int, dtype: torch.dtype = torch.float32, kv_heads: int = K) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(2, n, length, E, generator=generator).to(dtype) for n in (H, kv_heads, kv_heads)]


def _whole(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


# Each side of every step in the number of bands, and bands that do not divide the length.
@pytest.mark.parametrize("length", [256, 257, 335, 336, 337, 431, 432, 482, 600, 766, 767])
def test_bands_equal_one_causal_call(length: int) -> None:
    made = _made(length)
    assert triangle.serves(made[0], True, {})
    assert (triangle.attend(*made, None) - _whole(*made)).abs().max() < 2e-6
    assert (triangle.attend(*made, 0.3) - _whole(*made, 0.3)).abs().max() < 2e-6


def test_bands_take_half_precision_and_a_key_of_each_head() -> None:
    made = _made(300, torch.bfloat16)
    out = triangle.attend(*made, None)
    assert out.dtype == torch.bfloat16
    assert (out - _whole(*made)).abs().max() < 2e-2
    alone = _made(300, kv_heads=H)
    assert (triangle.attend(*alone, None) - _whole(*alone)).abs().max() < 2e-6


def test_gradients_equal_those_of_one_causal_call() -> None:
    made = [tensor.requires_grad_() for tensor in _made(300)]
    ours = torch.autograd.grad(triangle.attend(*made, None).square().sum(), made)
    theirs = torch.autograd.grad(_whole(*made).square().sum(), made)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("length", "fresh", "options", "served"),
    [
        (482, True, {}, True),
        (482, True, {"dropout": 0.0}, True),
        (482, True, {"dropout": 0.1}, False),
        (482, False, {}, False),  # keys are cached before them
        (255, True, {}, False),
        (768, True, {}, False),
    ],
)
def test_which_calls_are_served(length: int, fresh: bool, options: dict[str, Any], served: bool) -> None:
    assert triangle.serves(torch.empty(1, H, length, E), fresh, options) is served


def test_only_a_cpu_is_served() -> None:
    assert not triangle.serves(torch.empty(1, H, 482, E, device="meta"), True, {})
