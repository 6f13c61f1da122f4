"""Gridspatial: where do objects lie to each other?

Two kinds of question, as in VSR and EmbSpatial: is one object left of, right of, above or below another (yes or no),
and which of four objects is nearest to a fifth, or lies between two others (A-D). A hop is the box of one object.
Held-out relations come as quads: the board and its mirror image x the relation and its inverse; held-out choices as
quads in which every letter is right once.

Source: ours; the kinds of question follow VSR (arXiv 2205.00363) and EmbSpatial-Bench (arXiv 2406.05756).
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from mmroute.tasks import _skins
from mmroute.tasks._grid import Cell, Split, canonical, layout_hash, only, split_of
from mmroute.tasks._presets import Preset
from mmroute.tasks._prompts import Question
from mmroute.tasks._texts import COLOURS, SHAPES, coordinate, position
from mmroute.tasks.base import Card, Choice, Generated, Spec, State

__all__ = ["GridSpatial"]

_INVERSE = {"left_of": "right_of", "right_of": "left_of", "above": "below", "below": "above"}
_AXIS = {"left_of": 1, "right_of": 1, "above": 0, "below": 0}
_RELATION = {"left_of": "to the left of", "right_of": "to the right of", "above": "above", "below": "below"}
_KINDS = len(COLOURS) * len(SHAPES)
_MAX_OBJECTS = 6

_Object = list[int]
"""[colour, shape, row, column]"""


class GridSpatial(Generated):
    """Find the objects by colour and shape, write down where they are, compare."""

    name = "gridspatial"
    task_id = 4
    levels = False  # all items have few hops; what varies is the kind of question
    boxes = True
    card: ClassVar[Card] = Card((), {"val": 2000, "test": 5000}, "CC0-1.0", "generate", "accuracy", 0.375)

    def max_length(self, size: int) -> int:
        """Lengths are kinds here: up to 2 asks for a relation, 3 for a choice among four."""
        return 3

    def _pairs(self, preset: Preset, streams: bool) -> list[tuple[int, int]]:
        if preset.hops[0] > 3:  # nothing here has more hops
            return []
        return [(n, kind) for n in range(preset.sizes[0], preset.sizes[1] + 1) for kind in (2, 3)]

    # ------------------------------------------------------------------ drawing items

    def _draw(self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split) -> Spec:
        relation, answer = _wanted(rng, length)
        world, key = _scene(rng, size, relation, answer, split)
        return self._finish(rng, preset, size, world, answer, key)

    def _held_out(
        self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split, unit: int
    ) -> list[Spec]:
        relation, answer = _wanted(rng, length)
        world, key = _scene(rng, size, relation, answer, split)
        base = self._finish(rng, preset, size, world, answer, key)
        axis = _AXIS.get(relation, 1)
        mirrored = [
            [*o[:2], *((size - 1 - o[2], o[3]) if axis == 0 else (o[2], size - 1 - o[3]))] for o in world["objects"]
        ]
        specs = []
        if relation in _INVERSE:
            for objects, right in ((world["objects"], answer), (mirrored, 1 - answer)):
                for name, correct in ((relation, right), (_INVERSE[relation], 1 - right)):
                    changed = world | {"objects": objects, "relation": name}
                    specs.append(dataclasses.replace(base, world=changed, answer=correct))
        else:
            turn = [int(i) for i in rng.permutation(4)]
            for i, shift in enumerate(turn):
                candidates = [world["candidates"][(j + shift) % 4] for j in range(4)]
                changed = world | {"objects": mirrored if i % 2 else world["objects"], "candidates": candidates}
                specs.append(dataclasses.replace(base, world=changed, answer=(answer - shift) % 4))
        return [specs[int(i)] for i in rng.permutation(4)]

    # ------------------------------------------------------------------ what happens

    def _cell(self, spec: Spec, which: int) -> Cell:
        _, _, r, c = spec.world["objects"][which]
        return r, c

    def _order(self, spec: Spec) -> list[int]:
        """The objects in the order in which they are looked up."""
        return [*spec.world["targets"], *spec.world["candidates"]]

    def trace(self, spec: Spec) -> list[State]:
        hops = [State(self._cell(spec, o), i, self._verdict(spec, o)) for i, o in enumerate(self._order(spec), start=1)]
        return [State(None), *hops]

    def _verdict(self, spec: Spec, which: int) -> str:
        """What is found out once this object is seen: a distance, or whether the relation holds; else empty."""
        w = spec.world
        if w["relation"] in _INVERSE and which == w["targets"][1]:
            return ("yes", "no")[spec.answer]
        if which not in w["candidates"]:
            return ""
        here, *ends = (self._cell(spec, o) for o in (which, *w["targets"]))
        if w["relation"] == "nearest":
            return f"s{_distance(here, ends[0])}"
        return "yes" if _is_between(here, ends[0], ends[1]) else "no"

    def choices(self, spec: Spec) -> list[Choice]:
        if spec.world["relation"] in _INVERSE:
            return [Choice("yes"), Choice("no")]
        return [Choice(x, " ".join(self._name(spec, o))) for x, o in zip("ABCD", spec.world["candidates"], strict=True)]

    def _name(self, spec: Spec, which: int) -> list[str]:
        colour, shape, _, _ = spec.world["objects"][which]
        return [COLOURS[colour], SHAPES[shape]]

    def _seen(self, spec: Spec, cell: Cell) -> list[str]:
        found = [i for i, o in enumerate(spec.world["objects"]) if (o[2], o[3]) == cell]
        return self._name(spec, found[0]) if found else ["empty"]

    def _unique(self, spec: Spec) -> list[tuple[list[str], Cell]]:
        return [(self._name(spec, i), self._cell(spec, i)) for i in range(len(spec.world["objects"]))]

    def _looked_at(self, spec: Spec, hop: int) -> Iterable[Cell]:
        order = self._order(spec)
        if hop == 0:
            return []
        return [self._cell(spec, o) for o in (order if hop > len(order) else [order[hop - 1]])]

    def _decisive(self, spec: Spec) -> Iterable[Cell]:
        return [self._cell(spec, o) for o in self._order(spec)]

    def _distractors(self, spec: Spec) -> int:
        return len(spec.world["objects"]) - len(self._order(spec))

    # ------------------------------------------------------------------ pictures

    def _board_codes(self, spec: Spec, state: State | None) -> Int[np.ndarray, "n n"]:
        codes = np.full((spec.n, spec.n), _skins.OBJECTS, dtype=np.int16)
        for colour, shape, r, c in spec.world["objects"]:
            codes[r, c] = _skins.OBJECTS + 1 + 2 * (len(SHAPES) * colour + shape)
        if state is not None and state.cell is not None:
            codes[state.cell] += 1
        return codes

    def _read(self, codes: Int[np.ndarray, "n n"], spec: Spec) -> State:
        return State(only((codes > _skins.OBJECTS) & ((codes - _skins.OBJECTS) % 2 == 0)))

    # ------------------------------------------------------------------ texts

    def question_words(self, spec: Spec) -> list[str]:
        w = spec.world
        names = [self._name(spec, o) for o in w["targets"]]
        if w["relation"] in _INVERSE:
            return [*names[0], w["relation"], *names[1]]
        listed = [w for x, o in zip("ABCD", w["candidates"], strict=True) for w in (x, *self._name(spec, o))]
        return [w["relation"], *(word for name in names for word in name), *listed]

    def chain(self, spec: Spec) -> list[list[str]]:
        """One line per object: where it is, and how it compares, number by number.

        Two coordinates are compared in written steps, with what is compared side by side: their rows and columns as
        numbers, then what these say, then the verdict, then the best candidate so far. A verdict in one word straight
        from two coordinates was not learned in thousands of steps (docs/log.md).
        """
        w = spec.world
        ends = [self._on_canvas(spec, o) for o in w["targets"]]
        steps, best = [], ("none", math.inf)
        for o in self._order(spec):
            name, here = self._name(spec, o), self._on_canvas(spec, o)
            if o in w["candidates"]:
                letter = "ABCD"[w["candidates"].index(o)]
                if w["relation"] == "nearest":
                    found, value = _apart(here, ends[0])
                    best = min(best, (letter, value), key=lambda known: known[1])
                    found = [*found, best[0], str(best[1])]
                else:
                    found, value = _along(here, *ends)
                    best = (letter, 0) if value else best
                    found = [*found, best[0]]
                steps.append([letter, *name, *found, "."])
            elif w["relation"] in _INVERSE and o == w["targets"][1]:
                steps.append([*name, *_compared(here, ends[0], w["relation"]), "."])
            else:
                steps.append([*name, coordinate(*here), "."])
        return steps

    def outcomes(self, spec: Spec) -> list[list[str]]:
        """The words behind each object's name: where it is, what is compared with what, and what that settles."""
        candidates = spec.world["candidates"]
        named = [3 if o in candidates else 2 for o in self._order(spec)]
        return [step[n:-1] for step, n in zip(self.chain(spec), named, strict=True)]

    def _on_canvas(self, spec: Spec, which: int) -> Cell:
        """Where an object is, counted as coordinates are written."""
        return position(self.at(spec, self._cell(spec, which)))

    def ask(self, spec: Spec) -> Question:
        relation = spec.world["relation"]
        names = [" ".join(self._name(spec, o)) for o in spec.world["targets"]]
        if relation in _INVERSE:
            asked = f"Is the {names[0]} {_RELATION[relation]} the {names[1]}?"
            return Question("", "", "", asked, (), "Answer yes or no.")
        if relation == "nearest":
            asked = f"Which object is nearest to the {names[0]}, counted in rows plus columns?"
        else:
            asked = f"Which object lies on the straight line between the {names[0]} and the {names[1]}?"
        options = tuple(f"{c.label}. the {c.text}" for c in self.choices(spec))
        return Question("", "", "", asked, options, "Answer with the option's letter.")

    def describe(self, spec: Spec, hop: int, state: State, style: str) -> str:
        name = " ".join(self._name(spec, self._order(spec)[hop - 1]))
        if style == "action":
            return f"Look at the {name}."
        assert state.cell is not None
        where = f"The {name} is at row {state.cell[0]} column {state.cell[1]}"
        if not state.event:
            return f"{where}."
        if spec.world["relation"] in _INVERSE:
            first = " ".join(self._name(spec, spec.world["targets"][0]))
            held = _RELATION[spec.world["relation"]]
            return f"{where}, so the {first} is {'' if state.event == 'yes' else 'not '}{held} it."
        if spec.world["relation"] == "nearest":
            return f"{where}, which is {state.event[1:]} away."
        return f"{where}, which is {'' if state.event == 'yes' else 'not '}between them."


