"""The generated worlds as tests go through them."""

import hashlib

import pytest

from mmroute.tasks.base import Generated, Spec

WORLDS = ("maze", "frozenlake", "arrows", "gridspatial", "minibehavior", "needle")
SEARCHED = [pytest.param(name, marks=[pytest.mark.slow] if name == "minibehavior" else []) for name in WORLDS]
"""For tests that draw hundreds of items: a list of minibehavior is searched for, at some tenths of a second each."""
ON_GROUND = WORLDS[:-1]
"""Worlds with a board on a canvas of 10 x 10 tiles; the needle's board is the canvas."""
WITHOUT = {
    ("arrows", "mvot"),
    ("arrows", "mvot-xl"),
    ("gridspatial", "mvot"),
    ("gridspatial", "mvot-xl"),
    ("gridspatial", "ood-hops"),
    ("minibehavior", "nano"),
    ("minibehavior", "mvot"),
    ("minibehavior", "mvot-xl"),
    ("needle", "mvot"),
    ("needle", "mvot-xl"),
    ("needle", "ood-hops"),
}
"""What has no items: a preset that asks for a variant or for more hops than the world has."""


def existing(presets):
    """Every (world, preset) that there is."""
    return [(name, preset) for name in WORLDS for preset in presets if (name, preset) not in WITHOUT]


_KNOWN: dict[tuple[str, str, str, int], Spec] = {}


def specs(task: Generated, split: str, n: int, offset: int = 0) -> list[Spec]:
    """Items by their number; the same ones are asked for by many tests, and drawn once."""
    out = []
    for i in range(offset, offset + n):
        key = (task.name, repr(task.config), split, i)
        if key not in _KNOWN:
            _KNOWN[key] = task.spec(split, i)
        out.append(_KNOWN[key])
    return out


def digest(task: Generated) -> str:
    """SHA-256 of the first 16 specs of every split."""
    lines = [task.spec(split, i).to_json() for split in ("train", "val", "test") for i in range(16)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
