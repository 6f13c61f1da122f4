"""Needle: what colour is one small glyph on a large canvas, or the glyph next to it?

The picture is 16 x 16 tiles of ground; the target, up to eight other glyphs and, in items of two hops, the neighbour of
the target are one tile each. One tile in 256 decides: a stand-in for benchmarks of high resolution such as V*.
Held-out items are quads: one scene and one list of four colours, each of which is right once.

Source: ours; the kind of question follows V*Bench (arXiv 2312.14135).
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from mmroute.tasks import _skins
from mmroute.tasks._grid import DELTA, Cell, Split, canonical, inside, layout_hash, only, split_of, step
from mmroute.tasks._presets import Preset
from mmroute.tasks._prompts import Question
from mmroute.tasks._texts import COLOURS, SHAPES
from mmroute.tasks.base import Card, Choice, Generated, Spec, State

__all__ = ["Needle"]

_MOST_DISTRACTORS = 8
_RELATIONS = ("above", "left_of", "below", "right_of")
"""In the order of `DELTA`: where the asked glyph lies from the named one."""
_SIDES = {"nano": 4, "tiny": 8}
_SIDE = 16


class Needle(Generated):
    """Find one glyph among much ground and read its colour."""

    name = "needle"
    task_id = 6
    levels = False  # what varies is the number of hops and of distractors
    boxes = True
    card: ClassVar[Card] = Card((), {"val": 2000, "test": 5000}, "CC0-1.0", "generate", "accuracy", 0.25)

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.preset = _enlarged(self.preset)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.preset.canvas // self.cell_side,)

    def max_length(self, size: int) -> int:
        return 2

    def _pairs(self, preset: Preset, streams: bool) -> list[tuple[int, int]]:
        if preset.hops[0] > 2:  # nothing here has more hops
            return []
        return [(_enlarged(preset).canvas // self.cell_side, hops) for hops in (1, 2)]

    def _fitting(self, preset: Preset, streams: bool) -> list[tuple[int, int]]:
        return self._pairs(preset, streams)  # the board is the canvas, whatever its side

    # ------------------------------------------------------------------ drawing items

    def _draw(self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split) -> Spec:
        world, key = self._scene(rng, size, length, split)
        return self._coloured(self._finish(rng, _enlarged(preset), size, world, 0, key), int(rng.integers(4)))

    def _held_out(
        self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split, unit: int
    ) -> list[Spec]:
        world, key = self._scene(rng, size, length, split)
        base = self._finish(rng, _enlarged(preset), size, world, 0, key)
        return [self._coloured(base, int(answer)) for answer in rng.permutation(4)]

    def _coloured(self, spec: Spec, answer: int) -> Spec:
        """The item with the asked glyph in the colour of option `answer`."""
        glyphs = [list(glyph) for glyph in spec.world["glyphs"]]
        glyphs[self._asked(spec)][0] = spec.world["options"][answer]
        return dataclasses.replace(spec, world=spec.world | {"glyphs": glyphs}, answer=answer)

    @staticmethod
    def _asked(spec: Spec) -> int:
        """Index of the glyph whose colour is the answer."""
        return 1 if spec.world["relation"] else 0

    def _scene(self, rng: np.random.Generator, n: int, length: int, split: Split) -> tuple[dict[str, Any], str]:
        """Glyphs [colour, shape, row, column]: the target, its neighbour where one is asked, then distractors."""
        while True:
            shape = int(rng.integers(len(SHAPES)))
            cells = [divmod(int(i), n) for i in rng.permutation(n * n)[: _MOST_DISTRACTORS + 2]]
            way = int(rng.integers(4)) if length == 2 else -1
            placed = [cells[0]]
            if length == 2:
                beside = step(cells[0], way)
                if not inside(beside, n):
                    continue
                placed.append(beside)
            rest = [c for c in cells[1:] if c not in placed][: int(rng.integers(_MOST_DISTRACTORS + 1))]
            # The target alone has its shape, so naming the shape names it.
            others = [(shape + 1 + int(x)) % len(SHAPES) for x in rng.integers(len(SHAPES) - 1, size=len(rest) + 1)]
            kinds = [shape, *others][: len(placed)] + others[1:]
            glyphs = [
                [int(rng.integers(len(COLOURS))), kind, *cell]
                for kind, cell in zip(kinds, [*placed, *rest], strict=True)
            ]
            board = np.zeros((n, n), dtype=np.int64)
            for _, kind, r, c in glyphs:
                board[r, c] = 1 + kind
            key = layout_hash("needle", n, canonical(board))
            if split_of(key) == split:
                options = rng.permutation(len(COLOURS))[:4].tolist()
                relation = _RELATIONS[way] if length == 2 else ""
                return {"glyphs": glyphs, "relation": relation, "options": options}, key

    # ------------------------------------------------------------------ what happens

    def _cell(self, spec: Spec, which: int) -> Cell:
        _, _, r, c = spec.world["glyphs"][which]
        return r, c

    def trace(self, spec: Spec) -> list[State]:
        looks = range(self._asked(spec) + 1)
        return [State(None), *(State(self._cell(spec, i), i + 1, self._name(spec, i)[0]) for i in looks)]

    def choices(self, spec: Spec) -> list[Choice]:
        return [Choice(label, COLOURS[c]) for label, c in zip("ABCD", spec.world["options"], strict=True)]

    def _name(self, spec: Spec, which: int) -> list[str]:
        colour, shape, _, _ = spec.world["glyphs"][which]
        return [COLOURS[colour], SHAPES[shape]]

    def _seen(self, spec: Spec, cell: Cell) -> list[str]:
        found = [i for i, g in enumerate(spec.world["glyphs"]) if (g[2], g[3]) == cell]
        return self._name(spec, found[0]) if found else ["empty"]

    def _unique(self, spec: Spec) -> list[tuple[list[str], Cell]]:
        return [(["target", self._name(spec, 0)[1]], self._cell(spec, 0))]

    def _looked_at(self, spec: Spec, hop: int) -> Iterable[Cell]:
        looks = self._asked(spec) + 1
        if hop == 0:
            return []
        return [self._cell(spec, min(hop, looks) - 1)]

    def _decisive(self, spec: Spec) -> Iterable[Cell]:
        return [self._cell(spec, self._asked(spec))]

    def _distractors(self, spec: Spec) -> int:
        return len(spec.world["glyphs"]) - self._asked(spec) - 1

    # ------------------------------------------------------------------ pictures

    def _board_codes(self, spec: Spec, state: State | None) -> Int[np.ndarray, "n n"]:
        codes = _skins.background(spec.seed, spec.n)
        for colour, shape, r, c in spec.world["glyphs"]:
            codes[r, c] = _skins.GLYPHS + 2 * (len(SHAPES) * colour + shape)
        if state is not None and state.cell is not None:
            codes[state.cell] += 1
        return codes

    def _read(self, codes: Int[np.ndarray, "n n"], spec: Spec) -> State:
        return State(only((codes >= _skins.GLYPHS) & ((codes - _skins.GLYPHS) % 2 == 1)))

    # ------------------------------------------------------------------ texts

    def question_words(self, spec: Spec) -> list[str]:
        options = [w for c in self.choices(spec) for w in (c.label, c.text)]
        relation = spec.world["relation"]
        return [*([relation] if relation else []), "target", self._name(spec, 0)[1], *options]

    def chain(self, spec: Spec) -> list[list[str]]:
        return [[*self._name(spec, i), self.at(spec, self._cell(spec, i)), "."] for i in range(self._asked(spec) + 1)]

    def ask(self, spec: Spec) -> Question:
        shape, relation = self._name(spec, 0)[1], spec.world["relation"]
        told = relation.replace("_", " ")
        what = f"the shape directly {told} the only {shape}" if relation else f"the only {shape}"
        return Question(
            scene="Somewhere in the picture are a few small shapes.",
            rules="",
            given="",
            asked=f"Which colour is {what}?",
            options=tuple(f"{c.label}. {c.text}" for c in self.choices(spec)),
            instruction="Answer with the option's letter.",
        )

    def describe(self, spec: Spec, hop: int, state: State, style: str) -> str:
        name = " ".join(self._name(spec, hop - 1))
        if style == "action":
            return "Look for the target." if hop == 1 else "Look beside it."
        assert state.cell is not None
        where = f"row {state.cell[0]} column {state.cell[1]}"
        return f"The target is the {name} at {where}." if hop == 1 else f"Beside it, at {where}, is the {name}."


def _enlarged(preset: Preset) -> Preset:
    """The preset with the canvas of this world."""
    return dataclasses.replace(preset, canvas=_SIDES.get(preset.name, _SIDE))


assert len(_RELATIONS) == len(DELTA)
