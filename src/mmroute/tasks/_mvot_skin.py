"""The pictures of MVoT's data drawn anew with Pillow alone, for general models and for comparison with papers.

Maze: 640 x 480, a square raster of 14 n + 1 dots, the way so far as red arrows, `o` at the start, `x` at the agent, the
letters of the plates. Lake: cells of 64 px from 32 px sprites, those of an installed gymnasium (>= 0.29, < 1.4; later
ones have other art), else our own drawings; none are vendored, since their licences are not ours.

Source: geometry measured on MVoT's public samples (arXiv 2501.07542) and gymnasium's renderer; no code copied.
Deviates: letters are our own bitmaps, so about one pixel in a hundred of a maze differs from the samples.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmroute.errors import InputError
from mmroute.tasks._grid import Cell
from mmroute.tasks._schema import State
from mmroute.tasks._skins import LETTERS

__all__ = ["lake_picture", "maze_picture", "nearest"]

WIDTH, HEIGHT = 640, 480
SIDE, CENTRE = 369.6, (328.0, 242.4)
"""Pixels: side of the maze's square and where its middle lies (x, y)."""
_POINT = 100 / 72  # pixels of one typographic point at 100 dots per inch
_FINE = 2
_RED, _BLACK = (255, 0, 0), (0, 0, 0)

CELL, SPRITE = 64, 32
_BORDER = (180, 200, 230)
_FACES = ("up", "left", "down", "right")


# ---------------------------------------------------------------- maze


def maze_picture(world: dict[str, Any], path: Sequence[Cell]) -> Image.Image:
    """The maze with the cells walked so far; the last one is where the agent is."""
    n = len(world["board"])
    picture = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    left, top = CENTRE[0] - SIDE / 2, CENTRE[1] - SIDE / 2
    raster = _raster(world)
    x = ((np.arange(WIDTH) + 0.5 - left) / SIDE * len(raster)).astype(int)
    y = ((np.arange(HEIGHT) + 0.5 - top) / SIDE * len(raster)).astype(int)
    inside_x = (np.arange(WIDTH) + 0.5 >= left) & (x < len(raster))
    inside_y = (np.arange(HEIGHT) + 0.5 >= top) & (y < len(raster))
    pixels = np.array(picture)
    grey = raster[np.ix_(np.clip(y, 0, len(raster) - 1), np.clip(x, 0, len(raster) - 1))]
    pixels = np.where((inside_y[:, None] & inside_x[None])[..., None], grey[..., None], pixels).astype(np.uint8)
    picture = Image.fromarray(pixels)

    def centre(cell: Sequence[int]) -> tuple[float, float]:
        unit = SIDE / (14 * n + 1)
        return left + (14 * cell[1] + 7.5) * unit, top + (14 * cell[0] + 7.5) * unit

    def spines(draw: ImageDraw.ImageDraw) -> None:
        box = [v * _FINE for v in (left, top, left + SIDE, top + SIDE)]
        draw.rectangle(box, outline=255, width=round(2 * _POINT * _FINE))

    def letters(draw: ImageDraw.ImageDraw) -> None:
        for which, plate in enumerate(world["plates"]):
            _letter(draw, which, centre(plate), 30 * _POINT)

    def way(draw: ImageDraw.ImageDraw) -> None:
        for here, there in itertools.pairwise(path):
            if here != there:
                _arrow(draw, centre(here), centre(there))
        radius, width = 5 * _POINT, 1.5 * _POINT
        (ox, oy), (ax, ay) = centre(path[0]), centre(path[-1])
        draw.ellipse(
            [(v) * _FINE for v in (ox - radius / 2, oy - radius / 2, ox + radius / 2, oy + radius / 2)], fill=255
        )
        for sign in (1, -1):
            ends = (ax - radius, ay - sign * radius, ax + radius, ay + sign * radius)
            draw.line([v * _FINE for v in ends], fill=255, width=round(width * _FINE))

    _over(picture, _BLACK, spines)
    _over(picture, _BLACK, letters)
    _over(picture, _RED, way)
    return picture


