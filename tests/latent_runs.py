"""Recipes of latent runs on the small model, and their lessons."""

import numpy as np

from mmroute import recipe as recipes

STAGES = [
    {"name": "written", "latents": 0, "steps": 2, "written": 0.5},
    {"name": "one", "latents": 1, "steps": 2, "mix": 0.5, "written": 0},
    {"name": "all", "steps": 2, "supervise": [[0, 1.0]], "written": 0.5},
]
TRAIN = {"tasks": {"arrows:nano": 1}, "batch": 4, "stages": STAGES, "save_every": 2, "eval_every": 6, "eval_items": 4}
VEDAS = {"name": "vedas", "num_latents": 6, "stop": "head", "replay_tokens": 3}
DEPTH = {"name": "vedas", "deepen_tokens": 5, "chunk_tokens": 2, "scale_init": 0.2}


def recipe(think=None, deepen=None, **train):
    return recipes.Recipe(name="test", think=think or VEDAS, deepen=deepen, train={**TRAIN, **train})


def lesson(run, rows=3, seed=0):
    return run.teacher.lesson(run._drawn(np.random.default_rng(seed), rows), "latent")
