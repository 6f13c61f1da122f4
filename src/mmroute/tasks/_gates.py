"""Can a solver that does not look, or does not read, do better than chance? Each shortcut gate is one such solver.

A gate is a figure with a limit. All are run on every change of a generator: closing one leak tends to open another
(balancing the lists of a lake over maps moves the leak into the picture). The solvers that learn are in `_blind`.

Source: our measurements of MVoT-like generators (lake roll-outs .65 blind to the picture, mazes 1.00 blind to walls).

Legend: K choices, T items held back.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from mmroute.errors import InputError
from mmroute.tasks._blind import blind_scores, clamped, distance, features, held_back
from mmroute.tasks._solver import solve
from mmroute.tasks.base import Generated, Sample, Score, Spec

__all__ = ["Gate", "answer_prior", "oracle", "run", "shuffled", "shuffled_image", "wall_blind"]

_QUAD_LIMIT = {"frozenlake": 0.42, "maze": 0.35, "minibehavior": 0.35}
"""What a picture may tell where answers are balanced in quads only: the rest after balancing, measured."""


@dataclass(frozen=True)
class Gate:
    """One shortcut solver's figure and how far it may go."""

    name: str
    value: float
    limit: float
    num_items: int
    is_floor: bool = False
    """The value must be at least the limit; else at most."""

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.is_floor else self.value <= self.limit


def run(task: Generated, specs: Sequence[Spec]) -> list[Gate]:
    """All gates of a world on its held-out items.

    Args:
        task: what the specs came from.
        specs: whole quads, of one split; some thousands for tight limits.
    """
    return [gate for part in _alike(task, specs) for gate in _gates(task, part)]


def _alike(task: Generated, specs: Sequence[Spec]) -> list[list[Spec]]:
    """The items by number of choices, which is the chance of guessing."""
    parts: dict[int, list[Spec]] = {}
    for spec in specs:
        parts.setdefault(len(task.choices(spec)), []).append(spec)
    return [parts[num] for num in sorted(parts)]


def _gates(task: Generated, specs: Sequence[Spec]) -> list[Gate]:
    num_choices = len(task.choices(specs[0]))
    gates = [answer_prior(specs, num_choices), oracle(task, specs)]
    test = held_back(specs)
    num = int(test.sum())
    answers = np.array([s.answer for s in specs])
    quads = bool(specs[0].group)
    for kind in ("text", "image"):
        scores = blind_scores(features(task, specs, kind), answers, test, num_choices)
        limit = _chance_limit(num_choices, num)
        if kind == "image":
            limit = _QUAD_LIMIT.get(task.name, limit)
            if task.name == "frozenlake" and quads:
                gates.append(_within_quad(scores, [s for s, held in zip(specs, test, strict=True) if held]))
        gates.append(Gate(f"blind_{kind}", _accuracy(scores, answers[test]), limit, num))
    if task.name == "maze":
        gates.append(Gate("wall_blind", wall_blind(specs), 0.30, len(specs)))
        scores = blind_scores(features(task, specs, "plates"), answers, test, num_choices)
        gates.append(Gate("wall_blind_linear", _accuracy(scores, answers[test]), 0.35, num))
    return gates


def _chance_limit(num_choices: int, num_items: int) -> float:
    chance = 1 / num_choices
    return chance + max(3 * math.sqrt(chance * (1 - chance) / num_items), 0.05)


def _accuracy(scores: Float[np.ndarray, "T K"], answers: Int[np.ndarray, " T"]) -> float:
    return float((scores.argmax(1) == answers).mean())


# ---------------------------------------------------------------- a trained model


