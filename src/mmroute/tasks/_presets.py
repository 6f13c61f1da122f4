"""Named sizes of the generated worlds, and how hard their items are."""

from dataclasses import dataclass, field

import numpy as np

from mmroute.errors import ConfigError

__all__ = ["PRESETS", "Preset", "level_of", "plan"]

LEVELS = {"easy": 0.40, "medium": 0.35, "hard": 0.25}
"""Share of each level in held-out items, as far as a task's sizes allow."""


@dataclass(frozen=True)
class Preset:
    """What a preset fixes; a task takes from it what it has a use for."""

    name: str
    id: int
    """Enters every seed; never reused."""
    canvas: int
    """Tiles of one side; squared, the vision tokens of a picture."""
    sizes: tuple[int, int]
    """Least and largest side of the board."""
    hops: tuple[int, int]
    blocked: float = 0.3
    """Probability that a listed maze move runs into a wall (training stream)."""
    noise: float = 0.02
    splits: dict[str, int] = field(default_factory=dict)
    """Items of the splits that have a fixed size."""
    skin: str = "tiles"
    look: str = "plain"
    variant: str = "auto"
    mix: dict[str, float] = field(default_factory=dict)
    """Other presets and their shares; `unsolvable` is `small` under fog."""


_ALL = (
    Preset("nano", 1, 4, (3, 4), (1, 3), 0.0, 0.0, {"train": 4000, "val": 200, "test": 400}),
    Preset("tiny", 2, 8, (3, 5), (1, 5), 0.15, 0.0, {"train": 20_000, "val": 1000, "test": 2000}),
    Preset("small", 3, 10, (3, 6), (1, 12), splits={"val": 2000, "test": 5000}),
    Preset("wide", 4, 12, (4, 6), (2, 12), splits={"val": 1000, "test": 2000}),
    Preset("mvot", 5, 8, (3, 6), (1, 12), 0.0, 0.0, {"train": 368, "val": 92, "test": 92}, "mvot", variant="mvot"),
    Preset(
        "mvot-xl", 6, 8, (3, 6), (1, 12), 0.0, 0.0, {"train": 7360, "val": 920, "test": 920}, "mvot", variant="mvot"
    ),
    Preset("ood-size", 7, 10, (7, 8), (1, 12), splits={"test": 2000}),
    Preset("ood-hops", 8, 10, (5, 6), (13, 16), splits={"test": 2000}),
    Preset("ood-skin", 9, 10, (3, 6), (1, 12), splits={"test": 2000}, look="permuted"),
    Preset(
        "gate-mix",
        10,
        10,
        (3, 8),
        (1, 16),
        splits={"train": 4000, "val": 1000, "test": 3000},
        mix={"small": 0.72, "ood-size": 0.10, "ood-hops": 0.10, "unsolvable": 0.08},
    ),
)
PRESETS = {p.name: p for p in _ALL}


def level_of(hops: int, n: int, blocked: float, noise: float) -> tuple[float, str]:
    """How hard an item is: its score in about [0, 1] and its level.

    Args:
        hops: steps of the trace.
        n: side of the board.
        blocked: share of moves that run into a wall.
        noise: standard deviation in units of full scale.
    """
    score = 0.5 * hops / 12 + 0.2 * (n - 3) / 5 + 0.2 * blocked + 0.1 * noise / 0.05
    return round(score, 4), "easy" if score < 0.33 else "medium" if score < 0.5 else "hard"


def plan(
    rng: np.random.Generator, preset: Preset, pairs: list[tuple[int, int]], task: str, levels: bool
) -> tuple[int, int]:
    """Draws the size and length of one unit: levels in the shares of `LEVELS`, or all pairs alike.

    Raises:
        ConfigError: the task has nothing to offer at this preset.
    """
    if not pairs:
        raise ConfigError(f"{task} has no items at preset {preset.name!r}; take another preset")
    if not levels:
        return pairs[int(rng.integers(len(pairs)))]
    blocked = 0.27 if task == "maze" else 0.0  # measured share of the permutation quads
    by_level: dict[str, list[tuple[int, int]]] = {level: [] for level in LEVELS}
    for n, length in pairs:
        by_level[level_of(length, n, blocked, preset.noise)[1]].append((n, length))
    share = np.array([LEVELS[k] if by_level[k] else 0.0 for k in LEVELS])
    level = list(LEVELS)[int(rng.choice(len(LEVELS), p=share / share.sum()))]
    chosen = by_level[level]
    return chosen[int(rng.integers(len(chosen)))]
