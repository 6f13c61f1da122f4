"""MVoT's files: a tree of trajectories with one picture per state, written by `_mvot_export`, read by `_mvot_import`.

    maze/grid{n}.json                      list of {path_id, grid_num, path_locs, file_prefix, action_list, ..}
    maze/grid{n}/path_{path_id}_{k}.jpg    k = 1 .. T + 1
    frozenlake/level{n}/data.json          environment -> lists over its episodes: actions, states, data_id, ..
    frozenlake/level{n}/{data_id}/{k}.png  k = 0 .. T

A tree that is read and written again is the same tree, pictures byte for byte; a sample that was written and read has
the same question, hops, states, choices and answer (its id, its split and what only our worlds know are not in a tree).

Source: MVoT (arXiv 2501.07542) and its public toy data, behaviour only; all wording here is our own.
Deviates: `rewards` is one number per action, 1 at the goal; the start of a lake is written `S` in `env_desc`, where the
    toy data may have `F` (both are read). JPEG is written at quality 95 without chroma subsampling.
"""

from typing import Any, NamedTuple

from mmroute.errors import InputError
from mmroute.tasks import maze
from mmroute.tasks._grid import Cell, inside, reverse, step
from mmroute.tasks._texts import MOVES

__all__ = ["FATES", "LAKE_MOVE", "LAKE_MOVES", "Walk", "maze_board", "maze_info"]

LAKE_MOVES = ("left", "down", "right", "up")
LAKE_MOVE = dict(enumerate(LAKE_MOVES))
"""By the number that a tree writes for each; no list, in which -1 would be a move too."""
DOWN, RIGHT = MOVES.index("down"), MOVES.index("right")
FATES = ("success", "terminated", "truncated")
"""How a run on a lake ends, in the order of our choices."""


class Walk(NamedTuple):
    """One trajectory, whichever task it is of."""

    task: str
    n: int
    cells: list[Cell]
    """States 0 .. T."""
    moves: list[str]
    """The T executed moves."""
    unused: list[str]
    """Listed moves that come after the end and are not executed."""
    answer: int
    world: dict[str, Any]
    """The world as our task's file writes it."""
    frames: list[Any]
    """Pictures of states 0 .. T."""
    known: dict[str, Any]
    """What a tree says beyond that, kept so that the same tree can be written again."""


def maze_info(world: dict[str, Any], n: int) -> str:
    """Passages down of all cells, row-major, then passages right: T open, F closed."""
    cells = [(r, c) for r in range(n) for c in range(n)]
    # Both ways: a wall tile can be left but not entered, and MVoT knows only walls between cells.
    return "".join(
        "FT"[maze.passable(world, cell, a) and maze.passable(world, step(cell, a), reverse(a))]
        for a in (DOWN, RIGHT)
        for cell in cells
    )


def maze_board(info: str, n: int, where: str) -> list[list[int]]:
    """`maze_info` back: bit a of a cell is set where a wall stands in direction a."""
    if len(info) != 2 * n * n or not set(info) <= {"T", "F"}:
        raise InputError(f"{where}: maze_info is {2 * n * n} letters T or F for {n} x {n} cells, given {info!r}")
    board = [[15] * n for _ in range(n)]
    for i, letter in enumerate(info):
        move, here = (DOWN, RIGHT)[i // (n * n)], divmod(i % (n * n), n)
        there = step(here, move)
        if letter == "F":
            continue
        if not inside(there, n):
            raise InputError(f"{where}: maze_info opens cell {here} towards the outside")
        board[here[0]][here[1]] &= ~(1 << move)
        board[there[0]][there[1]] &= ~(1 << reverse(move))
    return board