def _raster(world: dict[str, Any]) -> np.ndarray:
    """(14 n + 1) squared grey levels: nodes white, walls black lines (or black cells), open lines light grey."""
    board, n = world["board"], len(world["board"])
    out = np.zeros((14 * n + 1, 14 * n + 1), dtype=np.uint8)
    for r in range(n):
        for c in range(n):
            is_wall = world["walls"] == "tiles" and board[r][c]
            top, left = 14 * r + 1, 14 * c + 1
            out[top : top + 13, left : left + 13] = 0 if is_wall else 255
            for move, (row, col) in ((2, (r + 1, c)), (3, (r, c + 1))):
                if row == n or col == n or is_wall:
                    continue
                is_closed = board[row][col] if world["walls"] == "tiles" else board[r][c] >> move & 1
                if not is_closed and move == 2:
                    out[top + 13, left : left + 13] = 246
                elif not is_closed:
                    out[top : top + 13, left + 13] = 246
    return out


def _over(picture: Image.Image, colour: tuple[int, int, int], draw: Callable[[ImageDraw.ImageDraw], None]) -> None:
    """Draws finer than the picture and lays it over with smooth edges."""
    mask = Image.new("L", (picture.width * _FINE, picture.height * _FINE), 0)
    draw(ImageDraw.Draw(mask))
    picture.paste(colour, (0, 0), mask.reduce(_FINE))


def _arrow(draw: ImageDraw.ImageDraw, here: tuple[float, float], there: tuple[float, float]) -> None:
    shaft = 0.015 * SIDE
    a, b = np.array(here), np.array(there)
    along = (b - a) / np.linalg.norm(b - a)
    across = np.array([-along[1], along[0]])
    neck = b - along * 5 * shaft
    half, head = across * shaft / 2, across * 3 * shaft / 2
    outline = [a + half, neck + half, neck + head, b, neck - head, neck - half, a - half]
    draw.polygon([(float(x) * _FINE, float(y) * _FINE) for x, y in outline], fill=255)


def _letter(draw: ImageDraw.ImageDraw, which: int, centre: tuple[float, float], size: float) -> None:
    height, width = 0.73 * size, 0.6 * size  # a capital's share of the size of its type
    for r, row in enumerate(LETTERS[which]):
        for c, bit in enumerate(row):
            if bit == "1":
                x, y = centre[0] - width / 2 + c * width / 5, centre[1] - height / 2 + r * height / 7
                draw.rectangle([v * _FINE for v in (x, y, x + width / 5, y + height / 7)], fill=255)


# ---------------------------------------------------------------- lake


def lake_picture(world: dict[str, Any], cell: Cell, facing: str) -> Image.Image:
    """The lake with the figure on a cell, or cracked ice where it fell in."""
    grid, sprites = world["grid"], _sprites()
    n = len(grid)
    picture = Image.new("RGB", (n * CELL, n * CELL))
    draw = ImageDraw.Draw(picture)
    for r in range(n):
        for c in range(n):
            x, y = c * CELL, r * CELL
            names = ["ice"]
            if [r, c] == list(world["goal"]):
                names.append("goal")
            elif [r, c] == list(world["start"]):
                names.append("stool")
            elif grid[r][c]:
                names.append("hole")
            for name in names:
                picture.paste(sprites[name], (x, y), sprites[name])
            draw.rectangle([x, y, x + CELL - 1, y + CELL - 1], outline=_BORDER)
    figure = sprites["cracked_hole" if grid[cell[0]][cell[1]] else f"elf_{facing}"]
    picture.paste(figure, (cell[1] * CELL, cell[0] * CELL), figure)
    return picture


