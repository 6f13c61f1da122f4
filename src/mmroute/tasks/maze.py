"""Maze: at which coloured plate does a list of moves end, when moves into walls do nothing?

`walls = tiles` makes a wall one look-up, as a hole is; `walls = edges` draws lines between cells, which small models do
not learn to read. Held-out items are permutation quads: two boards x two lists, the second list a permutation of the
first, four distinct ends that are the four plates. So neither the list, nor its displacement, nor the picture tells.
`mvot` is the published rule (simple path, legal moves only): start plus displacement solves it, walls are decoration.

Source: the task of MVoT (arXiv 2501.07542); blocked moves, wall tiles and quads are ours.
"""

import dataclasses
import math
from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Int
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
    spanning_tree,
    split_of,
    step,
    turn_moves,
)
from mmroute.tasks._listed import Listed
from mmroute.tasks._presets import Preset
from mmroute.tasks._prompts import Question
from mmroute.tasks.base import Card, Choice, Spec, State

__all__ = ["Maze"]

_FREE, _START, _AGENT, _LEFT, _PLATE = range(5)
_BOARDS, _SHUFFLES = 16, 24


def passable(world: dict[str, Any], cell: Cell, move: int) -> bool:
    """Whether the move leads anywhere: no wall and not off the board."""
    board, target = world["board"], step(cell, move)
    if world["walls"] == "edges":
        return not board[cell[0]][cell[1]] >> move & 1
    return inside(target, len(board)) and not board[target[0]][target[1]]


def run(world: dict[str, Any], start: Cell, actions: list[int]) -> list[Cell]:
    """The cells the agent is on, the start first; a blocked move stays."""
    return replay(start, actions, lambda cell, a: step(cell, a) if passable(world, cell, a) else cell)


