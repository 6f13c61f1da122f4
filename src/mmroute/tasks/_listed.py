"""Worlds in which a list of actions is given and carried out in the head: what their texts and lengths share."""

from abc import abstractmethod
from itertools import pairwise
from typing import Any

from mmroute.tasks._generated import Generated
from mmroute.tasks._grid import Cell
from mmroute.tasks._presets import Preset
from mmroute.tasks._schema import Spec, State
from mmroute.tasks._texts import MOVES, numbered, told

__all__ = ["Listed"]


class Listed(Generated):
    """A world whose `spec.world["actions"]` are numbers of `action_names`."""

    action_names: tuple[str, ...] = MOVES

    def _pairs(self, preset: Preset, streams: bool) -> list[tuple[int, int]]:
        low, high = preset.hops
        sizes = range(preset.sizes[0], preset.sizes[1] + 1)
        # Presets of long lists are there to go beyond the 2 n moves of training.
        return [(n, h) for n in sizes for h in range(low, (high if low > 12 else min(high, 2 * n)) + 1)]

    @abstractmethod
    def layout_key(self, world: dict[str, Any]) -> str:
        """The hash of the static layout, the same for all its eight symmetries."""

    def moves(self, spec: Spec) -> list[str]:
        """The listed actions by name."""
        return [self.action_names[a] for a in spec.world["actions"]]

    def listed(self, spec: Spec) -> list[str]:
        return [self._phrase(name) for name in self.moves(spec)]

    def _phrase(self, name: str) -> str:
        return f"Go {name}."

    def question_words(self, spec: Spec) -> list[str]:
        return ["actions:", *numbered(self.moves(spec), self.first_step(spec))]

    def chain(self, spec: Spec) -> list[list[str]]:
        trace, moves, first = self.trace(spec), self.moves(spec), self.first_step(spec)
        assert trace[0].cell is not None
        steps = [["start", self.at(spec, trace[0].cell), "."]]
        for hop, (before, state) in enumerate(pairwise(trace), start=1):
            assert before.cell is not None
            own = self._step_words(spec, hop, before.cell, state)
            steps.append([f"s{first + hop - 1}", moves[hop - 1], *own])
        return steps

    def _step_words(self, spec: Spec, hop: int, here: Cell, state: State) -> list[str]:
        """What a step meets, behind its number and its action."""
        assert state.cell is not None
        return [self.at(spec, state.cell), state.event]

    def outcomes(self, spec: Spec) -> list[list[str]]:
        """The place where each step ends and the number of the next: what is there is one look away, and the answer
        takes it.

        Without the number nothing tells which move is next, and places alone were not learned (docs/log.md).
        """
        first, cells = self.first_step(spec), [state.cell for state in self.trace(spec)]
        places = [self.at(spec, cell) for cell in cells if cell is not None]
        return [[place, f"s{first + i}"] if i + 1 < len(places) else [place] for i, place in enumerate(places)]

    def sentences(self, spec: Spec) -> list[list[str]]:
        moves, first = self.moves(spec), self.first_step(spec)
        start, *places = [words[0] for words in self.outcomes(spec)]
        hops = zip(places, moves, self.trace(spec)[1:], strict=False)  # a walk may end before its list does
        return [
            told(start),
            *(told(place, first + i, move, state.event) for i, (place, move, state) in enumerate(hops)),
        ]

    def describe(self, spec: Spec, hop: int, state: State, style: str) -> str:
        return self.listed(spec)[hop - 1] if style == "action" else self._told(spec, hop, state)

    @abstractmethod
    def _told(self, spec: Spec, hop: int, state: State) -> str:
        """One hop as an English sentence."""
