"""Every file in prune/ on every family, attached: what is left out is masked out, the counts are the plan's, rows of a
padded batch are rows alone; and peers choose by what the stock model itself attends to and caches."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
from oracle import masked_forward
from torch import Tensor

import mmroute
from mmroute import backbones, hub
from mmroute.prune.base import Pruner
from mmroute.tokens import Modality

LAYERS, PADS, BEFORE, AFTER = 4, [0, 3, 6], 5, 9
TIGHT: dict[str, dict[str, Any]] = {
    "fastv": {"vision_keep": 0.3},
    "pyramiddrop": {"stage_keep": 0.6},
    "knorm": {"vision_keep": 0.3, "text_keep": 0.7},
    "keydiff": {"vision_keep": 0.3, "text_keep": 0.7},
    "random": {"vision_keep": 0.3, "text_keep": 0.7},
    "oracle": {"vision_keep": 0.3},
    "divprune": {"vision_keep": 0.3},
    "dart": {"vision_keep": 0.4},
    "reroute": {"vision_keep": 0.6, "method": "pyramiddrop"},
    "snapkv": {"vision_keep": 0.3, "text_keep": 0.7},
    "sparsevlm": {"keeps": (0.7, 0.5, 0.3), "after": (0.0, 0.25, 0.5)},
    "dare": {"vision_keep": 0.5, "text_keep": 0.8, "first_layer": 1, "cutoff_layer": 3},
    "mod": {"vision_keep": 0.5},
    "symmetric": {"keep": 0.8, "first_layer": 1},
    "streaming": {"vision_keep": 0.3, "text_keep": 0.7},
    "visionzip": {"vision_keep": 0.4},
    "schedule": {"vision": [1.0, 0.6, 0.3, 0.5], "text": [1.0, 0.8, 0.8, 1.0]},
}
"""A setting of each pruner that really prunes; a new file runs with its defaults."""
NO_TOWER = (("chameleon", "visionzip"), ("llava_next", "visionzip"))
"""What has no vision tower, or one that sees an image in tiles, is refused; tests/unit/prune/test_visionzip.py."""
EVERY = [
    pytest.param(family, name, marks=[pytest.mark.slow] * (family in families.TWINS))
    for family in families.NAMES
    for name in hub.names("prune")
    if (family, name) not in NO_TOWER
]
PAIRED = [
    pytest.param(*p.values, marks=[*p.marks, *[pytest.mark.slow] * (p.values[0] not in ("qwen2_5_vl", "chameleon"))])
    for p in EVERY
]
"""By default on two families that differ most: what a family brings to it is guarded by tests/equivalence."""


@functools.cache
def stock(family: str, attn: str = "sdpa") -> Any:
    return families.make(family, attn, layers=LAYERS)


def inputs(family: str, model: Any) -> dict[str, Tensor]:
    return families.make_inputs(family, model, batch=3, pads=PADS, images=2, before=BEFORE, after=AFTER)


def relevance(batch: dict[str, Tensor]) -> Tensor:
    """Levels that depend on a row's own columns alone."""
    rank = batch["attention_mask"].cumsum(1)
    return (rank % 3).float()


def forward(routed: Any, batch: dict[str, Tensor]) -> Any:
    extra = {"relevance": relevance(batch)} if "relevance" in routed.controller.pruner.needs else {}
    return routed.model(**batch, **extra, use_cache=True)