class Maze(Listed):
    """Follow numbered moves through a maze seen from above."""

    name = "maze"
    task_id = 1
    variants = ("auto", "quad", "stream", "mvot")
    card: ClassVar[Card] = Card((), {"val": 2000, "test": 5000}, "CC0-1.0", "generate", "accuracy", 0.25)

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if self.preset.blocked == 0:  # nothing may be blocked: the published rule
            self.variant = "mvot"
        self.walls = "edges" if self.variant == "mvot" else self.config.walls

    def _pairs(self, preset: Preset, streams: bool) -> list[tuple[int, int]]:
        pairs = super()._pairs(preset, streams)
        # 3 x 3 boards have too few layouts to hold any out; three moves have no four distinct ends
        return pairs if streams else [(n, h) for n, h in pairs if n >= 4 and h >= 4]

    def layout_key(self, world: dict[str, Any]) -> str:
        """The layout is the walls alone."""
        return _key(world["walls"], world["board"])

    # ------------------------------------------------------------------ drawing items

    def _board(self, rng: np.random.Generator, n: int, start: Cell) -> list[list[int]] | None:
        """A random board on which `start` is free; None if its free part is too small."""
        return spanning_tree(rng, n) if self.walls == "edges" else _tiles(rng, n, start)

    def _draw(self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split) -> Spec:
        while True:
            start = divmod(int(rng.integers(size * size)), size)
            board = self._board(rng, size, start)
            if board is None or split_of(key := _key(self.walls, board)) != split:
                continue
            world = {"walls": self.walls, "board": board, "start": list(start)}
            blocked = 0.0 if self.variant == "mvot" else preset.blocked
            actions = _walk(rng, world, start, length, blocked, simple=self.variant == "mvot")
            if actions is None or (end := run(world, start, actions)[-1]) == start:
                continue
            free = _free(world)
            others = [c for c in free if c not in (start, end)]
            if len(others) < 3:
                continue
            answer = int(rng.integers(4))
            plates = [others[int(i)] for i in rng.permutation(len(others))[:3]]
            plates.insert(answer, end)
            world |= {"plates": [list(c) for c in plates], "actions": actions}
            return self._finish(rng, preset, size, world, answer, key)

    def _held_out(
        self, rng: np.random.Generator, preset: Preset, size: int, length: int, split: Split, unit: int
    ) -> list[Spec]:
        while True:
            start = divmod(int(rng.integers(size * size)), size)
            boards = self._pool(rng, size, start, split)
            found = _quad(rng, boards, start, length) if len(boards) > 1 else None
            if found is None:
                continue
            pair, lists, ends = found
            letters = [int(x) for x in rng.permutation(4)]  # plate of end 2 * board + list
            plates = [[0, 0]] * 4
            for which, end in zip(letters, ends, strict=True):
                plates[which] = list(end)
            specs = []
            for b in range(2):
                world, key = pair[b]
                base = self._finish(rng, preset, size, world | {"plates": plates}, 0, key)
                specs += [
                    dataclasses.replace(base, world=base.world | {"actions": lists[k]}, answer=letters[2 * b + k])
                    for k in range(2)
                ]
            return [specs[int(i)] for i in rng.permutation(4)]

    def _pool(self, rng: np.random.Generator, n: int, start: Cell, split: Split) -> list[tuple[dict[str, Any], str]]:
        """Boards of the split that share a start, with their hashes."""
        boards: dict[str, dict[str, Any]] = {}
        for _ in range(40 * _BOARDS):
            board = self._board(rng, n, start)
            if board is None or split_of(key := _key(self.walls, board)) != split:
                continue
            boards.setdefault(key, {"walls": self.walls, "board": board, "start": list(start)})
            if len(boards) == _BOARDS:
                break
        return [(world, key) for key, world in boards.items()]

    # ------------------------------------------------------------------ what happens

    def trace(self, spec: Spec) -> list[State]:
        path = run(spec.world, tuple(spec.world["start"]), spec.world["actions"])
        out = [State(path[0], 0, "start")]
        for i, cell in enumerate(path[1:], start=1):
            out.append(State(cell, i, "wall" if cell == path[i - 1] else self._seen(spec, cell)[0]))
        return out

    def choices(self, spec: Spec) -> list[Choice]:
        return [Choice(label) for label in "ABCD"]

    def _seen(self, spec: Spec, cell: Cell) -> list[str]:
        w = spec.world
        if list(cell) in w["plates"]:
            return ["ABCD"[w["plates"].index(list(cell))]]
        if list(cell) == list(w["start"]):
            return ["start"]
        return ["wall" if w["walls"] == "tiles" and w["board"][cell[0]][cell[1]] else "free"]

    def _unique(self, spec: Spec) -> list[tuple[list[str], Cell]]:
        plates = [([label], tuple(p)) for label, p in zip("ABCD", spec.world["plates"], strict=True)]
        return [(["start"], tuple(spec.world["start"])), *plates]

    def _looked_at(self, spec: Spec, hop: int) -> Iterable[Cell]:
        trace = self.trace(spec)
        if hop == len(trace):
            return [tuple(p) for p in spec.world["plates"]]
        here = trace[max(hop - 1, 0)].cell
        assert here is not None
        target = step(here, spec.world["actions"][hop - 1]) if hop else here
        return [here, target] if inside(target, spec.n) else [here]

    def _decisive(self, spec: Spec) -> Iterable[Cell]:
        return [tuple(p) for p in spec.world["plates"]]

    # ------------------------------------------------------------------ pictures

    def _board_codes(self, spec: Spec, state: State | None) -> Int[np.ndarray, "n n"]:
        w = spec.world
        board = np.array(w["board"], dtype=np.int16)
        what = np.zeros_like(board)
        what[tuple(w["start"])] = _LEFT
        for i, plate in enumerate(w["plates"]):
            what[tuple(plate)] = _PLATE + i
        start = tuple(w["start"])
        at = start if state is None or state.cell is None else state.cell
        what[at] = _START if at == start else _AGENT
        if w["walls"] == "edges":
            return (_skins.MAZE + 8 * board + what).astype(np.int16)
        return np.where(board == 1, _skins.MAZE_WALL, _skins.MAZE + what).astype(np.int16)

    def _read(self, codes: Int[np.ndarray, "n n"], spec: Spec) -> State:
        inside_maze = (codes >= _skins.MAZE) & (codes < _skins.ARROWS)
        return State(only(inside_maze & np.isin((codes - _skins.MAZE) % 8, (_START, _AGENT))))

    def _mvot(self, spec: Spec, state: State) -> Image.Image:
        walked = run(spec.world, tuple(spec.world["start"]), spec.world["actions"][: state.step])
        return _mvot_skin.maze_picture(spec.world, walked)

    # ------------------------------------------------------------------ texts

    def _step_words(self, spec: Spec, hop: int, here: Cell, state: State) -> list[str]:
        if state.event != "wall":
            return super()._step_words(spec, hop, here, state)
        target = step(here, spec.world["actions"][hop - 1])  # off the board there is no coordinate to write
        return [self.at(spec, target if inside(target, spec.n) else here), "wall", self.at(spec, here)]

    def ask(self, spec: Spec) -> Question:
        return Question(
            scene="The picture shows a maze from above, with the start as a red disc and four plates A, B, C and D.",
            rules="Each move takes the agent to the next cell; a move into a wall or off the board does nothing.",
            given=f"Moves: {', '.join(self.moves(spec))}.",
            asked="At which plate does it end?",
            options=tuple(f"{label}. Plate {label}" for label in "ABCD"),
            instruction="Answer with the option's letter.",
        )

    def _told(self, spec: Spec, hop: int, state: State) -> str:
        assert state.cell is not None
        where, move = f"row {state.cell[0]} column {state.cell[1]}", self.moves(spec)[hop - 1]
        if state.event == "wall":
            return f"Step {hop}, moving {move}, is blocked by a wall, so I stay at {where}."
        what = {"free": "a free cell", "start": "the start"}.get(state.event, f"plate {state.event}")
        return f"After step {hop}, moving {move}, I am at {where}, which is {what}."


