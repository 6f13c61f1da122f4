"""A model of four layers, 32 wide, that writes the words of the generated worlds: small enough to train in tests."""

from pathlib import Path
from typing import Any

from mmroute.tasks._texts import VOCABULARY
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build

SHAPE: dict[str, Any] = {
    "hidden": 32,
    "layers": 4,
    "heads": 2,
    "kv_heads": 1,
    "mlp": 48,
    "mrope_section": (2, 3, 3),
    "vision_hidden": 32,
    "vision_mlp": 48,
}


def write_small(path: Path) -> Path:
    """Its checkpoint folder, written there with random weights."""
    write_folder(path, build(Shape(**SHAPE), VOCABULARY, 0), "x: 1\n", {})
    return path