def kept(routed: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    masks = []
    for layer in routed.trace.calls[0].layers:
        mask = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
        for row, columns in enumerate(layer.kept):
            mask[row, columns] = True
        masks.append(mask)
    return masks


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_leaving_out_equals_masking_at_the_planned_counts(family: str, name: str) -> None:
    model = stock(family)
    batch = inputs(family, model)
    pruner = hub.load("prune", name, **TIGHT.get(name, {}))
    with mmroute.attach(model, prune=pruner, strip_padding=True) as routed:
        routed.full_trace = True
        out = forward(routed, batch)
        masks = kept(routed, batch)
        call = routed.trace.calls[0]
        chosen_at = routed.controller.aux
        written = [chosen_at[i].write if i in chosen_at else None for i in range(LAYERS)]
    real = batch["attention_mask"].bool()
    expected = masked_forward(model, backbones.of(model), batch, masks, write=written)
    torch.testing.assert_close(out.logits[real], expected[real], rtol=0, atol=1e-5)
    assert_planned(pruner, call, masks, out.past_key_values)


def assert_planned(pruner: Pruner, call: Any, masks: list[Tensor], cache: Any) -> None:
    """ceil(rate * count) of each modality ran, or stayed cached, where protection alone is not more."""
    for index, layer in enumerate(call.layers):
        acts = pruner.acts(index, LAYERS)
        for row, new in enumerate(call.new):
            planned = []
            for modality in Modality:
                rate = pruner.rate(index, LAYERS, 0, modality) if acts else None
                planned.append(new[modality] if rate is None else math.ceil(rate * new[modality] - 1e-6))
            if pruner.action == "kv_only":
                assert layer.ran[row] == new
                assert cache.lengths()[index][row] == layer.stored[row] == sum(planned)
            else:
                # Where modalities compete for the same places, only their sum is planned.
                assert sum(layer.ran[row]) == sum(planned) if pruner.syncs else layer.ran[row] == planned
                assert int(masks[index][row].sum()) == cache.lengths()[index][row] == sum(planned)


@pytest.mark.parametrize(("family", "name"), PAIRED)
def test_a_row_of_a_padded_batch_keeps_what_it_keeps_alone(family: str, name: str) -> None:
    model = stock(family)
    batch = inputs(family, model)
    with mmroute.attach(model, prune=hub.load("prune", name, **TIGHT.get(name, {})), strip_padding=True) as routed:
        routed.full_trace = True
        together = forward(routed, batch).logits
        columns = [layer.kept for layer in routed.trace.calls[0].layers]
        for row, pad in enumerate(PADS):
            alone = forward(routed, families.slice_batch(batch, row)).logits
            torch.testing.assert_close(together[row, pad:], alone[0], rtol=0, atol=1e-5)
            for layer, in_batch in zip(routed.trace.calls[0].layers, columns, strict=True):
                assert [c + pad for c in layer.kept[0]] == in_batch[row]


# `generate()` takes no relevance: who needs ground truth answers through `reason.py`, and is tested there.
@pytest.mark.parametrize(
    ("family", "name"),
    [p for p in PAIRED if p.values[1] != "oracle" and "oracle" not in TIGHT.get(p.values[1], {}).values()],
)
def test_generation_goes_on_from_a_pruned_prompt(family: str, name: str) -> None:
    model = stock(family)
    batch = inputs(family, model)
    with mmroute.attach(model, prune=hub.load("prune", name, **TIGHT.get(name, {})), strip_padding=True) as routed:
        written = routed.generate(**batch, max_new_tokens=4, do_sample=False)
        assert written.shape[1] == batch["input_ids"].shape[1] + 4
        for row in range(3):
            alone = routed.generate(**families.slice_batch(batch, row), max_new_tokens=4, do_sample=False)
            assert torch.equal(written[row, -4:], alone[0, -4:])


def best_vision(score: Tensor, batch: dict[str, Tensor], model: Any, row: int, share: float) -> list[int]:
    """Columns of the vision positions with the largest score, of all images of a row together."""
    table = set(backbones.of(model).vision_ids(model))
    vision = [c for c, i in enumerate(batch["input_ids"][row].tolist()) if i in table]
    ranked = sorted(vision, key=lambda c: (-float(score[c]), c))
    return sorted(ranked[: math.ceil(share * len(vision) - 1e-6)])


def chosen(layer: Any, batch: dict[str, Tensor], model: Any, row: int) -> list[int]:
    table = set(backbones.of(model).vision_ids(model))
    return [c for c in layer.kept[row] if int(batch["input_ids"][row, c]) in table]


@pytest.mark.parametrize("family", families.EACH)
def test_fastv_chooses_by_the_stock_models_attention_map_of_the_layer_before(family: str) -> None:
    model = stock(family, "eager")
    batch = inputs(family, model)
    maps = model(**batch, output_attentions=True).attentions
    with mmroute.attach(model, prune=hub.load("prune", "fastv", vision_keep=0.3, start_layer=2)) as routed:
        routed.full_trace = True
        routed.model(**batch)
        layer = routed.trace.calls[0].layers[2]
    for row in range(3):
        assert chosen(layer, batch, model, row) == best_vision(maps[1][row, :, -1].mean(0), batch, model, row, 0.3)


@pytest.mark.parametrize("family", families.EACH)
def test_pyramiddrop_chooses_by_the_stock_models_attention_map_of_the_stage(family: str) -> None:
    model = stock(family, "eager")
    batch = inputs(family, model)
    maps = model(**batch, output_attentions=True).attentions
    with mmroute.attach(model, prune=hub.load("prune", "pyramiddrop", stage_keep=0.4, stages=[0.5])) as routed:
        routed.full_trace = True
        routed.model(**batch)
        layer = routed.trace.calls[0].layers[2]
    for row in range(3):
        assert chosen(layer, batch, model, row) == best_vision(maps[2][row, :, -1].mean(0), batch, model, row, 0.4)


@pytest.mark.parametrize("family", families.EACH)
@pytest.mark.parametrize("score", ["knorm", "keydiff"])
def test_key_pruners_choose_by_the_keys_the_stock_model_caches(family: str, score: str) -> None:
    model = stock(family)
    batch = inputs(family, model)
    keys = model(**batch, use_cache=True).past_key_values.layers[0].keys  # (B, K, N, E)
    with mmroute.attach(model, prune=hub.load("prune", score, vision_keep=0.3)) as routed:
        cache = routed.model(**batch, use_cache=True).past_key_values
    table = set(backbones.of(model).vision_ids(model))
    for row, pad in enumerate(PADS):
        real = keys[row, :, pad:]
        unit = real / real.norm(dim=-1, keepdim=True)
        centre = unit.mean(1, keepdim=True)
        cosine = (unit * centre / centre.norm(dim=-1, keepdim=True)).sum(-1).mean(0)
        value = -real.norm(dim=-1).mean(0) if score == "knorm" else -cosine
        expected = best_vision(torch.cat([torch.zeros(pad), value]), batch, model, row, 0.3)
        stored = cache.layers[0].pos[row, : cache.lengths()[0][row]].tolist()
        assert [c for c in stored if int(batch["input_ids"][row, c]) in table] == expected
