"""Minibehavior's rooms: what actions do in them, rooms at random, and lists of actions that lead somewhere.

A world is a dict of `walls` (n rows of 0 and 1), `start`, `printer` and `table`, each a cell as [row, column].
"""

from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from mmroute.tasks._grid import DELTA, Cell, neighbours, step

__all__ = [
    "CLASSES",
    "DROP",
    "PICK",
    "TOGGLE",
    "Moment",
    "around",
    "classes_of",
    "crossed",
    "draw_errand",
    "draw_lists",
    "draw_room",
    "met",
    "outcome",
    "run",
    "within",
]

CLASSES = ("success", "drop_error", "pickup_error", "missing_step")
PICK, DROP, TOGGLE = 4, 5, 6
_ERRANDS = {
    PICK: ("floor", "carried", "printer", "pickup_error"),
    DROP: ("carried", "table", "table", "drop_error"),
    TOGGLE: ("table", "on", "success", "none"),
}
"""Action -> where the printer has to be, where it is then, the word for it, and the word for a failure."""
_LISTS, _COPIES, _SLACK = 60, 4, 2
_DERANGED = tuple(p for p in permutations(range(len(CLASSES))) if all(i != j for i, j in enumerate(p)))


class Moment(NamedTuple):
    """Where everything is after a step."""

    agent: Cell
    printer: str
    """`floor`, `carried`, `table` or `on`."""
    event: str
    """What the action met, as a word of the chain."""
    seen: Cell
    """The cell that the action looked at."""


def run(world: dict[str, Any], actions: list[int]) -> list[Moment]:
    """All moments, the start first, until an error, success, or the end of the list."""
    out = [_begin(world)]
    for action in actions:
        out.append(_after(world, out[-1], action))
        if out[-1].event in CLASSES:
            break
    return out


def _begin(world: dict[str, Any]) -> Moment:
    start = tuple(world["start"])
    return Moment(start, "floor", "start", start)


def outcome(moments: list[Moment]) -> int:
    """Index of the class of a run."""
    last = moments[-1].event
    return CLASSES.index(last) if last in CLASSES else CLASSES.index("missing_step")


def _after(world: dict[str, Any], now: Moment, action: int) -> Moment:
    if action < PICK:
        target = step(now.agent, action)
        event = met(world, now.printer, target)
        return Moment(target if event == "floor" else now.agent, now.printer, event, target)
    goal = tuple(world["printer" if action == PICK else "table"])
    is_beside = _apart(goal, now.agent) == 1
    before, then, event, fault = _ERRANDS[action]
    if now.printer == before and is_beside:
        return Moment(now.agent, then, event, goal)
    return Moment(now.agent, now.printer, fault, now.agent)


def met(world: dict[str, Any], printer: str, cell: Cell) -> str:
    """What stands in a cell, as a word of the chain, where the printer is `floor`, `carried`, `table` or `on`."""
    if world["walls"][cell[0]][cell[1]]:
        return "wall"
    if list(cell) == world["table"]:
        return "table"
    return "printer" if printer == "floor" and list(cell) == world["printer"] else "floor"


def draw_room(rng: np.random.Generator, n: int) -> tuple[list[list[int]], Cell]:
    """Walls around and here and there inside, and a free cell to start from."""
    walls = (rng.random((n, n)) < 0.06).astype(int)
    walls[0], walls[-1], walls[:, 0], walls[:, -1] = 1, 1, 1, 1
    start = (int(rng.integers(1, n - 1)), int(rng.integers(1, n - 1)))
    walls[start] = 0
    return walls.tolist(), start


def within(walls: list[list[int]], start: Cell, most: int) -> list[Cell]:
    """Free cells other than the start, at most that far from it."""
    n = len(walls)
    cells = [(r, c) for r in range(n) for c in range(n) if not walls[r][c] and (r, c) != start]
    return [c for c in cells if _apart(c, start) <= most]


def around(cells: list[Cell], centre: Cell) -> list[Cell]:
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
        came: dict[Cell, tuple[Cell, int] | None] = {self.now.agent: None}
        n, target = len(self.world["walls"]), tuple(self.world[goal])
        todo = [self.now.agent]
        for cell in todo:
            if _apart(cell, target) == 1:
                way = []
                while (last := came[cell]) is not None:
                    cell, action = last
                    way.append(action)
                for action in reversed(way):
                    self.do(action)
                return True
            for a, q in neighbours(cell, n):
                if q not in came and met(self.world, self.now.printer, q) == "floor":
                    came[q] = cell, a
                    todo.append(q)
        return False


