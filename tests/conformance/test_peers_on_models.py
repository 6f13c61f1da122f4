"""Peers choose by what the stock model itself embeds, attends to and caches, on every family."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
from torch import Tensor

import mmroute
from mmroute import backbones, hub

LAYERS, PADS = 4, [0, 3]


@functools.cache
def stock(family: str) -> Any:
    return families.make(family, "eager", layers=LAYERS)


def inputs(family: str) -> dict[str, Tensor]:
    return families.make_inputs(family, stock(family), batch=2, pads=PADS, images=2, after=12)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def run(family: str, name: str, layer: int, **options: Any) -> tuple[list[list[int]], Any]:
    """[row] columns that ran a layer, and the cache."""
    with mmroute.attach(stock(family), prune=hub.load("prune", name, **options)) as routed:
        routed.full_trace = True
        cache = routed.model(**inputs(family), use_cache=True).past_key_values
        return routed.trace.calls[0].layers[layer].kept, cache


def vision_of(family: str, row: int) -> list[int]:
    table = set(backbones.of(stock(family)).vision_ids(stock(family)))
    return [c for c, i in enumerate(inputs(family)["input_ids"][row].tolist()) if i in table]


def embedded(family: str) -> Tensor:
    return stock(family)(**inputs(family), output_hidden_states=True).hidden_states[0]


@pytest.mark.parametrize("family", families.EACH)
def test_divprune_spreads_the_stock_models_embeddings(family: str) -> None:
    kept, _ = run(family, "divprune", 0, vision_keep=0.3)
    states = embedded(family)
    for row in range(2):
        vision = vision_of(family, row)
        unit = torch.nn.functional.normalize(states[row, vision].double(), dim=-1)
        apart = 1 - unit @ unit.T
        taken: list[int] = []
        for _ in range(math.ceil(0.3 * len(vision))):
            near = apart.clone().fill_diagonal_(math.inf).amin(1) if not taken else apart[:, taken].amin(1)
            near[taken] = -1
            taken.append(int((near * 2**20).round().argmax()))
        assert [c for c in kept[row] if c in vision] == sorted(vision[i] for i in taken)


@pytest.mark.parametrize("family", families.EACH)
def test_snapkv_forgets_by_the_stock_models_attention_maps(family: str) -> None:
    maps = stock(family)(**inputs(family), output_attentions=True).attentions
    _, cache = run(family, "snapkv", 0, vision_keep=0.3)
    for layer in range(LAYERS):
        for row, pad in enumerate(PADS):
            look = maps[layer][row, :, :, pad:]
            N = look.shape[-1]
            width = math.ceil(N / 8)
            mean = look[:, -width:].mean(1)
            mean[:, N - width :] = 0
            padded = torch.nn.functional.pad(mean, (2, 2))
            score = torch.stack([padded[:, i : i + N] for i in range(5)]).mean(0).mean(0)
            vision = vision_of(family, row)
            best = sorted(vision, key=lambda c, s=score, p=pad: -float(s[c - p]))[: math.ceil(0.3 * len(vision))]
            stored = cache.layers[layer].pos[row, : cache.lengths()[layer][row]].tolist()
            assert [c for c in stored if c in vision] == sorted(best)


@pytest.mark.parametrize("family", families.EACH)
def test_sparsevlm_ranks_by_the_stock_models_raters(family: str) -> None:
    maps = stock(family)(**inputs(family), output_attentions=True).attentions
    states = embedded(family).double()
    kept, _ = run(family, "sparsevlm", 2, version="v2", keeps=[0.3], after=[0.25])
    for row in range(2):
        vision = vision_of(family, row)
        text = list(range(max(vision) + 1, states.shape[1]))
        g = (states[row, vision] @ states[row, text].T).softmax(-1).mean(0)
        raters = [c for c, value in zip(text, g.tolist(), strict=True) if value > float(g.mean())]
        look = maps[1][row][:, raters].mean(1)[:, vision]
        heads = look.sum(1).argsort(descending=True)[:2]
        score = look[heads].mean(0)
        best = score.argsort(descending=True)[: math.ceil(0.3 * len(vision))].tolist()
        assert [c for c in kept[row] if c in vision] == sorted(vision[i] for i in best)


@pytest.mark.parametrize("family", families.EACH)
def test_dart_starts_from_the_largest_keys_the_stock_model_caches(family: str) -> None:
    """With four kept there is room for the vision pivots alone."""
    keys = stock(family)(**inputs(family), use_cache=True).past_key_values.layers[1].keys
    count = len(vision_of(family, 0))
    kept, _ = run(family, "dart", 2, start_layer=2, vision_keep=4 / count)
    for row in range(2):
        vision = vision_of(family, row)
        pairs = keys[row][:, vision].unflatten(-1, (2, -1))  # (K, n, 2, E / 2): a rotary pair is a half apart
        norm = pairs.norm(dim=2).sum(dim=(0, 2))
        best = norm.argsort(descending=True)[:4].tolist()
        assert [c for c in kept[row] if c in vision] == sorted(vision[i] for i in best)


@pytest.mark.parametrize("family", families.EACH)
@pytest.mark.parametrize("name", ["snapkv", "streaming", "knorm", "keydiff"])
def test_what_is_only_forgotten_changes_no_logit_of_its_own_call(family: str, name: str) -> None:
    want = stock(family)(**inputs(family)).logits
    with mmroute.attach(stock(family), prune=hub.load("prune", name, vision_keep=0.2)) as routed:
        got = routed.model(**inputs(family), use_cache=True).logits
    real = inputs(family)["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-5)
