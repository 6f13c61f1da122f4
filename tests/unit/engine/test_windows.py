"""A tower's windows in one call a length: the stock tower's values, fewer calls, and the stock tower back.

Source: none.
"""

import copy

import pytest
import torch

from mmroute.engine import windows
from mmroute.engine.attach import attach
from tests import families

QWEN = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
GRIDS = torch.tensor([[1, 6, 10], [1, 4, 4], [1, 4, 4], [1, 2, 6]])
"""Patches of pictures of several sizes: in Qwen2.5-VL they make windows of several lengths."""


def read(model, grids=GRIDS):
    tower = model.model.visual
    width = tower.config.in_channels * tower.config.temporal_patch_size * tower.config.patch_size**2
    pixels = torch.randn(int(grids.prod(-1).sum()), width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return tower(pixels, grid_thw=grids).pooler_output


def calls(monkeypatch, run):
    """How often torch's attention is called."""
    seen, stock = [], torch.nn.functional.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: seen.append(1) or stock(*a, **k)
        )
        run()
    return len(seen)


@pytest.mark.parametrize("name", QWEN)
def test_what_the_tower_says_stays_and_it_is_asked_less_often(name, monkeypatch):
    model = families.make(name, layers=1)
    stock, before = read(model), calls(monkeypatch, lambda: read(model))
    with attach(model) as routed:
        torch.testing.assert_close(read(model), stock, rtol=1e-5, atol=1e-6)
        assert calls(monkeypatch, lambda: read(model)) < before
        with routed.off():
            assert torch.equal(read(model), stock)
            assert calls(monkeypatch, lambda: read(model)) == before
    assert torch.equal(read(model), stock)
    assert model.model.visual.config._attn_implementation == "sdpa"
    assert calls(monkeypatch, lambda: read(model)) == before


def test_windows_of_one_length_are_one_call(monkeypatch):
    """Qwen2.5-VL's layers but one attend to windows; here all pictures are equally large."""
    model = families.make("qwen2_5_vl", layers=1)
    grids = torch.tensor([[1, 4, 4]] * 5)
    with attach(model):
        assert calls(monkeypatch, lambda: read(model, grids)) == len(model.model.visual.blocks)


def test_a_copy_is_switched_by_its_own_handle(monkeypatch):
    model = families.make("qwen2_5_vl", layers=1)
    before = calls(monkeypatch, lambda: read(model))
    with attach(model):
        twin = copy.deepcopy(model)
        with twin.__dict__["_mmroute"].off():
            assert calls(monkeypatch, lambda: read(twin)) == before
            assert calls(monkeypatch, lambda: read(model)) < before


def test_another_backend_is_left_alone(monkeypatch):
    model = families.make("qwen2_5_vl", attn="eager", layers=1)
    stock = read(model)
    monkeypatch.setattr(windows, "_attend", lambda *_, **__: pytest.fail("not asked for"))
    with attach(model):
        assert torch.equal(read(model), stock)
        assert model.model.visual.config._attn_implementation == "eager"


def test_gradients_reach_every_window():
    model = families.make("qwen2_5_vl", layers=1)
    tower = model.model.visual
    width = tower.config.in_channels * tower.config.temporal_patch_size * tower.config.patch_size**2
    pixels = torch.randn(int(GRIDS.prod(-1).sum()), width, requires_grad=True)

    def gradient():
        pixels.grad = None
        tower(pixels, grid_thw=GRIDS).pooler_output.square().sum().backward()
        return pixels.grad.clone()

    stock = gradient()
    with attach(model):
        torch.testing.assert_close(gradient(), stock, rtol=1e-4, atol=1e-5)