def shuffled(task: Generated, specs: Sequence[Spec]) -> list[Sample]:
    """Every question with the picture of another item: same size of board and canvas, another quad.

    Raises:
        InputError: an item has no such partner.
    """
    pools: dict[tuple[int, int], list[Spec]] = defaultdict(list)
    for spec in specs:
        pools[spec.n, spec.canvas].append(spec)
    out = []
    for spec in specs:
        pool = pools[spec.n, spec.canvas]
        at = next(i for i, s in enumerate(pool) if s is spec)
        turned = (pool[(at + len(pool) // 2 + i) % len(pool)] for i in range(len(pool)))
        other = next((s for s in turned if s is not spec and (not s.group or s.group != spec.group)), None)
        if other is None:
            raise InputError(
                f"no second picture of {spec.n} x {spec.n} cells to show with item {spec.index} of {task.name}; "
                "give more items"
            )
        sample = task.sample(spec)
        out.append(replace(sample, images=[task.draw(other), *sample.images[1:]]))
    return out


def shuffled_image(
    task: Generated, specs: Sequence[Spec], answer: Callable[[Sequence[Sample]], Sequence[Score]]
) -> list[Gate]:
    """Does a model that answers well do so with the wrong picture too? One gate per number of choices.

    Args:
        task: what the specs came from.
        specs: held-out items.
        answer: the model under test: samples in, scores out.
    """
    gates = []
    for part in _alike(task, specs):
        scores = answer(shuffled(task, part))
        right = sum(score.correct or 0.0 for score in scores) / len(part)
        gates.append(Gate("shuffled_image", right, _chance_limit(len(task.choices(part[0])), len(part)), len(part)))
    return gates


# ---------------------------------------------------------------- single gates


def answer_prior(specs: Sequence[Spec], num_choices: int) -> Gate:
    """Chi-square test of the answers in each (size, length) stratum against even shares; the value is p."""
    strata: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for s in specs:
        strata[s.n, len(s.world.get("actions", ())) or s.world.get("k", 0)][s.answer] += 1
    statistic, freedom = 0.0, 0
    for counts in strata.values():
        total = sum(counts.values())
        if total < 5 * num_choices:  # too few for the approximation
            continue
        expected = total / num_choices
        statistic += sum((counts[i] - expected) ** 2 / expected for i in range(num_choices))
        freedom += num_choices - 1
    return Gate("answer_prior", _chi_square_tail(statistic, freedom), 0.001, len(specs), is_floor=True)


def _chi_square_tail(statistic: float, freedom: int) -> float:
    """Wilson and Hilferty's normal approximation; 1 without any degree of freedom."""
    if not freedom:
        return 1.0
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return 0.5 * math.erfc(z / math.sqrt(2))


def oracle(task: Generated, specs: Sequence[Spec]) -> Gate:
    """A solver that reads the tiles answers every item."""
    words = [task.words(s, "direct").response[1] for s in specs]
    right = [
        solve(task.name, task.question_words(s), task.cells(s, task.codes(s))) == w
        for s, w in zip(specs, words, strict=True)
    ]
    return Gate("oracle", float(np.mean(right)), 1.0, len(specs), is_floor=True)


def wall_blind(specs: Sequence[Spec]) -> float:
    """Accuracy of walking through walls, clamped to the board, and taking the nearest plate; ties count in parts."""
    total = 0.0
    for s in specs:
        here = clamped(s)
        far = [distance(here, p) for p in s.world["plates"]]
        best = [i for i, d in enumerate(far) if d == min(far)]
        total += (s.answer in best) / len(best)
    return total / len(specs)


def _within_quad(scores: Float[np.ndarray, "T K"], specs: Sequence[Spec]) -> Gate:
    """Of the two answers of its quad, which does the picture point to? A coin, if both items of a map look alike."""
    answers: dict[str, set[int]] = defaultdict(set)
    for spec in specs:
        answers[spec.group].add(spec.answer)
    right = [max(answers[s.group], key=lambda a: row[a]) == s.answer for row, s in zip(scores, specs, strict=True)]
    limit = 0.5 + 3 * math.sqrt(0.25 / len(specs))
    return Gate("blind_image_in_quad", float(np.mean(right)), limit, len(specs))
