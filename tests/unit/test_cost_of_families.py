"""Estimates from a routed model's own trace equal what torch counts and what the walked cache holds, in every family.

Image placeholders stand in the ids without pixels, so the text model alone is counted.
"""

import families
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmroute import backbones, hub
from mmroute.cost import estimate_flops, estimate_kv_bytes
from mmroute.engine.attach import attach

PADS = {"one": [0], "equal": [0, 0, 0], "ragged": [0, 3, 7]}
PRUNERS = {
    "random": {"vision_keep": 0.4, "text_keep": 0.7},
    "fastv": {"vision_keep": 0.4, "start_layer": 2},
    "pyramiddrop": {"stage_keep": 0.5},
    "knorm": {"vision_keep": 0.5},
}


@pytest.fixture(scope="module")
def models():
    return {name: families.make(name) for name in families.NAMES}


def run(model, family, pads, steps=4):
    """A prompt and a few single steps; the cache and the FLOPs torch counted."""
    batch = families.make_inputs(family.name, model, len(pads), pads)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = family.positions(model, ids, mask, batch.get("image_grid_thw"))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        last = positions.reshape(-1, len(pads), ids.shape[1]).amax((0, 2))[:, None]
        last = last.expand(3, -1, -1) if positions.ndim == 3 else last
        for step in range(steps):
            mask = torch.cat([mask, mask.new_ones(len(pads), 1)], dim=1)
            out = model(
                input_ids=ids[:, -1:],
                attention_mask=mask,
                position_ids=last + step + 1,
                past_key_values=out.past_key_values,
                use_cache=True,
                logits_to_keep=1,
            )
    return out.past_key_values, counter.get_total_flops()


@pytest.mark.parametrize("rows", PADS)
@pytest.mark.parametrize("name", families.EACH)
def test_flops_and_bytes_of_a_routed_run_equal_what_was_counted(models, name, rows):
    model, family = models[name], backbones.of(models[name])
    with attach(model, prune=hub.load("prune", "random", **PRUNERS["random"])):
        cache, counted = run(model, family, PADS[rows])
    assert estimate_flops(cache.trace, convention="rectangle").total == counted
    assert estimate_kv_bytes(cache.trace) == cache.live_bytes()
    assert estimate_flops(cache.trace).total < counted  # what is reported counts visible keys only


@pytest.mark.parametrize("rows", PADS)
@pytest.mark.parametrize("pruner", PRUNERS)
def test_every_pruner_is_charged_what_it_spends(models, pruner, rows):
    model, family = models["qwen2_5_vl"], backbones.of(models["qwen2_5_vl"])
    with attach(model, prune=hub.load("prune", pruner, **PRUNERS[pruner])):
        cache, counted = run(model, family, PADS[rows])
    assert estimate_kv_bytes(cache.trace) == cache.live_bytes()
    flops = estimate_flops(cache.trace, convention="rectangle")
    if pruner == "knorm":  # norms of keys are no matrix products: charged, but invisible to torch's counter
        counted += flops.extra
    if rows == "ragged":  # choosing runs on padded rectangles, its charge counts real positions
        assert counted * 0.99 <= flops.total <= counted * 1.01
    else:
        assert flops.total == counted
    assert (flops.extra > 0) == (pruner != "random")


@pytest.mark.parametrize("rows", PADS)
def test_second_passes_and_their_keys_are_charged(models, rows):
    model, family = models["qwen2_5_vl"], backbones.of(models["qwen2_5_vl"])
    with attach(model, deepen=hub.load("deepen", "uniform", deepen_tokens=6)):
        cache, counted = run(model, family, PADS[rows])
    assert any(layer.again for layer in cache.trace.calls[0].layers)
    assert estimate_flops(cache.trace, convention="rectangle").total == counted
    assert estimate_kv_bytes(cache.trace) == cache.live_bytes()
