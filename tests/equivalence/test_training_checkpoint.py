"""Activation checkpointing changes memory and nothing else: layers run twice, routers once, gradients are the same."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import families
import pytest
from rig import LAYERS, RAGGED, attached, backbone_gradients, far, labels, router, stock

from mmroute.deepen.uniform import Uniform
from mmroute.errors import UnsupportedCall
from mmroute.prune.fastv import FastV

NAME = "qwen2_5_vl"
WAYS = {
    "physical": lambda: {"prune": router(), "executor": "physical"},
    "dense": lambda: {"prune": router(), "executor": "dense"},
    "deepened": lambda: {"prune": router(), "executor": "physical", "deepen": Uniform(deepen_tokens=4)},
    "dense deepened": lambda: {"prune": router(), "executor": "dense", "deepen": Uniform(deepen_tokens=4)},
    "probed": lambda: {"prune": FastV(start_layer=2)},
}
SHORT = ("physical", "dense deepened")
"""Ways that hold the others' parts: every family takes these by default, one family all of them."""
CELLS = [
    pytest.param(*each.values, way, marks=[*each.marks, *[pytest.mark.slow] * (way not in SHORT)])
    for each in families.EACH
    for way in WAYS
    if each.values != (NAME,)
]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Gradients stay on here."""
    return


@contextmanager
def _checkpointed(model: Any, on: bool = True, **options: Any) -> Iterator[None]:
    if on:
        model.activation_checkpointing_enable(**options)
    try:
        yield
    finally:
        if on:
            model.activation_checkpointing_disable()
            model.disable_input_require_grads()


@contextmanager
def _counted(text: Any) -> Iterator[Counter]:
    """How often each layer's attention ran."""
    calls: Counter = Counter()
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, i=i: calls.update([i])) for i, layer in enumerate(text.layers)
    ]
    yield calls
    for hook in hooks:
        hook.remove()


def _gradients(routed: Any, batch: dict, repeat: int = 1) -> dict:
    losses = [routed.model(**batch, labels=labels(batch)).loss for _ in range(repeat)]
    for loss in losses:
        loss.backward()
    parts = {f"part {n}": p.grad.clone() for n, p in routed.parts.named_parameters() if p.grad is not None}
    return {**backbone_gradients(routed.model), **parts}


@pytest.mark.parametrize(("name", "way"), [*((NAME, way) for way in WAYS), *CELLS])
def test_checkpointing_on_is_checkpointing_off(name, way):
    batch = families.make_inputs(name, stock(name), 3, RAGGED)
    found, calls, asked = {}, {}, {}
    for on in (False, True):
        with attached(name, **WAYS[way]()) as routed, _checkpointed(routed.model, on):
            with _counted(routed.controller.text) as counted:
                found[on] = _gradients(routed, batch)
            calls[on] = counted
            asked[on] = getattr(routed.parts.prune, "asked", None)
    assert far(found[True], found[False]) == 0
    assert calls[True] == Counter({i: 2 * n for i, n in calls[False].items()})
    assert asked[True] == asked[False]
    assert asked[True] in (None, LAYERS - 1), "routers run once, whatever is recomputed"
    if "deepened" in way:
        assert calls[False][1] == 2, "no second pass ran"


@pytest.mark.parametrize("way", WAYS)
def test_two_forwards_then_two_backwards(way):
    batch = families.make_inputs(NAME, stock(NAME), 3, RAGGED)
    with attached(NAME, **WAYS[way]()) as routed:
        wanted = _gradients(routed, batch, repeat=2)
        with _checkpointed(routed.model):
            assert far(_gradients(routed, batch, repeat=2), wanted) == 0


def test_the_deprecated_name_works_too():
    batch = families.make_inputs(NAME, stock(NAME))
    with attached(NAME, prune=router()) as routed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            routed.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with _counted(routed.controller.text) as calls:
            _gradients(routed, batch)
        routed.model.activation_checkpointing_disable()
        routed.model.disable_input_require_grads()
    assert set(calls.values()) == {2}


def test_every_other_layer_is_every_other_layer_and_can_be_changed():
    batch = families.make_inputs(NAME, stock(NAME))
    with attached(NAME, prune=router()) as routed:
        text = routed.controller.text
        for step in (2, 1, 3):
            with _checkpointed(routed.model, every_n_layers=step):
                flagged = {i for i, layer in enumerate(text.layers) if layer.gradient_checkpointing}
                for _ in range(2):  # the second call finds the flags taken
                    with _counted(text) as calls:
                        _gradients(routed, batch)
                    assert {i for i, n in calls.items() if n == 2} == flagged
                assert 0 < len(flagged) <= LAYERS
        with _counted(text) as calls:
            _gradients(routed, batch)
        assert set(calls.values()) == {1}, "switched off, yet a layer is recomputed"


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")  # the vision tower runs into it first
def test_reentrant_checkpointing_is_refused():
    batch = families.make_inputs(NAME, stock(NAME))
    for options in ({"use_reentrant": True}, {}):  # torch's own default is reentrant
        with (
            attached(NAME, prune=router()) as routed,
            _checkpointed(routed.model, activation_checkpointing_kwargs=options),
            pytest.raises(UnsupportedCall, match="use_reentrant"),
        ):
            routed.model(**batch, labels=labels(batch))


def test_the_stock_paths_get_their_checkpointing_back():
    batch = families.make_inputs(NAME, stock(NAME))
    with attached(NAME, prune=router()) as routed, _checkpointed(routed.model):
        model, text = routed.model, routed.controller.text
        _gradients(routed, batch)
        with routed.off(), _counted(text) as calls:
            _gradients(routed, batch)
        assert set(calls.values()) == {2}
        _gradients(routed, batch)
        routed.detach()
        assert all(layer.gradient_checkpointing for layer in text.layers)
        assert model.is_activation_checkpointing
