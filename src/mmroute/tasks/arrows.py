"""Arrows: start at the star, follow k arrows; which colour is the cell you reach?

A self-avoiding chain of `kmax` + 1 cells is drawn first and its cells 1 .. 6 (7 .. 12) carry a permutation of the six
colours: whoever sees the picture but not k guesses at 1 / kmax, and off-by-one shows.

Source: ours.
"""

import dataclasses
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int

from mmroute.config import options
from mmroute.tasks import _skins
from mmroute.tasks._grid import Cell, Split, canonical, layout_hash, neighbours, only, split_of, step, turn_moves
from mmroute.tasks._presets import Preset
from mmroute.tasks._prompts import Question
from mmroute.tasks._texts import COLOURS, MOVES, told
from mmroute.tasks.base import Card, Choice, Generated, Spec, State

__all__ = ["Arrows"]

_NUM_COLOURS = len(COLOURS)


class Arrows(Generated):
    """Every step is one look-up: read the arrow of the cell, go there."""

    @options
    class Config(Generated.Config):
        kmax: Literal[6, 12] = 6
        """Length of the chain; 12 needs boards of 5 x 5 or more."""

    name = "arrows"
    task_id = 3
    unit_size = 1
    levels = False  # k must be uniform, else the picture alone would tell more than 1 / kmax
    card: ClassVar[Card] = Card((), {"val": 2000, "test": 5000}, "CC0-1.0", "generate", "accuracy", 1 / 6)

    def _chain_length(self, preset: Preset) -> int:
        return 12 if preset.hops[0] > 12 else min(self.config.kmax, preset.hops[1])

    def _least_k(self, preset: Preset) -> int:
        return 7 if preset.hops[0] > 12 else 1  # out of distribution in hops: beyond the first six colours

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({n for n, _ in self._fitting(self.preset, True)}))

    def max_length(self, size: int) -> int:
        return self._chain_length(self.preset)

    def _pairs(self, preset: Preset, streams: bool) -> list[tuple[int, int]]:
        kmax = self._chain_length(preset)
        least = max(preset.sizes[0], 5 if kmax > 6 else 4 if kmax > 5 else 3)
        ks = range(self._least_k(preset), kmax + 1)
        return [(n, k) for n in range(least, preset.sizes[1] + 1) for k in ks]

    # ------------------------------------------------------------------ drawing items

    def _draw(self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split) -> Spec:
        kmax = self._chain_length(preset)
        while True:
            chain = _self_avoiding(rng, size, kmax + 1)
            if chain is None:
                continue
            arrows = _arrows(rng, size, chain)
            colours = rng.integers(_NUM_COLOURS, size=(size, size))
            for cell, colour in zip(chain[1:], _permuted(rng, kmax), strict=True):
                colours[cell] = colour
            if split_of(key := _key(arrows, colours)) == split:
                break
        world = {"arrows": arrows, "colours": colours.tolist(), "start": list(chain[0]), "k": length, "kmax": kmax}
        return self._finish(rng, preset, size, world, int(colours[chain[length]]), key)

    def _held_out(
        self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split, unit: int
    ) -> list[Spec]:
        return [self._draw(rng, preset, size, length, split)]

    def _fogged(self, spec: Spec) -> Spec:
        """Chain colours are independent here: with a permutation the visible ones would tell the hidden one."""
        rng = np.random.default_rng([spec.seed, 3])
        chain = _follow(spec.world["arrows"], tuple(spec.world["start"]), spec.world["kmax"])
        colours = np.array(spec.world["colours"])
        while True:
            for cell in chain[1:]:
                colours[cell] = rng.integers(_NUM_COLOURS)
            if split_of(key := _key(spec.world["arrows"], colours)) == spec.split:
                break
        world = spec.world | {"colours": colours.tolist()}
        answer = int(colours[chain[spec.world["k"]]])
        return super()._fogged(dataclasses.replace(spec, world=world, answer=answer, layout_hash=key))

    # ------------------------------------------------------------------ what happens

    def trace(self, spec: Spec) -> list[State]:
        w = spec.world
        path = _follow(w["arrows"], tuple(w["start"]), w["k"])
        return [State(cell, i, MOVES[w["arrows"][cell[0]][cell[1]]]) for i, cell in enumerate(path)]

    def choices(self, spec: Spec) -> list[Choice]:
        return [Choice(colour) for colour in COLOURS]

    def _seen(self, spec: Spec, cell: Cell) -> list[str]:
        r, c = cell
        return [MOVES[spec.world["arrows"][r][c]], COLOURS[spec.world["colours"][r][c]]]

    def _unique(self, spec: Spec) -> list[tuple[list[str], Cell]]:
        return [(["start"], tuple(spec.world["start"]))]

    def _looked_at(self, spec: Spec, hop: int) -> Iterable[Cell]:
        trace = self.trace(spec)
        cell = trace[max(hop - 1, 0)].cell  # hop h reads the arrow of the cell it leaves; the answer reads the last
        return [cell] if cell is not None else []

    def _decisive(self, spec: Spec) -> Iterable[Cell]:
        end = self.trace(spec)[-1].cell
        return [end] if end is not None else []

    # ------------------------------------------------------------------ pictures

    def _board_codes(self, spec: Spec, state: State | None) -> Int[np.ndarray, "n n"]:
        w = spec.world
        codes = _skins.ARROWS + 12 * np.array(w["arrows"]) + 2 * np.array(w["colours"])
        codes[tuple(w["start"]) if state is None or state.cell is None else state.cell] += 1
        return codes.astype(np.int16)

    def _read(self, codes: Int[np.ndarray, "n n"], spec: Spec) -> State:
        return State(only((codes >= _skins.ARROWS) & (codes < _skins.OBJECTS) & ((codes - _skins.ARROWS) % 2 == 1)))

    # ------------------------------------------------------------------ texts

    def question_words(self, spec: Spec) -> list[str]:
        return ["k:", f"s{spec.world['k']}"]

    def chain(self, spec: Spec) -> list[list[str]]:
        first, *rest = self.trace(spec)
        assert first.cell is not None
        steps, arrow = [["start", self.at(spec, first.cell), "."]], first.event
        for s in rest:
            assert s.cell is not None
            steps.append([f"s{s.step}", arrow, self.at(spec, s.cell)])
            arrow = s.event
        return steps

    def sentences(self, spec: Spec) -> list[list[str]]:
        first, *rest = self.trace(spec)
        assert first.cell is not None
        steps, arrow = [told(self.at(spec, first.cell))], first.event
        for state in rest:
            assert state.cell is not None
            colour = COLOURS[spec.world["colours"][state.cell[0]][state.cell[1]]]
            steps.append(told(self.at(spec, state.cell), state.step, arrow, colour))
            arrow = state.event
        return steps

    def ask(self, spec: Spec) -> Question:
        return Question(
            scene="Every cell of the board has an arrow and a colour.",
            rules=f"Start at the cell with the stars and follow the arrows for {spec.world['k']} steps.",
            given="",
            asked=f"Which colour is the cell you reach: {', '.join(COLOURS)}?",
            options=(),
            instruction="Answer with one word.",
        )

    def describe(self, spec: Spec, hop: int, state: State, style: str) -> str:
        before = self.trace(spec)[hop - 1]
        if style == "action":
            return f"Go {before.event}."
        assert state.cell is not None
        return f"In step {hop} the arrow points {before.event}, so I go to row {state.cell[0]} column {state.cell[1]}."