def _distance(a: Cell, b: Cell) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _compared(here: Cell, other: Cell, relation: str) -> list[str]:
    """Both places, both numbers on the axis that is asked about, what the other is of this one, and the verdict."""
    axis = _AXIS[relation]
    less, more = ("above", "below") if axis == 0 else ("left_of", "right_of")
    held = less if other[axis] < here[axis] else more
    verdict = "yes" if held == relation else "no"
    return [coordinate(*here), coordinate(*other), str(here[axis]), str(other[axis]), held, verdict]


def _apart(here: Cell, other: Cell) -> tuple[list[str], int]:
    """Both places, then for rows and for columns both numbers and their difference, then the sum."""
    words = [coordinate(*here), coordinate(*other)]
    for a, b in zip(here, other, strict=True):
        words += [str(a), str(b), str(abs(a - b))]
    return [*words, str(_distance(here, other))], _distance(here, other)


def _along(here: Cell, first: Cell, second: Cell) -> tuple[list[str], bool]:
    """All three places, then for rows and for columns the numbers and how the first of them lies, then the verdict."""
    words = [coordinate(*cell) for cell in (here, first, second)]
    for a, low, high in zip(here, first, second, strict=True):
        lies = "same" if a == low == high else "between" if min(low, high) < a < max(low, high) else "none"
        words += [str(a), str(low), str(high), lies]
    holds = _is_between(here, first, second)
    return [*words, "yes" if holds else "no"], holds