def draw_errand(rng: np.random.Generator, world: dict[str, Any], length: int, answer: int) -> list[int]:
    """A list of `length` actions or so that is likely to end in the class."""
    plan = _Plan(world, rng)
    fault = int(rng.integers(3))
    nearest = _apart(tuple(world["start"]), tuple(world["printer"])) - 1
    if answer and not fault:  # at once: a pick or a drop of nothing, or switching on nothing
        return [*plan.fill(length - 1).actions, {1: DROP, 2: PICK, 3: TOGGLE}[answer]]
    plan.stroll(length - 3 - nearest)
    if plan.walk("printer"):
        plan.do(PICK)
    if answer in (1, 2):  # a drop beside no table, or a second pick
        return [*plan.fill(length - 1).actions, DROP if answer == 1 else PICK]
    if answer == 3 and fault == 1:  # never dropped
        return plan.fill(length).actions
    if plan.walk("table"):
        plan.do(DROP)
    if answer == 3:  # never switched on, or from too far
        plan.fill(length - int(rng.integers(2)))
        return [*plan.actions, TOGGLE][:length]
    return [*(plan.fill(length - 1) if rng.random() < 0.5 else plan).actions, TOGGLE]


def draw_lists(rng: np.random.Generator, worlds: list[dict[str, Any]], length: int) -> list[list[int]]:
    """Whole errands in single rooms, and copies with a slip; what they do in the other rooms is seen afterwards.

    Pick, drop and toggle are the last things done, so that a list which fails at one of them in another room ends about
    `length` actions on there too.
    """
    out = []
    for _ in range(_LISTS):
        world = worlds[int(rng.integers(len(worlds)))]
        plan = _Plan(world, rng)
        nearest = _apart(tuple(world["start"]), tuple(world["printer"])) - 1
        plan.stroll(length - _SLACK - nearest)
        if not plan.walk("printer"):
            continue
        plan.do(PICK)
        plan.stroll(1)
        if not plan.walk("table"):
            continue
        plan.do(DROP)
        plan.stroll(2)  # in rooms where this leads away from the table the last step is missing
        plan.do(TOGGLE)
        # A copy costs a hundredth of a walk, and lists that differ a little are those that rooms can be crossed with.
        errands = [plan.actions, *(_slipped(rng, plan.actions) for _ in range(_COPIES))]
        out += [[*errand, *rng.integers(7, size=rng.integers(2)).tolist()] for errand in errands]
    return out


def _slipped(rng: np.random.Generator, actions: list[int]) -> list[int]:
    """The list with one or two moves drawn anew, or neighbouring actions exchanged."""
    out = list(actions)
    for _ in range(1 + int(rng.integers(2))):
        i = int(rng.integers(len(out) - 1))
        if out[i] < PICK and rng.random() < 0.6:
            out[i] = int(rng.integers(4))
        else:
            out[i], out[i + 1] = out[i + 1], out[i]
    return out


def classes_of(worlds: list[dict[str, Any]], lists: list[list[int]], length: int) -> Int[np.ndarray, "rooms lists"]:
    """Class of every list in every room, all at once; -1 where no end comes about `length` hops on.

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
        moves = going & (action < PICK)[None]
        target = np.where(moves, here + shift[np.clip(action, 0, 3)][None], here)
        free = (walls[target] == 0) & (target != table) & ((target != printer) | (held > 0))
        here = np.where(moves & free, target, here)
        for which, goal in ((PICK, printer), (DROP, table), (TOGGLE, table)):
            acts = going & (action == which)[None]
            does = acts & (held == which - PICK) & beside(goal)
            held = held + does
            if which == TOGGLE:
                label = np.where(does, 0, label)
                going = going & ~does
            else:
                label = np.where(acts & ~does, {PICK: 2, DROP: 1}[which], label)
                going = going & ~(acts & ~does)
    return np.where(abs(ended - length) <= _SLACK, label, -1)


def crossed(rng: np.random.Generator, label: Int[np.ndarray, "rooms lists"]) -> list[tuple[int, dict[int, int]]] | None:
    """Four rooms x two lists: each list has every class once, and no room has one class twice.

    Args:
        label: [room, list]: the class; -1 where the two do not go together.

    Returns:
        Of each room its number and {list: class}; None where the table holds no such eight.
    """
    is_class = label == np.arange(len(CLASSES))[:, None, None]
    able = np.flatnonzero(is_class.any(1).all(0))  # lists with every class in some room
    counted = is_class[..., able].astype(int)
    together = np.einsum("cwk,dwm->cdkm", counted, counted) > 0  # some room has c of list k and d of list m
    found = [
        (k, m, swap)
        for swap in _DERANGED
        for k, m in np.argwhere(np.logical_and.reduce([together[c, d] for c, d in enumerate(swap)]))
    ]
    if not found:
        return None
    k, m, swap = found[int(rng.integers(len(found)))]
    k, m = int(able[k]), int(able[m])
    rooms = [np.flatnonzero(is_class[c, :, k] & is_class[d, :, m]) for c, d in enumerate(swap)]
    return [(int(rng.choice(fitting)), {k: c, m: swap[c]}) for c, fitting in enumerate(rooms)]