@cache
def _table() -> Int[np.ndarray, "G 24"]:
    """[g, 6 * arrow + colour]: the same cell after symmetry g."""
    moves = turn_moves()
    return np.array([[6 * moves[g, v // 6] + v % 6 for v in range(24)] for g in range(8)])


def _key(arrows: list[list[int]], colours: Int[np.ndarray, "n n"]) -> str:
    """The layout is arrows and colours."""
    return layout_hash("arrows", len(arrows), canonical(6 * np.array(arrows) + colours, _table()))


def _self_avoiding(rng: np.random.Generator, n: int, length: int) -> list[Cell] | None:
    """A path of distinct cells; None if it ran into itself."""
    path = [divmod(int(rng.integers(n * n)), n)]
    while len(path) < length:
        options = [q for _, q in neighbours(path[-1], n) if q not in path]
        if not options:
            return None
        path.append(options[int(rng.integers(len(options)))])
    return path


def _arrows(rng: np.random.Generator, n: int, chain: list[Cell]) -> list[list[int]]:
    """Random arrows that stay on the board, and along the chain those that follow it."""
    arrows = []
    for r in range(n):
        options = [[a for a, _ in neighbours((r, c), n)] for c in range(n)]
        arrows.append([o[int(rng.integers(len(o)))] for o in options])
    for here, there in pairwise(chain):
        arrows[here[0]][here[1]] = next(a for a, q in neighbours(here, n) if q == there)
    return arrows


def _permuted(rng: np.random.Generator, kmax: int) -> list[int]:
    """Colours of chain cells 1 .. kmax: permutations of the six, neighbours differ."""
    out = rng.permutation(_NUM_COLOURS).tolist()
    while len(out) < kmax:
        more = rng.permutation(_NUM_COLOURS).tolist()
        if more[0] != out[-1]:
            out += more
    return out[:kmax]


def _follow(arrows: list[list[int]], start: Cell, k: int) -> list[Cell]:
    path = [start]
    for _ in range(k):
        path.append(step(path[-1], arrows[path[-1][0]][path[-1][1]]))
    return path
