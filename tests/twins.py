"""What twin tests share: 100 random batches, the budget rule as a slow loop, and the comparison of kept sets.

A twin is written from the paper in plain Python, one row at a time; it shares no code with the method.
"""

import math
import random
from collections.abc import Callable
from typing import NamedTuple

from mmroute.checks import Case, made_up, walk
from mmroute.prune.base import Pruner
from mmroute.tokens import Modality

__all__ = ["CASES", "LAYERS", "TEXT", "VISION", "Score", "assert_same_sets", "layouts", "members", "plain", "twin"]

TEXT, VISION = Modality.TEXT, Modality.VISION
LAYERS = 6
Score = Callable[[int, int, list[int]], dict[int, float]]
"""(row, layer, columns that still run) -> score by column."""


def layouts(num_inputs: int) -> list[Case]:
    """Random batches of 1 and 3 rows with 0 to 3 images of their own sizes, some with a second hop."""
    rng = random.Random(0)
    cases = []
    for i in range(num_inputs):
        rows = []
        for _ in range(rng.choice((1, 3))):
            row = []
            for _ in range(rng.randint(0, 3)):
                row += [(0, TEXT, rng.randint(1, 4)), (0, VISION, rng.randint(1, 12))]
            row.append((0, TEXT, rng.randint(1, 6)))
            if rng.random() < 0.4:
                row += [(1, TEXT, rng.randint(1, 4)), (1, VISION, rng.randint(1, 8)), (1, TEXT, 2)]
            rows.append(row)
        cases.append(made_up(rows, seed=i))
    return cases


CASES = layouts(100)


class Plain(NamedTuple):
    """[row][column]: what each position is."""

    valid: list[list[bool]]
    hop: list[list[int]]
    modality: list[list[int]]
    protected: list[list[bool]]


_PLAIN: dict[int, tuple[Case, Plain]] = {}


def plain(case: Case) -> Plain:
    """A case's positions as lists: loops that read them out of tensors take most of a twin's time."""
    if id(case) not in _PLAIN:  # the case is held, so its id stays its own
        _PLAIN[id(case)] = case, Plain(*(getattr(case.tokens, name).tolist() for name in Plain._fields))
    return _PLAIN[id(case)][1]


def members(case: Case, b: int, hop: int, modality: int, free: bool = False) -> list[int]:
    """Columns of one group of one row; with `free` only those that are not protected."""
    t = plain(case)
    of = zip(t.valid[b], t.hop[b], t.modality[b], t.protected[b], strict=True)
    return [c for c, (v, h, m, p) in enumerate(of) if v and h == hop and m == modality and not (free and p)]


def twin(case: Case, score: Score, rates: list[dict[Modality, float]], action: str) -> list[list[set[int]]]:
    """[layer][row] columns that stay, by the budget rule alone: ceil of the share of the full count, protection inside,
    the best of the rest, lower column first."""
    t = plain(case)
    kept: list[list[set[int]]] = []
    B = len(t.valid)
    alive = [[c for c, real in enumerate(row) if real] for row in t.valid]
    for layer in range(LAYERS):
        kept.append([])
        for b in range(B):
            scores = score(b, layer, alive[b])
            stay = set(alive[b])
            for hop in range(3):
                for modality, rate in rates[layer].items():
                    every, loose = members(case, b, hop, modality), members(case, b, hop, modality, free=True)
                    fixed = len(every) - len(loose)
                    free = [c for c in loose if c in alive[b]]
                    number = max(math.ceil(rate * len(every) - 1e-6), fixed) - fixed
                    best = sorted(free, key=lambda c: (-scores[c], c))[: min(number, len(free))]
                    stay -= set(free) - set(best)
            kept[-1].append(stay)
            if action == "drop":
                alive[b] = [c for c in alive[b] if c in stay]
    return kept


def assert_same_sets(pruner: Pruner, case: Case, expected: list[list[set[int]]]) -> None:
    for layer, keep in enumerate(walk(pruner, case, LAYERS)):
        for b, columns in enumerate(expected[layer]):
            assert set(keep.mask[b].nonzero().flatten().tolist()) == columns, f"layer {layer}, row {b}"
