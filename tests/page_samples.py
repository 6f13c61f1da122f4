"""A trace with everything a page can show: layers skipped, passes repeated, keys given up when a hop closes."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import mmroute
from mmroute import hub
from mmroute.backbones.images import user_message
from mmroute.page.story import tell
from mmroute.trace import Trace

__all__ = ["NASTY", "picture_of_noise", "told"]

NASTY = "</script><!--<script>alert(1)</script> & \u2028 'quoted' \"too\""


def picture_of_noise() -> Image.Image:
    """48 x 32 px, no pixel dark: what a page darkens is told from what it shows."""
    return Image.fromarray(np.random.default_rng(0).integers(120, 256, (32, 48, 3), dtype=np.uint8))


class Forgets(hub.find("prune", "random")):  # type: ignore[misc]
    """Random, and of what a hop wrote only even columns stay."""

    def close(self, slots: Any, closing: Any, layer: int) -> Any:
        return slots.valid & ~((slots.hop == closing[:, None]) & (slots.position % 2 == 1))


class EveryToken(hub.find("think", "text")):  # type: ignore[misc]
    """Every token that a random model writes starts a hop."""

    def starts_hop(self, piece: str) -> bool:
        return True


def told(folder: Path) -> Trace:
    """The full trace, with its story, of a question about `picture_of_noise`.

    Args:
        folder: a checkpoint.
    """
    deepen = hub.load("deepen", "uniform", deepen_tokens=3)
    loaded = mmroute.load(folder)
    with mmroute.attach(loaded, prune=Forgets(vision_keep=0.3), deepen=deepen, prefix_tokens=0) as routed:
        routed.full_trace = True
        messages = user_message(NASTY, [picture_of_noise()])
        answer = routed.answer_many([messages], think=EveryToken(max_new_tokens=7))[0]
        return tell(routed, messages, answer, title="maze", recipe="forgets", gold="A", relevant=[[0, 1]])
