"""Attached tiny models for tests of training: one model per family and backend, gradients by name, and their distance.

Legend: B batch, N positions.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import families
from learned import LinearRouter
from torch import Tensor

import mmroute
from mmroute.engine.attach import Routed

__all__ = ["LAYERS", "RAGGED", "attached", "backbone_gradients", "far", "labels", "relative", "router", "stock"]

LAYERS = 4
RAGGED = [0, 3, 2]
"""Left padding of the ragged batch of three."""


@functools.cache
def stock(name: str, attn: str = "sdpa") -> Any:
    """The family's tiny model; shared, so leave it detached, in eval mode and without gradients."""
    return families.make(name, attn, layers=LAYERS)


def router(**options: Any) -> LinearRouter:
    """The learned test pruner, sized for `stock`."""
    return LinearRouter(hidden=families.HIDDEN, layers=LAYERS, **options)


@contextmanager
def attached(name: str, attn: str = "sdpa", training: bool = True, **options: Any) -> Iterator[Routed]:
    """The shared model attached, and put back as it was."""
    model = stock(name, attn)
    routed = mmroute.attach(model, **options)
    model.train(training)
    try:
        yield routed
    finally:
        if "_mmroute" in model.__dict__:
            routed.detach()
        model.eval().zero_grad()


def labels(batch: Mapping[str, Tensor]) -> Tensor:
    """Every real position but a row's first is a target: what precedes that one is padding."""
    real = batch["attention_mask"].bool()
    return batch["input_ids"].masked_fill(real.cumsum(1) <= 1, -100)


def backbone_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of everything but the routing parts, by name; they are taken off the model."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and not n.startswith("mmroute.")}
    for parameter in model.parameters():
        parameter.grad = None
    return found


def relative(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest difference of two sets of gradients, each tensor against its own largest entry.

    What is 0 in exact arithmetic (a key bias shifts every score alike) is rounding noise and has no scale: left out.
    """
    assert one.keys() == other.keys()
    named = [n for n in one if not n.endswith("k_proj.bias") and float(other[n].abs().max()) > 1e-9]
    assert len(named) > 10
    return max(float((one[n] - other[n]).abs().max() / other[n].abs().max()) for n in named)


def far(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Largest absolute difference of two sets of tensors."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).abs().max()) for n in one)
