"""Minibehavior: does a list of moves, pick, drop and toggle bring the printer to the table and switch it on?

Rules: a room with walls around it and some inside. A move into a wall, the table or the printer stays. `pick` takes the
printer from one of the four neighbouring cells, `drop` puts it on the table in one of them, `toggle` beside the table
switches it on. A pick or a drop that cannot be done is an error and ends the run; so does success; up to two listed
actions after that are not executed. Whatever ends without an error and without a printer that is on lacks a step.
Held-out items are quads as in FrozenLake: two rooms x two lists with the answers [[x, y], [y, x]].

Source: the task of MVoT (arXiv 2501.07542), after Mini-BEHAVIOR's printer; rooms, quads and texts are ours.
Deviates: MVoT's loader and the wording of its options are not released; option D and where a drop is allowed are ours.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from mmroute.tasks import _skins
from mmroute.tasks._grid import DELTA, Cell, Split, canonical, layout_hash, neighbours, only, split_of, step
from mmroute.tasks._listed import Listed
from mmroute.tasks._presets import Preset
from mmroute.tasks._prompts import Question
from mmroute.tasks._texts import MOVES
from mmroute.tasks.base import Card, Choice, Spec, State

__all__ = ["MiniBehavior"]

_FLOOR, _WALL, _PRINTER, _TABLE, _LOADED, _ON, _AGENT, _CARRIER, _LEFT = range(_skins.ROOM, _skins.ROOM + 9)
_CLASSES = ("success", "drop_error", "pickup_error", "missing_step")
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_PICK, _DROP, _TOGGLE = 4, 5, 6
_ERRANDS = {
    _PICK: ("floor", "carried", "printer", "pickup_error"),
    _DROP: ("carried", "table", "table", "drop_error"),
    _TOGGLE: ("table", "on", "success", "none"),
}
"""Action -> where the printer has to be, where it is then, the word for it, and the word for a failure."""
_LISTS, _POOL, _PRINTERS, _TABLES, _TRIES, _SLACK = 120, 24, 6, 14, 24, 2
_LEAST_SIDE, _MOST_SIDE, _MOST_HOPS = 7, 10, 14


class _Moment(NamedTuple):
    """Where everything is after a step."""

    agent: Cell
    printer: str
    """`floor`, `carried`, `table` or `on`."""
    event: str
    """What the action met, as a word of the chain."""
    seen: Cell
    """The cell that the action looked at."""


def run(world: dict[str, Any], actions: list[int]) -> list[_Moment]:
    """All moments, the start first, until an error, success, or the end of the list."""
    out = [_begin(world)]
    for action in actions:
        out.append(_after(world, out[-1], action))
        if out[-1].event in _CLASSES:
            break
    return out


def _begin(world: dict[str, Any]) -> _Moment:
    start = tuple(world["start"])
    return _Moment(start, "floor", "start", start)


def outcome(moments: list[_Moment]) -> int:
    """Index of the class of a run."""
    last = moments[-1].event
    return _CLASSES.index(last) if last in _CLASSES else _CLASSES.index("missing_step")


def _after(world: dict[str, Any], now: _Moment, action: int) -> _Moment:
    if action < _PICK:
        target = step(now.agent, action)
        met = _met(world, now.printer, target)
        return _Moment(target if met == "floor" else now.agent, now.printer, met, target)
    goal = tuple(world["printer" if action == _PICK else "table"])
    is_beside = _apart(goal, now.agent) == 1
    before, then, event, fault = _ERRANDS[action]
    if now.printer == before and is_beside:
        return _Moment(now.agent, then, event, goal)
    return _Moment(now.agent, now.printer, fault, now.agent)


def _met(world: dict[str, Any], printer: str, cell: Cell) -> str:
    if world["walls"][cell[0]][cell[1]]:
        return "wall"
    if list(cell) == world["table"]:
        return "table"
    return "printer" if printer == "floor" and list(cell) == world["printer"] else "floor"


class MiniBehavior(Listed):
    """Carry out an errand in the head: walk, pick up, put down, switch on."""

    name = "minibehavior"
    task_id = 5
    action_names = (*MOVES, "pick", "drop", "toggle")
    card: ClassVar[Card] = Card((), {"val": 2000, "test": 5000}, "CC0-1.0", "generate", "accuracy", 0.25)

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({n for n, _ in self._fitting(self.preset, True)}))

    def max_length(self, size: int) -> int:
        return min(_MOST_HOPS, self.preset.hops[1])

    def _pairs(self, preset: Preset, streams: bool) -> list[tuple[int, int]]:
        sides = range(_LEAST_SIDE, min(_MOST_SIDE, preset.canvas) + 1)
        least = 3 if streams else 4  # three actions are too few for two rooms in which both lists go both ways
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
        answer = int(rng.integers(0 if length >= 3 else 1, len(_CLASSES)))
        while True:
            walls, start = _room(rng, size)
            cells = _within(walls, start, max(length - 1, 2))
            if len(cells) < 2:
                continue
            printer, table = (cells[int(i)] for i in rng.permutation(len(cells))[:2])
            world = {"walls": walls, "start": list(start), "printer": list(printer), "table": list(table)}
            key = self.layout_key(world)
            if split_of(key) != split:
                continue
            for _ in range(_TRIES):
                actions = _errand(rng, world, length, answer)
                moments = run(world, actions)
                if len(moments) - 1 == length and outcome(moments) == answer:
                    unused = rng.integers(7, size=rng.integers(3)).tolist() if moments[-1].event in _CLASSES else []
                    return self._finish(rng, preset, size, world | {"actions": [*actions, *unused]}, answer, key)

    def _held_out(
        self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split, unit: int
    ) -> list[Spec]:
        x, y = _PAIRS[unit % len(_PAIRS)]
        while True:
            rooms = self._rooms(rng, size, length, split)
            if len(rooms) < 2:
                continue
            lists = _lists(rng, [world for world, _ in rooms], length, (x, y))
            label = _labels([world for world, _ in rooms], lists, length)
            is_x, is_y = label == x, label == y
            both = (is_x.astype(int) @ is_y.T.astype(int)) > 0  # [i, j]: some list has x in room i and y in room j
            found = np.argwhere(both & both.T)
            if not len(found):
                continue
            i, j = (int(v) for v in found[int(rng.integers(len(found)))])
            k = int(rng.choice(np.flatnonzero(is_x[i] & is_y[j])))
            m = int(rng.choice(np.flatnonzero(is_y[i] & is_x[j])))
            specs = []
            for room, answers in ((i, (x, y)), (j, (y, x))):
                world, key = rooms[room]
                base = self._finish(rng, preset, size, world, 0, key)
                specs += [
                    dataclasses.replace(base, world=world | {"actions": lists[which]}, answer=answer)
                    for which, answer in zip((k, m), answers, strict=True)
                ]
            return [specs[int(p)] for p in rng.permutation(4)]

    def _rooms(self, rng: np.random.Generator, n: int, length: int, split: Split) -> list[tuple[dict[str, Any], str]]:
        """Rooms of the split with the same walls and start, whose printers and tables stand close to each other.

        Close, because a list has to do something in two rooms.
        """
        walls, start = _room(rng, n)
        cells = _within(walls, start, length)
        if not cells:
            return []
        printers = _around(cells, cells[int(rng.integers(len(cells)))])[:_PRINTERS]
        tables = _around(cells, cells[int(rng.integers(len(cells)))])[:_TABLES]
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
        return [Choice(label, text) for label, text in zip("ABCD", _CLASSES, strict=True)]

    def _answer_word(self, spec: Spec) -> str:
        return _CLASSES[spec.answer]

    def _seen(self, spec: Spec, cell: Cell) -> list[str]:
        return ["start" if list(cell) == spec.world["start"] else _met(spec.world, "floor", cell)]

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
        stayed = spec.world["actions"][hop - 1] < _PICK and moment.event != "floor"
        return [self.at(spec, moment.seen), moment.event, *([self.at(spec, here)] if stayed else [])]

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


# ---------------------------------------------------------------------- rooms and errands


def _room(rng: np.random.Generator, n: int) -> tuple[list[list[int]], Cell]:
    """Walls around and here and there inside, and a free cell to start from."""
    walls = (rng.random((n, n)) < 0.06).astype(int)
    walls[0], walls[-1], walls[:, 0], walls[:, -1] = 1, 1, 1, 1
    start = (int(rng.integers(1, n - 1)), int(rng.integers(1, n - 1)))
    walls[start] = 0
    return walls.tolist(), start


def _within(walls: list[list[int]], start: Cell, most: int) -> list[Cell]:
    """Free cells other than the start, at most that far from it."""
    n = len(walls)
    cells = [(r, c) for r in range(n) for c in range(n) if not walls[r][c] and (r, c) != start]
    return [c for c in cells if _apart(c, start) <= most]


def _around(cells: list[Cell], centre: Cell) -> list[Cell]:
    """The cells, nearest first."""
    return sorted(cells, key=lambda cell: _apart(cell, centre))


def _apart(a: Cell, b: Cell) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


class _Plan:
    """A list of actions in the making, with where it has led so far."""

    def __init__(self, world: dict[str, Any], rng: np.random.Generator) -> None:
        self.world, self.rng = world, rng
        self.actions: list[int] = []
        self.now = _begin(world)

    def do(self, action: int) -> None:
        self.actions.append(action)
        self.now = _after(self.world, self.now, action)

    def stroll(self, most: int) -> None:
        """Up to `most` moves anywhere."""
        for _ in range(int(self.rng.integers(max(most, 0) + 1))):
            self.do(int(self.rng.integers(4)))

    def fill(self, length: int) -> "_Plan":
        """Moves anywhere until there are that many actions; of more only the first are kept."""
        while len(self.actions) < length:
            self.do(int(self.rng.integers(4)))
        self.actions = self.actions[:length]
        return self

    def walk(self, goal: str) -> bool:
        """A shortest way to a cell beside printer or table; False without one."""
        ways: dict[Cell, list[int]] = {self.now.agent: []}
        target = tuple(self.world[goal])
        todo = [self.now.agent]
        for cell in todo:
            if _apart(cell, target) == 1:
                for action in ways[cell]:
                    self.do(action)
                return True
            for a, q in neighbours(cell, len(self.world["walls"])):
                if q not in ways and _met(self.world, self.now.printer, q) == "floor":
                    ways[q] = [*ways[cell], a]
                    todo.append(q)
        return False


def _errand(rng: np.random.Generator, world: dict[str, Any], length: int, answer: int) -> list[int]:
    """A list of `length` actions or so that is likely to end in the class."""
    plan = _Plan(world, rng)
    fault = int(rng.integers(3))
    nearest = _apart(tuple(world["start"]), tuple(world["printer"])) - 1
    if answer and not fault:  # at once: a pick or a drop of nothing, or switching on nothing
        return [*plan.fill(length - 1).actions, {1: _DROP, 2: _PICK, 3: _TOGGLE}[answer]]
    plan.stroll(length - 3 - nearest)
    if plan.walk("printer"):
        plan.do(_PICK)
    if answer in (1, 2):  # a drop beside no table, or a second pick
        return [*plan.fill(length - 1).actions, _DROP if answer == 1 else _PICK]
    if answer == 3 and fault == 1:  # never dropped
        return plan.fill(length).actions
    if plan.walk("table"):
        plan.do(_DROP)
    if answer == 3:  # never switched on, or from too far
        plan.fill(length - int(rng.integers(2)))
        return [*plan.actions, _TOGGLE][:length]
    return [*(plan.fill(length - 1) if rng.random() < 0.5 else plan).actions, _TOGGLE]


def _lists(
    rng: np.random.Generator, worlds: list[dict[str, Any]], length: int, answers: tuple[int, int]
) -> list[list[int]]:
    """Lists made for single rooms and classes; what they do in the other rooms is seen afterwards."""
    out = []
    for i in range(_LISTS):
        world = worlds[int(rng.integers(len(worlds)))]
        actions = _errand(rng, world, max(length + int(rng.integers(-1, 2)), 2), answers[i % 2])
        # Where this room's run ends early, another class may be decided later.
        out.append([*actions, *rng.integers(7, size=rng.integers(3)).tolist()])
    return out


def _labels(worlds: list[dict[str, Any]], lists: list[list[int]], length: int) -> Int[np.ndarray, "rooms lists"]:
    """Class of every list in every room, all at once; -1 where it is not decided about `length` hops on.

    The same rules as `run`, on arrays: rooms that share their walls and start.
    """
    n, walls = len(worlds[0]["walls"]), np.array(worlds[0]["walls"]).reshape(-1)
    places = [np.array([w[what][0] * n + w[what][1] for w in worlds])[:, None] for what in ("printer", "table")]
    printer, table = places
    shift = np.array([n * d + r for d, r in DELTA])
    shape = (len(worlds), len(lists))
    here = np.full(shape, worlds[0]["start"][0] * n + worlds[0]["start"][1])
    held, ended, label = np.zeros(shape, dtype=int), np.zeros(shape, dtype=int), np.full(shape, 3)
    going = np.ones(shape, dtype=bool)
    longest = max(map(len, lists))
    padded = np.array([[*actions, *[-1] * (longest - len(actions))] for actions in lists])

    def beside(cell: Int[np.ndarray, "rooms 1"]) -> Bool[np.ndarray, "rooms lists"]:
        return abs(here // n - cell // n) + abs(here % n - cell % n) == 1

    for action in padded.T:
        going = going & (action >= 0)[None]
        ended += going
        moves = going & (action < _PICK)[None]
        target = np.where(moves, here + shift[np.clip(action, 0, 3)][None], here)
        free = (walls[target] == 0) & (target != table) & ((target != printer) | (held > 0))
        here = np.where(moves & free, target, here)
        for which, goal in ((_PICK, printer), (_DROP, table), (_TOGGLE, table)):
            acts = going & (action == which)[None]
            does = acts & (held == which - _PICK) & beside(goal)
            held = held + does
            if which == _TOGGLE:
                label = np.where(does, 0, label)
                going = going & ~does
            else:
                label = np.where(acts & ~does, {_PICK: 2, _DROP: 1}[which], label)
                going = going & ~(acts & ~does)
    lengths = np.array([len(actions) for actions in lists])[None]
    return np.where((abs(ended - length) <= _SLACK) & (lengths - ended <= 2), label, -1)
