"""FrozenLake: does a list of moves reach the gift, fall into a hole, or neither?

Rules: never slippery; a move off the board stays; the run stops at the first hole or at the gift, and up to two listed
actions after that are not executed, which hides the length. Our generators list no move off the board: on a canvas its
cell may have no coordinate word.

Source: the task of MVoT (arXiv 2501.07542) and of gymnasium's FrozenLake; quads, class stream and texts are ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int
from PIL import Image

from mmroute.tasks import _mvot_skin, _skins
from mmroute.tasks._grid import (
    Cell,
    Split,
    canonical,
    inside,
    layout_hash,
    neighbours,
    only,
    reachable,
    replay,
    reverse,
    split_of,
    step,
)
from mmroute.tasks._listed import Listed
from mmroute.tasks._presets import Preset
from mmroute.tasks._prompts import Question
from mmroute.tasks._texts import MOVES
from mmroute.tasks.base import Card, Choice, Spec, State

__all__ = ["FrozenLake"]

_ICE, _HOLE, _FIGURE, _GIFT, _LEFT, _FALLEN, _REACHED = range(_skins.LAKE, _skins.LAKE + 7)
_CLASSES = ("success", "hole_fall", "not_reached")
_PAIRS = ((0, 1), (0, 2), (1, 2))
_MAPS, _LISTS, _TRIES = 32, 40, 800


def run(grid: list[list[int]], start: Cell, goal: Cell, actions: list[int]) -> list[Cell]:
    """The cells visited, the start first, until a hole, the goal or the end of the list."""

    def go(cell: Cell, action: int) -> Cell:
        return q if inside(q := step(cell, action), len(grid)) else cell

    return replay(start, actions, go, lambda cell: cell == goal or bool(grid[cell[0]][cell[1]]))


def walk(rng: np.random.Generator, n: int, start: Cell, length: int, back: float = 0.2) -> tuple[list[Cell], list[int]]:
    """A walk that stays on the board and turns straight back with probability `back` at most."""
    path, actions = [start], list[int]()
    for _ in range(length):
        options = neighbours(path[-1], n)
        if actions and len(options) > 1 and rng.random() > back:
            options = tuple((a, q) for a, q in options if a != reverse(actions[-1]))
        a, q = options[int(rng.integers(len(options)))]
        actions.append(a)
        path.append(q)
    return path, actions


class FrozenLake(Listed):
    """Follow numbered moves over a frozen lake seen from above."""

    name = "frozenlake"
    task_id = 2
    variants = ("auto", "quad", "stream", "mvot")
    card: ClassVar[Card] = Card((), {"val": 2000, "test": 5000}, "CC0-1.0", "generate", "accuracy", 1 / 3)

    def layout_key(self, world: dict[str, Any]) -> str:
        """The layout is holes, start and goal."""
        return _key(world)

    # ------------------------------------------------------------------ drawing items

    def _draw(self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split) -> Spec:
        if self.variant == "mvot":
            return self._rollout(rng, preset, size, split)
        answer = int(rng.integers(3))  # once: re-drawing the class on rejection would skew the classes
        while True:
            world = _by_class(rng, size, length, answer)
            if world and split_of(key := _key(world)) == split:
                return self._finish(rng, preset, size, world, answer, key)

    def _rollout(self, rng: np.random.Generator, preset: Preset, size: int, split: Split) -> Spec:
        """Leaky on purpose, for comparison with papers: optimal, noisy and random policies on random maps."""
        while True:
            start, goal = (divmod(int(i), size) for i in rng.permutation(size * size)[:2])
            grid = _holes(rng, size, 0.2, (start, goal))
            best = _shortest(grid, start, goal)
            world = {"grid": grid, "start": list(start), "goal": list(goal)}
            if best is None or split_of(key := _key(world)) != split:
                continue
            policy = int(rng.integers(3))
            if policy == 2:
                actions = rng.integers(4, size=rng.integers(1, 2 * size + 1)).tolist()
            else:
                noise = rng.random(len(best)) < 0.25 * policy
                actions = [int(rng.integers(4)) if x else a for a, x in zip(best, noise, strict=True)]
            path = run(grid, start, goal, actions)
            if rng.random() < 0.5:
                actions = actions[: len(path) - 1]
            answer = outcome(grid, goal, path[-1])
            return self._finish(rng, preset, size, world | {"actions": actions}, answer, key)

    def _held_out(
        self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split, unit: int
    ) -> list[Spec]:
        """Two maps x two lists with classes [[x, y], [y, x]]: neither the map nor the list tells anything."""
        pair = _PAIRS[unit % 12 // 4]
        longest = max(self._pairs(preset, False))[1] if preset.hops[0] > 12 else min(2 * size, preset.hops[1])
        while True:
            start = divmod(int(rng.integers(size * size)), size)  # one for the pool, so that all walks stay on board
            maps = _pool(rng, size, start, split)
            if not maps:
                continue
            lists = [
                walk(rng, size, start, min(length + int(rng.integers(3)), max(longest, length))) for _ in range(_LISTS)
            ]
            label, actions = _labels(maps, lists, size, length), [listed for _, listed in lists]
            specs = self._crossed(rng, preset, size, maps, actions, label, pair)
            if specs is not None:
                return specs

    def _crossed(
        self,
        rng: np.random.Generator,
        preset: Preset,
        size: int,
        maps: Sequence[tuple[dict[str, Any], str]],
        lists: Sequence[list[int]],
        label: Int[np.ndarray, "maps lists"],
        pair: tuple[int, int],
    ) -> list[Spec] | None:
        """Two maps x two lists with classes [[x, y], [y, x]], in any order; None where the table holds no such four.

        Args:
            maps: what may be crossed, each with the hash of its layout.
            lists: of actions.
            label: [map, list]: the class; -1 where the two do not go together.
            pair: x and y.
        """
        x, y = pair
        is_x, is_y = label == x, label == y
        both = (is_x.astype(int) @ is_y.T.astype(int)) > 0  # [i, j]: some list has x on map i and y on map j
        found = np.argwhere(both & both.T)
        if not len(found):
            return None
        i, j = (int(v) for v in found[int(rng.integers(len(found)))])
        k = int(rng.choice(np.flatnonzero(is_x[i] & is_y[j])))
        m = int(rng.choice(np.flatnonzero(is_y[i] & is_x[j])))
        specs = []
        for which, answers in ((i, (x, y)), (j, (y, x))):
            world, key = maps[which]
            base = self._finish(rng, preset, size, world, 0, key)
            specs += [
                replace(base, world=world | {"actions": lists[listed]}, answer=answer)
                for listed, answer in zip((k, m), answers, strict=True)
            ]
        return [specs[int(p)] for p in rng.permutation(4)]

    # ------------------------------------------------------------------ what happens

    def trace(self, spec: Spec) -> list[State]:
        w = spec.world
        path = run(w["grid"], tuple(w["start"]), tuple(w["goal"]), w["actions"])
        return [State(cell, i, self._seen(spec, cell)[0]) for i, cell in enumerate(path)]

    def choices(self, spec: Spec) -> list[Choice]:
        return [Choice(label, text) for label, text in zip("ABC", _CLASSES, strict=True)]

    def _answer_word(self, spec: Spec) -> str:
        return _CLASSES[spec.answer]

    def _seen(self, spec: Spec, cell: Cell) -> list[str]:
        w = spec.world
        if list(cell) == list(w["goal"]):
            return ["goal"]
        return ["start" if list(cell) == list(w["start"]) else "hole" if w["grid"][cell[0]][cell[1]] else "ice"]

    def _unique(self, spec: Spec) -> list[tuple[list[str], Cell]]:
        return [(["start"], tuple(spec.world["start"])), (["goal"], tuple(spec.world["goal"]))]

    def _looked_at(self, spec: Spec, hop: int) -> Iterable[Cell]:
        trace = self.trace(spec)
        if hop == len(trace):
            return [tuple(spec.world["goal"])]
        cells = [trace[i].cell for i in ((hop - 1, hop) if hop else (0,))]
        return [c for c in cells if c is not None]

    def _decisive(self, spec: Spec) -> Iterable[Cell]:
        start = tuple(spec.world["start"])
        return [(r, c) for r in range(spec.n) for c in range(spec.n) if (r, c) != start]

    # ------------------------------------------------------------------ pictures

    def _board_codes(self, spec: Spec, state: State | None) -> Int[np.ndarray, "n n"]:
        w = spec.world
        codes = np.where(np.array(w["grid"]) == 1, _HOLE, _ICE).astype(np.int16)
        codes[tuple(w["start"])] = _LEFT
        codes[tuple(w["goal"])] = _GIFT
        at = tuple(w["start"]) if state is None or state.cell is None else state.cell
        codes[at] = {_HOLE: _FALLEN, _GIFT: _REACHED}.get(int(codes[at]), _FIGURE)
        return codes

    def _read(self, codes: Int[np.ndarray, "n n"], spec: Spec) -> State:
        return State(only(np.isin(codes, (_FIGURE, _FALLEN, _REACHED))))

    def _mvot(self, spec: Spec, state: State) -> Image.Image:
        assert state.cell is not None
        facing = MOVES[spec.world["actions"][state.step - 1]] if state.step else "down"
        return _mvot_skin.lake_picture(spec.world, state.cell, facing)

    # ------------------------------------------------------------------ texts

    def ask(self, spec: Spec) -> Question:
        return Question(
            scene="The picture shows a frozen lake from above: ice, holes, a figure at the start and a gift at the "
            "goal.",
            rules="Each move takes the figure to the next cell; a move off the board does nothing. It stops when it "
            "falls into a hole or reaches the gift.",
            given=f"Moves: {', '.join(self.moves(spec))}.",
            asked="What happens?",
            options=(
                "A. It reaches the gift.",
                "B. It falls into a hole.",
                "C. It stays safe but does not reach the gift.",
            ),
            instruction="Answer with the option's letter.",
        )

    def _told(self, spec: Spec, hop: int, state: State) -> str:
        assert state.cell is not None
        where, move = f"row {state.cell[0]} column {state.cell[1]}", self.moves(spec)[hop - 1]
        what = {"ice": "safe ice", "hole": "a hole", "goal": "the gift", "start": "the start, safe ice"}[state.event]
        return f"After step {hop}, moving {move}, I am at {where}, which is {what}."


def _key(world: dict[str, Any]) -> str:
    """The layout is holes, start and goal."""
    board = np.array(world["grid"])
    board[tuple(world["start"])] = 2
    board[tuple(world["goal"])] = 3
    return layout_hash("frozenlake", len(board), canonical(board))


def _holes(rng: np.random.Generator, n: int, share: float, free: Iterable[Cell]) -> list[list[int]]:
    grid = (rng.random((n, n)) < share).astype(int)
    for cell in free:
        grid[cell] = 0
    return grid.tolist()


def _by_class(rng: np.random.Generator, n: int, length: int, answer: int) -> dict[str, Any] | None:
    """A lake whose list ends in the given class; None when this walk does not allow it."""
    path, actions = walk(rng, n, divmod(int(rng.integers(n * n)), n), length)
    cells = {(r, c) for r in range(n) for c in range(n)}
    goal: Cell | None
    hole: Cell | None = None
    if answer == 0:
        stop = length - int(rng.integers(min(3, length)))  # the last up to two actions come after the end
        goal, free = path[stop], set(path[: stop + 1])
        if goal in path[:stop]:
            return None
    elif answer == 1:
        fresh = [j for j in range(1, length + 1) if path[j] not in path[:j]]
        stop = fresh[int(rng.integers(len(fresh)))]
        free, hole = set(path[:stop]), path[stop]
        rest = sorted(cells - free - {hole})
        goal = rest[int(rng.integers(len(rest)))] if rest else None
    else:
        free = set(path)
        rest = sorted(cells - free)
        goal = rest[int(rng.integers(len(rest)))] if rest else None
    if goal is None:
        return None
    grid = _holes(rng, n, rng.uniform(0.15, 0.4), free | {goal})
    if hole:
        grid[hole[0]][hole[1]] = 1
    return {"grid": grid, "start": list(path[0]), "goal": list(goal), "actions": actions}


def _pool(rng: np.random.Generator, n: int, start: Cell, split: Split) -> list[tuple[dict[str, Any], str]]:
    """Maps of the split that share a start and whose goal can be reached, with their hashes."""
    maps: dict[str, dict[str, Any]] = {}
    for _ in range(_TRIES):  # small boards have fewer layouts than a full pool wants
        goal = divmod(int(rng.integers(n * n)), n)
        if goal == start:
            continue
        grid = _holes(rng, n, 0.25, (start, goal))
        world = {"grid": grid, "start": list(start), "goal": list(goal)}
        key = _key(world)
        if split_of(key) == split and goal in reachable(start, grid, n):
            maps.setdefault(key, world)
        if len(maps) == _MAPS:
            break
    return [(world, key) for key, world in maps.items()]


def _labels(
    maps: list[tuple[dict[str, Any], str]], lists: list[tuple[list[Cell], list[int]]], n: int, length: int
) -> Int[np.ndarray, "maps lists"]:
    """Class of every list on every map; -1 where the end comes not within one hop of `length`."""
    most = max(len(p) for p, _ in lists)
    paths = np.array([[r * n + c for r, c in [*p, *[p[0]] * (most - len(p))]] for p, _ in lists])
    kind = np.array([w["grid"] for w, _ in maps]).reshape(len(maps), -1)
    goals = [w["goal"][0] * n + w["goal"][1] for w, _ in maps]
    kind[np.arange(len(maps)), goals] = 2
    met = kind[:, paths]  # maps, lists, steps; padding repeats the start, where nothing is met
    first = (met > 0).argmax(2)
    what = np.take_along_axis(met, first[..., None], 2)[..., 0]
    label = np.choose(what, (2, 1, 0))  # nothing met: C; hole: B; goal: A
    return np.where((what > 0) & (np.abs(first - length) > 1), -1, label)


def outcome(grid: list[list[int]], goal: Cell, end: Cell) -> int:
    """Index of the class of a run that ends at a cell."""
    return 0 if end == goal else 1 if grid[end[0]][end[1]] else 2


def _shortest(grid: list[list[int]], start: Cell, goal: Cell) -> list[int] | None:
    """Moves of a shortest safe way; None without one."""
    ways: dict[Cell, list[int]] = {start: []}
    todo = [start]
    for cell in todo:
        if cell == goal:
            return ways[cell]
        for a, q in neighbours(cell, len(grid)):
            if q not in ways and not grid[q[0]][q[1]]:
                ways[q] = [*ways[cell], a]
                todo.append(q)
    return None
