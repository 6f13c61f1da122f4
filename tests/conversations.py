"""Conversations about made pictures, and the tiny models that answer them, routed or not."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

import mmroute
from mmroute import hub
from mmroute.backbones.images import user_message
from mmroute.engine.attach import Routed

__all__ = ["METHODS", "STEPS", "asked", "ending_with", "picture", "routed_as"]

STEPS = 7
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "fastv": {"vision_keep": 0.4, "start_layer": 1},
    "knorm": {"vision_keep": 0.4, "text_keep": 0.7},
    "pyramiddrop": {"stage_keep": 0.5, "stages": [0.4, 0.7]},
    "random": {"vision_keep": 0.4, "text_keep": 0.7},
}


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def asked() -> list[list[dict[str, Any]]]:
    """Three conversations of different lengths, with one, two and one image."""
    return [
        user_message("where is the red ball, please?", [picture(0)]),
        user_message("which?", [picture(1, (30, 50)), picture(2, (60, 30))]),
        user_message("how many balls?", [picture(3, (48, 48))]),
    ]


@contextmanager
def routed_as(model: Any, method: str, **options: Any) -> Iterator[Routed]:
    """The model attached with one of `METHODS`."""
    pruner = None if method == "none" else hub.load("prune", method, **METHODS[method])
    with mmroute.attach(model, prune=pruner, **options) as routed:
        yield routed


@contextmanager
def ending_with(model: Any, ids: int | Sequence[int]) -> Iterator[None]:
    """These tokens end a completion."""
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = ids
    try:
        yield
    finally:
        model.generation_config.eos_token_id = before