@cache
def _edge_table() -> Int[np.ndarray, "G 16"]:
    """[g, walls]: the wall bits of a cell after symmetry g."""
    moves = turn_moves()
    return np.array([[sum(1 << moves[g, a] for a in range(4) if w >> a & 1) for w in range(16)] for g in range(8)])


def _key(walls: str, board: list[list[int]]) -> str:
    """The layout is the walls alone."""
    table = _edge_table() if walls == "edges" else None
    return layout_hash(f"maze-{walls}", len(board), canonical(np.array(board), table))


def _tiles(rng: np.random.Generator, n: int, start: Cell) -> list[list[int]] | None:
    """Wall tiles with probability .3; what the start cannot reach is wall too."""
    grid = rng.random((n, n)) < 0.3
    grid[start] = False
    free = reachable(start, grid.tolist(), n)
    if len(free) < max(6, 0.45 * n * n):
        return None
    return [[int((r, c) not in free) for c in range(n)] for r in range(n)]


def _free(world: dict[str, Any]) -> list[Cell]:
    n = len(world["board"])
    cells = [(r, c) for r in range(n) for c in range(n)]
    return cells if world["walls"] == "edges" else [(r, c) for r, c in cells if not world["board"][r][c]]


def _walk(
    rng: np.random.Generator, world: dict[str, Any], start: Cell, length: int, blocked: float, simple: bool = False
) -> list[int] | None:
    """Listed moves, none off the board; into a wall with probability `blocked`, straight back only when forced.

    Args:
        simple: no move may go back at all; None when the way ends early.
    """
    n, here, actions, last = len(world["board"]), start, list[int](), -1
    for _ in range(length):
        options = neighbours(here, n)
        closed = [a for a, _ in options if not passable(world, here, a)]
        opened = [a for a, _ in options if passable(world, here, a)]
        onward = [a for a in opened if last < 0 or a != reverse(last)]
        if closed and rng.random() < blocked:
            actions.append(closed[int(rng.integers(len(closed)))])
            continue
        if simple and not onward:
            return None
        choice = onward or opened
        last = choice[int(rng.integers(len(choice)))]
        actions.append(last)
        here = step(here, last)
    return actions


