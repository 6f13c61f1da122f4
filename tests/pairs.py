"""A draft and a target of random weights in folders, a recipe that names them, and a rater that has learned nothing."""

from pathlib import Path
from typing import Any

import yaml

from mmroute.backbones.load import load
from mmroute.gate.prp import Prp
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build

__all__ = ["SMALL", "write_pair", "write_rater", "write_recipe"]

SMALL = Shape(hidden=64, layers=2, heads=2, kv_heads=1, mlp=64, vision_hidden=32, vision_heads=2, vision_mlp=32)


def write_pair(folder: Path) -> None:
    """`draft` and `target`."""
    for seed, name in enumerate(("draft", "target")):
        write_folder(folder / name, build(SMALL, VOCABULARY, seed), "", {})


def write_recipe(folder: Path, **gate: Any) -> Path:
    """`nano.yaml`: lakes, and lakes whose answer is hidden."""
    given = {
        "draft": str(folder / "draft"),
        "target": str(folder / "target"),
        "dtype": "float32",
        "method": {"calibration": "none"},
        "mix": [
            {"name": "lake", "task": "frozenlake:nano", "share": 3},
            {"name": "hopeless", "task": "frozenlake:nano", "share": 1, "fog": "decisive"},
        ],
    }
    train = {"n": 40, "batch": 16, "max_epochs": 2}
    think = {"name": "text", "max_new_tokens": 12}
    path = folder / "nano.yaml"
    path.write_text(yaml.safe_dump({"gate": given | gate, "think": think, "train": train}))
    return path


def write_rater(folder: Path) -> Path:
    """`rater`, which fits `draft`."""
    Prp(calibration="none").bind(load(folder / "draft", dtype="float32")).save(folder / "rater")
    return folder / "rater"