@cache
def _sprites() -> dict[str, Image.Image]:
    """Layers of 64 x 64 with transparency, by gymnasium's names."""
    names = ("ice", "hole", "cracked_hole", "goal", "stool", *(f"elf_{f}" for f in _FACES))
    folder = _gymnasium_art()
    small = {name: Image.open(folder / f"{name}.png").convert("RGBA") if folder else _own(name) for name in names}
    return {name: image.resize((CELL, CELL), Image.Resampling.NEAREST) for name, image in small.items()}


def _gymnasium_art() -> Path | None:
    """Where an installed gymnasium of the right age keeps its pictures; it is found, not imported."""
    try:
        age = tuple(int(part) for part in version("gymnasium").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return None
    spec = importlib.util.find_spec("gymnasium")
    if spec is None or spec.origin is None or not (0, 29) <= age < (1, 4):
        return None
    folder = Path(spec.origin).parent / "envs" / "toy_text" / "img"
    return folder if folder.is_dir() else None


def _own(name: str) -> Image.Image:
    """Our own 32 x 32 drawing of a layer."""
    image = Image.new("RGBA", (SPRITE, SPRITE), (0, 0, 0, 0))
    d = ImageDraw.Draw(image)
    if name == "ice":
        d.rectangle([0, 0, 31, 31], fill=(219, 238, 250))
        for x, y in ((4, 9), (18, 5), (10, 22), (23, 25)):
            d.line([x, y, x + 5, y - 3], fill=(240, 249, 255))
    elif name in ("hole", "cracked_hole"):
        d.ellipse([3, 5, 28, 27], fill=(35, 86, 146), outline=(18, 48, 92))
        if name == "cracked_hole":
            for x, y in ((0, 2), (31, 4), (2, 30), (30, 29)):
                d.line([x, y, 16, 16], fill=(245, 250, 255))
    elif name == "goal":
        d.rectangle([7, 11, 24, 26], fill=(232, 182, 40), outline=(150, 110, 20))
        d.rectangle([14, 11, 17, 26], fill=(205, 40, 40))
        d.ellipse([9, 5, 15, 11], outline=(205, 40, 40))
        d.ellipse([16, 5, 22, 11], outline=(205, 40, 40))
    elif name == "stool":
        d.rectangle([8, 19, 23, 22], fill=(133, 94, 60))
        d.rectangle([10, 22, 12, 28], fill=(110, 76, 48))
        d.rectangle([19, 22, 21, 28], fill=(110, 76, 48))
    else:
        look = {"up": (0, 0), "left": (-3, 1), "down": (0, 1), "right": (3, 1)}[name.removeprefix("elf_")]
        d.polygon([(16, 1), (9, 10), (23, 10)], fill=(32, 148, 66))
        d.ellipse([10, 8, 22, 19], fill=(60, 110, 70) if name == "elf_up" else (250, 212, 176))
        if name != "elf_up":
            for eye in (13, 18):
                d.rectangle([eye + look[0], 12 + look[1], eye + look[0] + 1, 13 + look[1]], fill=(30, 30, 30))
        d.rectangle([10, 19, 22, 29], fill=(200, 44, 44))
    return image


# ---------------------------------------------------------------- reading


def nearest(image: Image.Image, states: Iterable[State], draw: Callable[[State], Image.Image]) -> State:
    """The state whose drawing is most like the picture.

    Raises:
        InputError: another size, or not like any of them.
    """
    seen = np.asarray(image.convert("RGB"), dtype=np.int16)
    best, least = None, 8.0  # mean grey levels: far above what JPEG costs, far below another board
    for state in states:
        drawn = np.asarray(draw(state), dtype=np.int16)
        if drawn.shape != seen.shape:
            raise InputError(f"the item is drawn {drawn.shape[1]} x {drawn.shape[0]} px, the picture is {image.size}")
        if (distance := float(np.abs(drawn - seen).mean())) < least:
            best, least = state, distance
    if best is None:
        raise InputError("the picture shows no state of this item")
    return best