@cache
def _targets(n: int) -> Int[np.ndarray, "S 4"]:
    """[cell, move]: the number of the cell that a move leads to; -1 off the board."""
    cells = [step((r, c), a) for r in range(n) for c in range(n) for a in range(4)]
    return np.array([r * n + c if inside((r, c), n) else -1 for r, c in cells]).reshape(n * n, 4)


def _ways(boards: list[tuple[dict[str, Any], str]]) -> Int[np.ndarray, "B S 4"]:
    """[board, cell, move]: where the agent is after the move, as `passable` says."""
    walls = np.array([world["board"] for world, _ in boards]).reshape(len(boards), -1)
    target = _targets(len(boards[0][0]["board"]))
    if boards[0][0]["walls"] == "edges":
        free = (walls[..., None] >> np.arange(4) & 1) == 0
    else:
        free = (target >= 0) & (walls[:, target] == 0)
    return np.where(free, target, np.arange(len(target))[:, None])


def _run_all(
    go: Int[np.ndarray, "B S 4"], start: int, lists: Int[np.ndarray, "K h"]
) -> tuple[Int[np.ndarray, "B K"], Int[np.ndarray, "B K"], Bool[np.ndarray, "B K"]]:
    """Ends (cell numbers), blocked moves, and whether no move points off the board, for B boards x K lists."""
    target = _targets(math.isqrt(go.shape[1]))
    rows = np.arange(len(go))[:, None]
    here = np.full((len(go), len(lists)), start)
    blocked, legal = np.zeros_like(here), np.ones(here.shape, dtype=bool)
    for move in lists.T:
        new = go[rows, here, move[None]]
        legal &= target[here, move[None]] >= 0
        blocked += new == here
        here = new
    return here, blocked, legal


def _quad(
    rng: np.random.Generator, boards: list[tuple[dict[str, Any], str]], start: Cell, length: int
) -> tuple[list[tuple[dict[str, Any], str]], list[list[int]], list[Cell]] | None:
    """Two boards and two lists, the second a permutation of the first, with four distinct ends free on both boards.

    List 1 walks board 1. Returns the ends in the order (board 1, list 1), (1, 2), (2, 1), (2, 2).
    """
    n = len(boards[0][0]["board"])
    free = np.zeros((len(boards), n * n), dtype=bool)
    for b, (world, _) in enumerate(boards):
        free[b, [r * n + c for r, c in _free(world)]] = True
    home, go = start[0] * n + start[1], _ways(boards)
    for first in rng.permutation(len(boards)):
        walked = _walk(rng, boards[first][0], start, length, 0.2)
        assert walked is not None  # only simple walks end early
        lists = np.array([walked, *(rng.permutation(walked) for _ in range(_SHUFFLES))])
        ends, blocked, legal = _run_all(go, home, lists)
        good = legal & (blocked <= length // 2 + 1) & (ends != home)
        if not good[first, 0]:
            continue
        e11, e12 = ends[first, 0], ends[first][None]
        e21, e22 = ends[:, :1], ends
        fits = good & good[first][None] & good[:, :1] & (lists != lists[0]).any(1)[None]
        fits &= (e12 != e11) & (e21 != e11) & (e22 != e11) & (e21 != e12) & (e22 != e12) & (e22 != e21)
        fits &= free[:, [e11]] & free[:, ends[first]] & free[first][e21] & free[first][e22]
        found = np.argwhere(fits)
        if len(found):
            b, k = found[int(rng.integers(len(found)))]
            ids = (ends[first, 0], ends[first, k], ends[b, 0], ends[b, k])
            cells = [divmod(int(e), n) for e in ids]
            return [boards[first], boards[b]], [lists[0].tolist(), lists[k].tolist()], cells
    return None
