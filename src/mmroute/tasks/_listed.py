"""Worlds in which a list of actions is given and carried out in the head: what their texts, lengths and quads share.

Legend: W worlds, K lists of actions.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int

from mmroute.tasks._generated import Generated
from mmroute.tasks._grid import Cell
from mmroute.tasks._presets import Preset
from mmroute.tasks._schema import Spec, State
from mmroute.tasks._texts import MOVES, numbered

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

    def _crossed(
        self,
        rng: np.random.Generator,
        preset: Preset,
        size: int,
        worlds: Sequence[tuple[dict[str, Any], str]],
        lists: Sequence[list[int]],
        label: Int[np.ndarray, "W K"],
        pair: tuple[int, int],
    ) -> list[Spec] | None:
        """Two worlds x two lists with classes [[x, y], [y, x]], in any order; None where the table holds no such four.

        Neither the world nor the list tells anything then.

        Args:
            worlds: what may be crossed, each with the hash of its layout.
            lists: of actions.
            label: [world, list]: the class; -1 where the two do not go together.
            pair: x and y.
        """
        x, y = pair
        is_x, is_y = label == x, label == y
        both = (is_x.astype(int) @ is_y.T.astype(int)) > 0  # [i, j]: some list has x in world i and y in world j
        found = np.argwhere(both & both.T)
        if not len(found):
            return None
        i, j = (int(v) for v in found[int(rng.integers(len(found)))])
        k = int(rng.choice(np.flatnonzero(is_x[i] & is_y[j])))
        m = int(rng.choice(np.flatnonzero(is_y[i] & is_x[j])))
        specs = []
        for which, answers in ((i, (x, y)), (j, (y, x))):
            world, key = worlds[which]
            base = self._finish(rng, preset, size, world, 0, key)
            specs += [
                replace(base, world=world | {"actions": lists[listed]}, answer=answer)
                for listed, answer in zip((k, m), answers, strict=True)
            ]
        return [specs[int(p)] for p in rng.permutation(4)]

    def _step_words(self, spec: Spec, hop: int, here: Cell, state: State) -> list[str]:
        """What a step meets, behind its number and its action."""
        assert state.cell is not None
        return [self.at(spec, state.cell), state.event]

    def describe(self, spec: Spec, hop: int, state: State, style: str) -> str:
        return self.listed(spec)[hop - 1] if style == "action" else self._told(spec, hop, state)

    @abstractmethod
    def _told(self, spec: Spec, hop: int, state: State) -> str:
        """One hop as an English sentence."""
