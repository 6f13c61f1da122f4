"""A tiny model and recipes on which latents are trained in tests, and the lessons of such a run."""

from pathlib import Path

import numpy as np

from mmroute import recipe as recipes
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build

SMALL = {
    "hidden": 32,
    "layers": 4,
    "heads": 2,
    "kv_heads": 1,
    "mlp": 48,
    "mrope_section": (2, 3, 3),
    "vision_hidden": 32,
    "vision_mlp": 48,
}
STAGES = [
    {"name": "written", "latents": 0, "steps": 2, "written": 0.5},
    {"name": "one", "latents": 1, "steps": 2, "mix": 0.5, "written": 0},
    {"name": "all", "steps": 2, "supervise": [[0, 1.0]], "written": 0.5},
]
TRAIN = {"tasks": {"arrows:nano": 1}, "batch": 4, "stages": STAGES, "save_every": 2, "eval_every": 6, "eval_items": 4}
VEDAS = {"name": "vedas", "num_latents": 6, "stop": "head", "replay_tokens": 3}
DEPTH = {"name": "vedas", "deepen_tokens": 5, "chunk_tokens": 2, "scale_init": 0.2}


def small(path: Path) -> Path:
    """The model's folder, written there."""
    write_folder(path, build(Shape(**SMALL), VOCABULARY, 0), "x: 1\n", {})
    return path


def recipe(think=None, deepen=None, **train):
    return recipes.Recipe(name="test", think=think or VEDAS, deepen=deepen, train={**TRAIN, **train})


def lesson(run, rows=3, seed=0):
    return run.teacher.lesson(run._drawn(np.random.default_rng(seed), rows), "latent")
