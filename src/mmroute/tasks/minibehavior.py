"""Minibehavior: does a list of moves, pick, drop and toggle bring the printer to the table and switch it on?

Rules: a room with walls around it and some inside. A move into a wall, the table or the printer stays. `pick` takes the
printer from one of the four neighbouring cells, `drop` puts it on the table in one of them, `toggle` beside the table
switches it on. A pick or a drop that cannot be done is an error and ends the run; so does success; what is listed after
that is not executed. Whatever ends without an error and without a printer that is on lacks a step.
Held-out items come in eights: four rooms x two lists, each list with every answer once, each room with two answers.
Quads as in FrozenLake would not do: which two of the four answers a list can have is plain from what it does.

Source: the task of MVoT (arXiv 2501.07542), after Mini-BEHAVIOR's printer; rooms, eights and texts are ours.
Deviates: MVoT's loader and the wording of its options are not released; option D and where a drop is allowed are ours.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from mmroute.tasks import _skins
from mmroute.tasks._errands import (
    CLASSES,
    PICK,
    around,
    classes_of,
    crossed,
    draw_errand,
    draw_lists,
    draw_room,
    met,
    outcome,
    run,
    within,
)
from mmroute.tasks._grid import Cell, Split, canonical, layout_hash, only, split_of
from mmroute.tasks._listed import Listed
from mmroute.tasks._presets import Preset
from mmroute.tasks._prompts import Question
from mmroute.tasks._texts import MOVES
from mmroute.tasks.base import Card, Choice, Spec, State

__all__ = ["MiniBehavior"]

_FLOOR, _WALL, _PRINTER, _TABLE, _LOADED, _ON, _AGENT, _CARRIER, _LEFT = range(_skins.ROOM, _skins.ROOM + 9)
_POOL, _PRINTERS, _TABLES, _TRIES = 48, 8, 16, 24
_LEAST_SIDE, _MOST_SIDE, _MOST_HOPS = 7, 10, 14


class MiniBehavior(Listed):
    """Carry out an errand in the head: walk, pick up, put down, switch on."""

    name = "minibehavior"
    task_id = 5
    version = 2
    unit_size = 8
    action_names = (*MOVES, "pick", "drop", "toggle")
    card: ClassVar[Card] = Card((), {"val": 2000, "test": 5000}, "CC0-1.0", "generate", "accuracy", 0.25)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({n for n, _ in self._fitting(self.preset, True)}))

    def max_length(self, size: int) -> int:
        return min(_MOST_HOPS, self.preset.hops[1])

    def _pairs(self, preset: Preset, streams: bool) -> list[tuple[int, int]]:
        sides = range(_LEAST_SIDE, min(_MOST_SIDE, preset.canvas) + 1)
        least = 3 if streams else 4  # three actions are too few for lists that have every answer
        return [(n, h) for n in sides for h in range(max(least, preset.hops[0]), min(_MOST_HOPS, preset.hops[1]) + 1)]

    def layout_key(self, world: dict[str, Any]) -> str:
        """The layout is walls, printer, table and start: without the start small rooms would be too few."""
        board = np.array(world["walls"])
        for value, what in enumerate(("printer", "table", "start"), start=2):
            board[tuple(world[what])] = value
        return layout_hash("minibehavior", len(board), canonical(board))

    # ------------------------------------------------------------------ drawing items

    def _draw(self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split) -> Spec:
        # Once: re-drawing the class on rejection would skew the classes. Success takes three actions.
        answer = int(rng.integers(0 if length >= 3 else 1, len(CLASSES)))
        while True:
            walls, start = draw_room(rng, size)
            cells = within(walls, start, max(length - 1, 2))
            if len(cells) < 2:
                continue
            printer, table = (cells[int(i)] for i in rng.permutation(len(cells))[:2])
            world = {"walls": walls, "start": list(start), "printer": list(printer), "table": list(table)}
            key = self.layout_key(world)
            if split_of(key) != split:
                continue
            for _ in range(_TRIES):
                actions = draw_errand(rng, world, length, answer)
                moments = run(world, actions)
                if len(moments) - 1 == length and outcome(moments) == answer:
                    unused = rng.integers(7, size=rng.integers(3)).tolist() if moments[-1].event in CLASSES else []
                    return self._finish(rng, preset, size, world | {"actions": [*actions, *unused]}, answer, key)

    def _held_out(
        self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split, unit: int
    ) -> list[Spec]:
        while True:
            rooms = self._rooms(rng, size, length, split)
            worlds = [world for world, _ in rooms]
            lists = draw_lists(rng, worlds, length) if len(worlds) >= len(CLASSES) else []
            eight = crossed(rng, classes_of(worlds, lists, length)) if lists else None
            if eight is not None:
                break
        specs = []
        for which, answers in eight:
            world, key = rooms[which]
            base = self._finish(rng, preset, size, world, 0, key)
            specs += [replace(base, world=world | {"actions": lists[k]}, answer=a) for k, a in answers.items()]
        return [specs[int(p)] for p in rng.permutation(self.unit_size)]

    def _rooms(self, rng: np.random.Generator, n: int, length: int, split: Split) -> list[tuple[dict[str, Any], str]]:
        """Rooms of the split with the same walls and start, whose printers and tables stand close to each other.

        Close, because a list has to do something in four rooms.
        """
        walls, start = draw_room(rng, n)
        cells = within(walls, start, length)
        if not cells:
            return []
        centre = cells[int(rng.integers(len(cells)))]
        printers, tables = around(cells, centre)[:_PRINTERS], around(cells, centre)[:_TABLES]
        pairs = [(p, t) for p in printers for t in tables if p != t]
        rooms = []
        for i in rng.permutation(len(pairs)):
            printer, table = pairs[int(i)]
            world = {"walls": walls, "start": list(start), "printer": list(printer), "table": list(table)}
            if split_of(key := self.layout_key(world)) == split:
                rooms.append((world, key))
            if len(rooms) == _POOL:
                break
        return rooms

    # ------------------------------------------------------------------ what happens

    def trace(self, spec: Spec) -> list[State]:
        moments = run(spec.world, spec.world["actions"])
        return [State(m.agent, i, m.event, m.printer) for i, m in enumerate(moments)]

    def choices(self, spec: Spec) -> list[Choice]:
        return [Choice(label, text) for label, text in zip("ABCD", CLASSES, strict=True)]

    def _answer_word(self, spec: Spec) -> str:
        return CLASSES[spec.answer]

    def _seen(self, spec: Spec, cell: Cell) -> list[str]:
        return ["start" if list(cell) == spec.world["start"] else met(spec.world, "floor", cell)]

    def _unique(self, spec: Spec) -> list[tuple[list[str], Cell]]:
        return [([what], tuple(spec.world[what])) for what in ("start", "printer", "table")]

    def _looked_at(self, spec: Spec, hop: int) -> Iterable[Cell]:
        moments = run(spec.world, spec.world["actions"])
        if hop == len(moments):
            return self._decisive(spec)
        if hop == 0:
            return [moments[0].agent]
        return [moments[hop - 1].agent, moments[hop].seen]

    def _decisive(self, spec: Spec) -> Iterable[Cell]:
        return [tuple(spec.world["printer"]), tuple(spec.world["table"])]

    # ------------------------------------------------------------------ pictures

    def _board_codes(self, spec: Spec, state: State | None) -> Int[np.ndarray, "n n"]:
        w = spec.world
        printer = state.shows if state is not None else "floor"
        start = tuple(w["start"])
        at = start if state is None or state.cell is None else state.cell
        codes = np.where(np.array(w["walls"]) == 1, _WALL, _FLOOR).astype(np.int16)
        codes[tuple(w["table"])] = {"table": _LOADED, "on": _ON}.get(printer, _TABLE)
        if printer == "floor":
            codes[tuple(w["printer"])] = _PRINTER
        codes[start] = _LEFT
        codes[at] = _CARRIER if printer == "carried" else _AGENT
        return codes

    def _read(self, codes: Int[np.ndarray, "n n"], spec: Spec) -> State:
        shows = {_PRINTER: "floor", _CARRIER: "carried", _LOADED: "table", _ON: "on"}
        found = [word for code, word in shows.items() if (codes == code).any()]
        return State(only(np.isin(codes, (_AGENT, _CARRIER))), shows=found[0] if found else "")

    # ------------------------------------------------------------------ texts

    def _phrase(self, name: str) -> str:
        return {"pick": "Pick up the printer.", "drop": "Drop the printer.", "toggle": "Toggle the printer."}.get(
            name, f"Go {name}."
        )

    def _step_words(self, spec: Spec, hop: int, here: Cell, state: State) -> list[str]:
        moment = run(spec.world, spec.world["actions"])[hop]
        stayed = spec.world["actions"][hop - 1] < PICK and moment.event != "floor"
        return [self.at(spec, moment.seen), moment.event, *([self.at(spec, here)] if stayed else [])]

    def outcomes(self, spec: Spec) -> list[list[str]]:
        """The place where each step ends, what was done there, and the number of the next."""
        done = [[] if state.event in ("", "start", "floor") else [state.event] for state in self.trace(spec)]
        return [[place, *event, *number] for (place, *number), event in zip(super().outcomes(spec), done, strict=True)]

    def sentences(self, spec: Spec) -> list[list[str]]:
        return self.chain(spec)  # one does not move by picking up

    def ask(self, spec: Spec) -> Question:
        return Question(
            scene="The picture shows a room from above with walls, an agent, a printer and a table.",
            rules="A move into a wall, the table or the printer does nothing. Pick takes the printer from a "
            "neighbouring cell, drop puts it on the table in a neighbouring cell, toggle beside the table switches "
            "it on. A pick or a drop that cannot be done is an error and ends everything.",
            given=f"Actions: {', '.join(self.moves(spec))}.",
            asked="What happens?",
            options=(
                "A. The printer is on at the table.",
                "B. A drop fails.",
                "C. A pick fails.",
                "D. A step is missing: the printer is not on at the table.",
            ),
            instruction="Answer with the option's letter.",
        )

    def _told(self, spec: Spec, hop: int, state: State) -> str:
        assert state.cell is not None
        where, name = f"row {state.cell[0]} column {state.cell[1]}", self.moves(spec)[hop - 1]
        carried = f"Carrying objects: {'printer_0' if state.shows == 'carried' else 'None'}."
        told = {
            "floor": f"moving {name}, I am at {where}",
            "pickup_error": f"picking fails, since there is no printer to take beside {where}",
            "drop_error": f"dropping fails, since there is nothing to put on a table beside {where}",
            "none": f"toggling does nothing at {where}",
            "success": f"toggling from {where} switches the printer on",
        }.get(state.event, f"moving {name}, I run into the {state.event} and stay at {where}")
        if name in ("pick", "drop") and state.event in ("printer", "table"):
            told = (
                f"I pick the printer up at {where}"
                if name == "pick"
                else f"I put the printer on the table from {where}"
            )
        return f"In step {hop}, {told}. {carried}"
