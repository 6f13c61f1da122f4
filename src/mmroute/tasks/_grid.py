"""Boards: moves, random layouts, the eight symmetries, and the split that a layout belongs to.

Legend: n cells of one side, S = n * n cells, G symmetries (8).
"""

import hashlib
from collections.abc import Callable, Iterable
from functools import cache
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

__all__ = [
    "DELTA",
    "SPLITS",
    "Cell",
    "Split",
    "canonical",
    "inside",
    "layout_hash",
    "neighbours",
    "only",
    "reachable",
    "replay",
    "reverse",
    "spanning_tree",
    "split_of",
    "step",
    "turn_moves",
]

Cell = tuple[int, int]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
DELTA: tuple[Cell, ...] = ((-1, 0), (0, -1), (1, 0), (0, 1))
"""Up, left, down, right: the order of `_texts.MOVES`; a quarter turn counter-clockwise adds one."""


def step(cell: Cell, move: int) -> Cell:
    """The neighbour in that direction, on the board or off it."""
    return cell[0] + DELTA[move][0], cell[1] + DELTA[move][1]


def inside(cell: Cell, n: int) -> bool:
    """Whether the cell is on the board."""
    return 0 <= cell[0] < n and 0 <= cell[1] < n


def reverse(move: int) -> int:
    """The move that undoes this one."""
    return (move + 2) % 4


@cache
def neighbours(cell: Cell, n: int) -> tuple[tuple[int, Cell], ...]:
    """(move, cell) of all neighbours on the board."""
    return tuple((a, q) for a in range(4) if inside(q := step(cell, a), n))


def replay(
    start: Cell, actions: Iterable[int], go: Callable[[Cell, int], Cell], ends: Callable[[Cell], bool] | None = None
) -> list[Cell]:
    """The cells visited, the start first.

    Args:
        start: where the walk begins.
        actions: moves in their order.
        go: the cell that a move leads to; the same cell where it leads nowhere.
        ends: cells at which the walk stops, whatever is still listed.
    """
    path = [start]
    for action in actions:
        path.append(go(path[-1], action))
        if ends is not None and ends(path[-1]):
            break
    return path


def only(found: Bool[np.ndarray, "n n"]) -> Cell | None:
    """The one cell that is true; None if there is none or more."""
    cells = np.argwhere(found)
    return (int(cells[0][0]), int(cells[0][1])) if len(cells) == 1 else None


def reachable(start: Cell, blocked: list[list[int]] | np.ndarray, n: int) -> set[Cell]:
    """Cells joined to `start` by cells that are zero in `blocked`."""
    seen, todo = {start}, [start]
    while todo:
        r, c = todo.pop()
        for q in ((r - 1, c), (r, c - 1), (r + 1, c), (r, c + 1)):
            if 0 <= q[0] < n and 0 <= q[1] < n and q not in seen and not blocked[q[0]][q[1]]:
                seen.add(q)
                todo.append(q)
    return seen


def spanning_tree(rng: np.random.Generator, n: int) -> list[list[int]]:
    """A maze by randomised depth-first search: bit a of a cell is set where a wall stands in direction a."""
    walls = [[15] * n for _ in range(n)]
    here = (int(rng.integers(n)), int(rng.integers(n)))
    stack, seen = [here], {here}
    while stack:
        free = [(a, q) for a, q in neighbours(stack[-1], n) if q not in seen]
        if not free:
            stack.pop()
            continue
        move, new = free[int(rng.integers(len(free)))]
        (r, c), (s, d) = stack[-1], new
        walls[r][c] &= ~(1 << move)
        walls[s][d] &= ~(1 << reverse(move))
        seen.add(new)
        stack.append(new)
    return walls


@cache
def _symmetries(n: int) -> Int[np.ndarray, "G S"]:
    """Row g: which old cell comes to each new cell; four turns, then four turns of the transpose."""
    ids = np.arange(n * n).reshape(n, n)
    return np.stack([np.rot90(b, k).reshape(-1) for b in (ids, ids.T) for k in range(4)])


@cache
def turn_moves() -> Int[np.ndarray, "G 4"]:
    """[g, a]: direction that direction a becomes under symmetry g."""
    flipped = [1, 0, 3, 2]  # the transpose swaps up with left and down with right
    return np.array([[((flipped[a] if g > 3 else a) + g % 4) % 4 for a in range(4)] for g in range(8)])


def canonical(board: Int[np.ndarray, "n n"], table: Int[np.ndarray, "G V"] | None = None) -> bytes:
    """The least of the eight turned and mirrored boards, as bytes.

    Args:
        board: values below 256.
        table: what value v becomes under symmetry g, for values that have a direction; None keeps them.
    """
    perms = _symmetries(len(board))
    turned = np.asarray(board, dtype=np.uint8).reshape(-1)[perms]
    if table is not None:
        turned = np.take_along_axis(table.astype(np.uint8), turned.astype(np.intp), axis=1)
    whole, size = turned.tobytes(), turned.shape[1]
    return min(whole[at : at + size] for at in range(0, len(whole), size))


def layout_hash(task: str, n: int, key: bytes) -> str:
    """Hex name of a layout up to symmetry. SHA-256, since Python's hash() differs between processes."""
    return hashlib.sha256(f"{task}|{n}|".encode() + key).hexdigest()


def split_of(key: str) -> Split:
    """The split a layout belongs to: 80, 10 and 10 %, a pure function of its hash."""
    u = int(key[:8], 16) / 2**32
    return "train" if u < 0.8 else "val" if u < 0.9 else "test"
