"""A second opinion on every answer: solves an item from tile codes and question words alone.

It shares no code with the simulators. It looks tiles up one by one and gives up where one is fogged, so it also says
which tiles are needed, and whether an item under fog can still be solved.

Legend: C tiles of one side of the canvas.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int

from mmroute.errors import ConfigError
from mmroute.tasks import _skins

__all__ = ["solve"]

_WAY = {"up": (-1, 0), "left": (0, -1), "down": (1, 0), "right": (0, 1)}
_COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
_SHAPES = ("circle", "square", "triangle", "diamond")
_GROUND = range(_skins.BACKGROUND, _skins.BACKGROUND + _skins.NUM_BACKGROUNDS)


class _HiddenError(Exception):
    """A tile that had to be read is fogged, or nowhere in sight."""


def solve(task: str, question: list[str], codes: Int[np.ndarray, "C C"]) -> str | None:
    """The answer word that the visible cells give; None if fog hides what decides.

    Args:
        task: name of the world.
        question: the question in words of the vocabulary, as it stands behind the picture.
        codes: atlas codes of the board in the state of the question, one per cell (`Generated.cells`). A whole canvas
            will do where a cell is one tile; fog beside the board then counts as hidden.

    Raises:
        ConfigError: no such world.
    """
    if task not in _RULES:
        raise ConfigError(f"no solver for {task!r}; one of {', '.join(_RULES)}")
    try:
        return _RULES[task](question, codes)
    except _HiddenError:
        return None


def _tile(codes: np.ndarray, row: int, col: int) -> int | None:
    """The code of a board tile; None off the board.

    Raises:
        _HiddenError: fog.
    """
    if not (0 <= row < codes.shape[0] and 0 <= col < codes.shape[1]):
        return None
    code = int(codes[row, col])
    if code == _skins.FOG:
        raise _HiddenError
    return None if code in _GROUND else code


def _find(codes: np.ndarray, wanted: Callable[[int], bool]) -> tuple[int, int]:
    for row, col in np.ndindex(codes.shape):
        if wanted(int(codes[row, col])):
            return row, col
    raise _HiddenError


def _lake(question: list[str], codes: np.ndarray) -> str:
    row, col = _find(codes, lambda x: x == _skins.LAKE + 2)
    for word in question[2::2]:
        down, right = _WAY[word]
        code = _tile(codes, row + down, col + right)
        if code is None:
            continue
        row, col = row + down, col + right
        if code == _skins.LAKE + 1:
            return "hole_fall"
        if code == _skins.LAKE + 3:
            return "success"
    return "not_reached"


def _maze(question: list[str], codes: np.ndarray) -> str:
    def content(code: int) -> int:
        return (code - _skins.MAZE) % 8

    row, col = _find(codes, lambda x: _skins.MAZE <= x < _skins.ARROWS and content(x) == 1)
    for word in question[2::2]:
        here = _tile(codes, row, col)
        assert here is not None
        down, right = _WAY[word]
        if (here - _skins.MAZE) // 8 >> list(_WAY).index(word) & 1:
            continue
        code = _tile(codes, row + down, col + right)
        if code is not None and code != _skins.MAZE_WALL:
            row, col = row + down, col + right
    here = _tile(codes, row, col)
    assert here is not None
    return "ABCD"[content(here) - 4]


def _arrows(question: list[str], codes: np.ndarray) -> str:
    row, col = _find(codes, lambda x: _skins.ARROWS <= x < _skins.OBJECTS and (x - _skins.ARROWS) % 2 == 1)
    for _ in range(int(question[1][1:])):
        here = _tile(codes, row, col)
        assert here is not None
        down, right = list(_WAY.values())[(here - _skins.ARROWS) // 12]
        row, col = row + down, col + right
    here = _tile(codes, row, col)
    assert here is not None
    return _COLOURS[(here - _skins.ARROWS) % 12 // 2]


def _gridspatial(question: list[str], codes: np.ndarray) -> str:
    def place(colour: str, shape: str) -> tuple[int, int]:
        return _find(codes, lambda x: x == _skins.OBJECTS + 1 + 2 * (4 * _COLOURS.index(colour) + _SHAPES.index(shape)))

    if question[0] not in ("nearest", "between"):
        (row, col), (row_2, col_2) = place(*question[:2]), place(*question[3:])
        holds = {"left_of": col < col_2, "right_of": col > col_2, "above": row < row_2, "below": row > row_2}
        return "yes" if holds[question[2]] else "no"
    first = question.index("A")
    targets = [place(*question[i : i + 2]) for i in range(1, first, 2)]
    places = {question[i]: place(*question[i + 1 : i + 3]) for i in range(first, len(question), 3)}
    if question[0] == "nearest":
        (row, col) = targets[0]
        return min(places, key=lambda x: abs(places[x][0] - row) + abs(places[x][1] - col))
    ends = np.array(targets)
    step = np.sign(ends[1] - ends[0])
    line = {tuple(ends[0] + i * step) for i in range(1, int(np.abs(ends[1] - ends[0]).max()))}
    return next(x for x, where in places.items() if where in line)


def _minibehavior(question: list[str], codes: np.ndarray) -> str:
    row, col = _find(codes, lambda x: x == _skins.ROOM + 6)
    printer, table = (_find(codes, lambda x, what=what: x == _skins.ROOM + what) for what in (2, 3))  # type: ignore[misc]
    held = placed = False

    def beside(where: tuple[int, int]) -> bool:
        return abs(where[0] - row) + abs(where[1] - col) == 1

    for word in question[2::2]:
        if word == "pick":
            if held or placed or not beside(printer):
                return "pickup_error"
            held = True
        elif word == "drop":
            if not held or not beside(table):
                return "drop_error"
            held, placed = False, True
        elif word == "toggle":
            if placed and beside(table):
                return "success"
        else:
            down, right = _WAY[word]
            code, there = _tile(codes, row + down, col + right), (row + down, col + right)
            if code in (_skins.ROOM, _skins.ROOM + 6) or (there == printer and (held or placed)):
                row, col = there
    return "missing_step"


def _needle(question: list[str], codes: np.ndarray) -> str:
    at = question.index("target")
    relation, shape, options = question[:at], _SHAPES.index(question[at + 1]), question[at + 2 :]

    def glyph(code: int) -> tuple[int, int]:
        return divmod((code - _skins.GLYPHS) // 2, len(_SHAPES))

    row, col = _find(codes, lambda x: _skins.GLYPHS <= x < _skins.QUARTERS and glyph(x)[1] == shape)
    if relation:
        down, right = {"above": (-1, 0), "below": (1, 0), "left_of": (0, -1), "right_of": (0, 1)}[relation[0]]
        row, col = row + down, col + right
    code = _tile(codes, row, col)
    if code is None:
        raise _HiddenError
    return options[options.index(_COLOURS[glyph(code)[0]]) - 1]


_RULES = {
    "frozenlake": _lake,
    "maze": _maze,
    "arrows": _arrows,
    "gridspatial": _gridspatial,
    "minibehavior": _minibehavior,
    "needle": _needle,
}