def _is_between(x: Cell, a: Cell, b: Cell) -> bool:
    """Whether x lies on the row or column of both ends, strictly between them."""
    for axis in (0, 1):
        if x[axis] == a[axis] == b[axis]:
            low, high = sorted((a[1 - axis], b[1 - axis]))
            return low < x[1 - axis] < high
    return False


def _wanted(rng: np.random.Generator, length: int) -> tuple[str, int]:
    """Kind of question and index of the right answer, drawn before any geometry."""
    if length < 3:
        return list(_INVERSE)[int(rng.integers(4))], int(rng.integers(2))
    return ("nearest", "between")[int(rng.integers(2))], int(rng.integers(4))


def _scene(rng: np.random.Generator, n: int, relation: str, answer: int, split: Split) -> tuple[dict[str, Any], str]:
    """Objects on a board of the split for which `answer` is right; targets come first, then candidates."""
    num_targets = 1 if relation == "nearest" else 2
    num_candidates = 0 if relation in _INVERSE else 4
    asked = num_targets + num_candidates
    while True:
        total = int(rng.integers(3, _MAX_OBJECTS + 1)) if relation in _INVERSE else asked
        cells = [divmod(int(i), n) for i in rng.permutation(n * n)[:total]]
        if relation in _INVERSE:
            axis = _AXIS[relation]
            if cells[0][axis] == cells[1][axis]:
                continue
            # `answer` 0 is yes; swapping the two makes the wanted relation hold or not
            first_is_less = (relation in ("left_of", "above")) == (answer == 0)
            if (cells[0][axis] < cells[1][axis]) != first_is_less:
                cells[0], cells[1] = cells[1], cells[0]
        elif not _settle(cells, relation, answer):
            continue
        kinds = _kinds(rng, total)
        board = np.zeros((n, n), dtype=np.int64)
        for kind, cell in zip(kinds, cells, strict=True):
            board[cell] = 1 + kind
        key = layout_hash("gridspatial", n, canonical(board))
        if split_of(key) != split:
            continue
        objects = [[*divmod(k, len(SHAPES)), *cell] for k, cell in zip(kinds, cells, strict=True)]
        world = {
            "objects": objects,
            "relation": relation,
            "targets": list(range(num_targets)),
            "candidates": list(range(num_targets, asked)),
        }
        return world, key


def _settle(cells: list[Cell], relation: str, answer: int) -> bool:
    """Moves the one right candidate to place `answer`; False if there is none or more."""
    if relation == "nearest":
        scores = [_distance(c, cells[0]) for c in cells[1:]]
        right = [i for i, s in enumerate(scores) if s == min(scores)]
        first = 1
    else:
        right = [i for i, c in enumerate(cells[2:]) if _is_between(c, cells[0], cells[1])]
        first = 2
    if len(right) != 1:
        return False
    i, j = first + right[0], first + answer
    cells[i], cells[j] = cells[j], cells[i]
    return True


def _kinds(rng: np.random.Generator, total: int) -> list[int]:
    """Distinct colour x shape kinds; every one after the first shares its colour or its shape with an earlier one."""
    num = len(SHAPES)
    kinds = [int(rng.integers(_KINDS))]
    while len(kinds) < total:
        like = kinds[int(rng.integers(len(kinds)))]
        colour, shape = divmod(like, num)
        if rng.random() < 0.5:
            shape = int(rng.integers(num))
        else:
            colour = int(rng.integers(len(COLOURS)))
        if (new := colour * num + shape) not in kinds:
            kinds.append(new)
    order = rng.permutation(total)
    return [kinds[int(i)] for i in order]
