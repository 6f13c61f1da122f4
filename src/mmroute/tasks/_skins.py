"""What tiles look like: one finite atlas for all worlds, drawn by numpy alone, so that pixels are exactly codes.

One tile is one vision token of the model. The board lies somewhere on a canvas of background tiles: without them every
token would be needed and nothing could be routed. Four noise variants of each tile are stored; a picture picks one for
each tile, so it is a gather from the atlas, and `read` finds the codes again exactly.

A cell may also lie over 2 x 2 tiles; its four quarters then have codes of their own, behind those of whole tiles.

Legend: C tiles of one side, T atlas codes, V variants (4), px side of a tile in pixels, n cells of one side of a board.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image

from mmroute.errors import InputError

__all__ = [
    "ARROWS",
    "BACKGROUND",
    "FOG",
    "GLYPHS",
    "LAKE",
    "LETTERS",
    "MAZE",
    "MAZE_WALL",
    "NUM_BACKGROUNDS",
    "NUM_CODES",
    "OBJECTS",
    "QUARTERS",
    "ROOM",
    "VARIANTS",
    "atlas",
    "background",
    "encode",
    "gathered",
    "image",
    "picture",
    "read",
    "spread",
    "variants",
]

VARIANTS = 4
NUM_BACKGROUNDS = 5
FOG = 0
BACKGROUND = 1
LAKE = BACKGROUND + NUM_BACKGROUNDS
"""ice, hole, figure on ice, gift, empty start, figure in a hole, figure at the gift."""
MAZE_WALL = LAKE + 7
MAZE = MAZE_WALL + 1
"""+ 8 * walls (bit a: a line on side a) + 0 free, 1 start, 2 agent, 3 empty start, 4 .. 7 plates A-D."""
ARROWS = MAZE + 16 * 8
"""+ 12 * direction + 2 * colour + 1 if the star stands there."""
OBJECTS = ARROWS + 4 * 6 * 2
"""Empty, then + 1 + 2 * (4 * colour + shape) + 1 if marked."""
_FIRST = OBJECTS + 1 + 6 * 4 * 2
ROOM = _FIRST
"""floor, wall, printer, table, printer on the table, the same switched on, agent, agent with printer, empty start."""
GLYPHS = ROOM + 9
"""+ 2 * (4 * colour + shape) + 1 if marked."""
NUM_CODES = GLYPHS + 6 * 4 * 2
QUARTERS = NUM_CODES
"""+ 4 * code + quarter (0 top left, 1 top right, 2 bottom left, 3 bottom right)."""

PALETTE = ((214, 48, 49), (46, 160, 67), (52, 104, 214), (238, 200, 40), (138, 70, 190), (240, 134, 40))
"""In the order of `_texts.COLOURS`."""
PLATES: tuple[tuple[int, int, int], ...] = ((250, 200, 60), (120, 210, 120), (130, 180, 250), (240, 150, 220))
_GROUND = ((96, 128, 72), (120, 104, 84), (150, 150, 140), (70, 96, 110), (134, 118, 140))
LETTERS = (
    ("01110", "10001", "10001", "11111", "10001", "10001", "10001"),
    ("11110", "10001", "10001", "11110", "10001", "10001", "11110"),
    ("01110", "10001", "10000", "10000", "10000", "10001", "01110"),
    ("11110", "10001", "10001", "10001", "10001", "10001", "11110"),
)
_FINE = 4
"""Shapes are drawn this much finer, then averaged, which smooths their edges."""


class _Tile:
    """One clean tile: masks in the unit square (y down, x right), filled one over the other."""

    def __init__(self, px: int, ground: tuple[int, int, int]) -> None:
        side = px * _FINE
        line = (np.arange(side) + 0.5) / side
        self.px, self.y, self.x = px, line[:, None] + 0 * line[None], line[None] + 0 * line[:, None]
        self.rgb = np.full((side, side, 3), ground, dtype=np.float64)

    def fill(self, mask: Bool[np.ndarray, "h w"], colour: tuple[int, int, int]) -> "_Tile":
        self.rgb[mask] = colour
        return self

    def box(self, top: float, left: float, bottom: float, right: float) -> Bool[np.ndarray, "h w"]:
        return (self.y >= top) & (self.y < bottom) & (self.x >= left) & (self.x < right)

    def disc(self, radius: float, y: float = 0.5, x: float = 0.5) -> Bool[np.ndarray, "h w"]:
        return (self.y - y) ** 2 + (self.x - x) ** 2 < radius**2

    def cone(self, top: float, bottom: float, half: float) -> Bool[np.ndarray, "h w"]:
        """A triangle with its tip up in the middle."""
        inside = (self.y >= top) & (self.y < bottom)
        return inside & (np.abs(self.x - 0.5) < half * (self.y - top) / (bottom - top))

    def diamond(self, radius: float) -> Bool[np.ndarray, "h w"]:
        return np.abs(self.y - 0.5) + np.abs(self.x - 0.5) < radius

    def star(self, radius: float, y: float = 0.5, x: float = 0.5) -> Bool[np.ndarray, "h w"]:
        """A five-pointed star: inside when above at least four of its five lines."""
        votes = np.zeros(self.y.shape, dtype=int)
        for k in range(5):
            angle = np.pi / 2 + 2 * np.pi * k / 5
            votes += (self.x - x) * np.cos(angle) + (self.y - y) * np.sin(angle) < radius * np.cos(2 * np.pi / 5)
        return votes >= 4

    def frame(self, width: float) -> Bool[np.ndarray, "h w"]:
        return ~self.box(width, width, 1 - width, 1 - width)

    def letter(self, which: int, top: float, left: float, height: float, width: float) -> Bool[np.ndarray, "h w"]:
        bits = np.array([[c == "1" for c in row] for row in LETTERS[which]])
        row = np.clip(((self.y - top) / height * 7).astype(int), 0, 6)
        col = np.clip(((self.x - left) / width * 5).astype(int), 0, 4)
        return bits[row, col] & self.box(top, left, top + height, left + width)

    def done(self) -> Float[np.ndarray, "px px 3"]:
        px = self.px
        return self.rgb.reshape(px, _FINE, px, _FINE, 3).mean((1, 3)) / 255


def _ground(px: int, which: int) -> Float[np.ndarray, "px px 3"]:
    rng = np.random.default_rng([100, which])
    tile = np.array(_GROUND[which], dtype=np.float64) + rng.normal(0, 10, (px, px, 1))
    if which % 2 == 0:  # spots
        side = max(2, px // 6)
        for _ in range(6):
            r, c = rng.integers(0, px - side, size=2)
            tile[r : r + side, c : c + side] += rng.choice([-30, 30])
    else:  # stripes
        step, width = max(2, px // 4), max(1, px // 14)
        line = (np.arange(px) % step < width) * 25.0
        tile -= line[:, None, None] if which == 1 else line[None, :, None]
    return np.clip(tile, 0, 255) / 255


def _lake(px: int, what: int, dusk: bool) -> Float[np.ndarray, "px px 3"]:
    t = _Tile(px, (236, 222, 240) if dusk else (215, 236, 250))
    t.fill(t.frame(0.03), (150, 180, 205))
    if what in (1, 5):
        t.fill(t.disc(0.38), (20, 50, 90)).fill(t.disc(0.34), (40, 90, 150))
    if what in (3, 6):
        t.fill(t.box(0.3, 0.2, 0.84, 0.8), (230, 180, 30)).fill(t.box(0.3, 0.42, 0.84, 0.58), (200, 30, 30))
        t.fill(t.disc(0.1, 0.22, 0.38) | t.disc(0.1, 0.22, 0.62), (200, 30, 30))
    if what == 4:
        t.fill(t.disc(0.09, 0.4, 0.36) | t.disc(0.09, 0.62, 0.62), (120, 90, 70))
    if what in (2, 5, 6):
        t.fill(t.box(0.62, 0.3, 0.92, 0.7), (200, 40, 40)).fill(t.disc(0.17, 0.5), (250, 210, 170))
        t.fill(t.cone(0.1, 0.42, 0.24), (30, 150, 60))
    return t.done()


def _maze(px: int, walls: int, what: int, plates: tuple[tuple[int, int, int], ...]) -> Float[np.ndarray, "px px 3"]:
    t = _Tile(px, (248, 248, 248))
    t.fill(t.frame(0.02), (225, 225, 225))
    if what == 1:
        t.fill(t.disc(0.24), (220, 20, 20))
    if what == 2:
        t.fill(t.disc(0.26), (40, 40, 40)).fill(t.disc(0.2), (60, 120, 240))
    if what == 3:
        t.fill(t.disc(0.24), (220, 20, 20)).fill(t.disc(0.15), (248, 248, 248))
    if what >= 4:
        t.fill(t.box(0.12, 0.12, 0.88, 0.88), plates[what - 4])
        t.fill(t.letter(what - 4, 0.22, 0.3, 0.56, 0.4), (0, 0, 0))
    width = 5 / 28
    sides = (
        t.box(0.0, 0.0, width, 1.0),
        t.box(0.0, 0.0, 1.0, width),
        t.box(1 - width, 0.0, 1.0, 1.0),
        t.box(0.0, 1 - width, 1.0, 1.0),
    )
    for a in range(4):
        if walls >> a & 1:
            t.fill(sides[a], (20, 20, 20))
    return t.done()


def _brick(px: int) -> Float[np.ndarray, "px px 3"]:
    t = _Tile(px, (46, 44, 50))
    for row in range(4):
        for left in np.arange(-0.25 * (row % 2), 1, 0.5):
            t.fill(t.box(row / 4 + 0.03, left + 0.03, row / 4 + 0.22, left + 0.47), (92, 74, 70))
    return t.done()


def _arrow(px: int, direction: int, colour: int, star: bool, slim: bool) -> Float[np.ndarray, "px px 3"]:
    t = _Tile(px, PALETTE[colour])
    up = t.cone(0.08, 0.5, 0.34) | t.box(0.5, 0.38, 0.92, 0.62)
    if slim:
        up = t.cone(0.14, 0.44, 0.24) | t.box(0.44, 0.43, 0.86, 0.57)
    t.fill(np.rot90(up, direction), (16, 16, 16))
    if star:
        for y, x in ((0.17, 0.17), (0.17, 0.83), (0.83, 0.17), (0.83, 0.83)):
            t.fill(t.disc(0.16, y, x), (255, 255, 255)).fill(t.star(0.14, y, x), (225, 0, 120))
        t.fill(t.frame(0.05), (255, 255, 255))
    return t.done()


def _object(px: int, what: int, hollow: bool) -> Float[np.ndarray, "px px 3"]:
    t = _Tile(px, (240, 236, 226))
    t.fill(t.frame(0.02), (214, 208, 196))
    if what:
        kind, marked = divmod(what - 1, 2)
        colour, shape = divmod(kind, 4)
        masks = (t.disc(0.34), t.box(0.2, 0.2, 0.8, 0.8), t.cone(0.14, 0.82, 0.4), t.diamond(0.42))
        t.fill(masks[shape], PALETTE[colour])
        if hollow:
            cores = (t.disc(0.2), t.box(0.33, 0.33, 0.67, 0.67), t.cone(0.4, 0.7, 0.2), t.diamond(0.24))
            t.fill(cores[shape], (240, 236, 226))
        if marked:
            t.fill(t.frame(0.1), (20, 20, 20))
    return t.done()


def _room(px: int, what: int, other: bool) -> Float[np.ndarray, "px px 3"]:
    t = _Tile(px, (232, 240, 226) if other else (236, 228, 212))
    t.fill(t.frame(0.02), (206, 198, 180))
    if what == 1:
        t.fill(t.box(0, 0, 1, 1), (70, 76, 96)).fill(t.box(0.1, 0.1, 0.9, 0.46), (104, 112, 138))
        t.fill(t.box(0.1, 0.54, 0.9, 0.9), (104, 112, 138))
    if what in (3, 4, 5):
        t.fill(t.box(0.08, 0.5, 0.92, 0.64), (132, 84, 44))
        t.fill(t.box(0.14, 0.64, 0.24, 0.94) | t.box(0.76, 0.64, 0.86, 0.94), (104, 64, 30))
    if what in (6, 7):
        t.fill(t.disc(0.2, 0.36, 0.5), (250, 210, 170)).fill(t.box(0.52, 0.32, 0.9, 0.68), (60, 120, 240))
    if what == 8:
        t.fill(t.disc(0.24), (220, 20, 20)).fill(t.disc(0.15), (236, 228, 212))
    top, left = {2: (0.3, 0.2), 4: (0.12, 0.25), 5: (0.12, 0.25), 7: (0.56, 0.5)}.get(what, (2.0, 2.0))
    t.fill(t.box(top, left, top + 0.36, left + 0.5), (60, 60, 66))
    t.fill(t.box(top + 0.06, left + 0.1, top + 0.16, left + 0.4), (235, 235, 235))
    if what == 5:
        t.fill(t.box(top + 0.2, left + 0.06, top + 0.32, left + 0.44), (70, 230, 90))
    return t.done()


def _glyph(px: int, kind: int, marked: bool, hollow: bool) -> Float[np.ndarray, "px px 3"]:
    t = _Tile(px, (112, 110, 104))
    colour, shape = divmod(kind, 4)
    masks = (t.disc(0.27), t.box(0.26, 0.26, 0.74, 0.74), t.cone(0.2, 0.76, 0.32), t.diamond(0.34))
    t.fill(masks[shape], PALETTE[colour])
    if hollow:
        t.fill(t.disc(0.09, 0.56), (112, 110, 104))
    if marked:
        t.fill(t.frame(0.09), (250, 250, 250))
    return t.done()


def _clean(px: int, look: str) -> Float[np.ndarray, "T px px 3"]:
    # Permuted: hues in other roles and other glyphs. What was learnt by plate colour or by one outline alone fails;
    # what the answer names (the six colours, the four shapes) stays what it is.
    other = look == "permuted"
    plates = tuple(PLATES[i] for i in (2, 3, 1, 0)) if other else PLATES
    tiles = [_Tile(px, (128, 128, 128)).fill(np.zeros((px * _FINE, px * _FINE), dtype=bool), (0, 0, 0)).done()]
    tiles += [_ground(px, i) for i in range(NUM_BACKGROUNDS)]
    tiles += [_lake(px, i, other) for i in range(7)]
    tiles += [_brick(px)]
    tiles += [_maze(px, walls, what, plates) for walls in range(16) for what in range(8)]
    tiles += [_arrow(px, a, c, bool(s), other) for a in range(4) for c in range(6) for s in range(2)]
    tiles += [_object(px, what, other) for what in range(1 + 6 * 4 * 2)]
    tiles += [_room(px, what, other) for what in range(9)]
    tiles += [_glyph(px, kind, bool(m), other) for kind in range(6 * 4) for m in range(2)]
    assert len(tiles) == NUM_CODES
    return np.stack(tiles)


@lru_cache(maxsize=8)
def atlas(tile_px: int = 28, noise: float = 0.02, look: str = "plain") -> UInt8[np.ndarray, "T V px px 3"]:
    """All tiles of all worlds; a picture is made of exactly these.

    Args:
        tile_px: side of a tile.
        noise: standard deviation in units of full scale; with any, brightness varies by 6 % too.
        look: `plain`, or `permuted` (out-of-distribution plates).
    """
    clean = _clean(tile_px, look)[:, None].repeat(VARIANTS, axis=1)
    if noise:
        # Two draws: tiles that came later must not change what models were trained on.
        clean = np.concatenate([_noisy(part, noise, i) for i, part in enumerate((clean[:_FIRST], clean[_FIRST:]))])
    out = np.round(np.clip(clean, 0, 1) * 255).astype(np.uint8)
    out.setflags(write=False)
    return out


@lru_cache(maxsize=4)
def _quartered(tile_px: int, noise: float, look: str) -> UInt8[np.ndarray, "T V px px 3"]:
    """The atlas of whole tiles, and behind it the quarters of tiles of twice the side."""
    large = atlas(2 * tile_px, noise, look)
    parts = large.reshape(NUM_CODES, VARIANTS, 2, tile_px, 2, tile_px, 3).transpose(0, 2, 4, 1, 3, 5, 6)
    out = np.concatenate([atlas(tile_px, noise, look), parts.reshape(-1, VARIANTS, tile_px, tile_px, 3)])
    out.setflags(write=False)
    return out


def spread(board: Int[np.ndarray, "n n"], cell_side: int) -> Int[np.ndarray, "tiles tiles"]:
    """Codes of cells as codes of tiles; the same array where a cell is one tile."""
    if cell_side == 1:
        return board
    quarters = np.arange(4, dtype=board.dtype).reshape(2, 2)
    split = QUARTERS + 4 * board[:, None, :, None] + quarters[None, :, None, :]
    return split.reshape(2 * len(board), 2 * len(board)).astype(board.dtype)


def gathered(tiles: Int[np.ndarray, "tiles tiles"], cell_side: int) -> Int[np.ndarray, "n n"]:
    """`spread` back; a cell of which a tile is fog is fog."""
    if cell_side == 1:
        return tiles
    n = len(tiles) // 2
    blocks = tiles.reshape(n, 2, n, 2).transpose(0, 2, 1, 3).reshape(n, n, 4)
    cells = (blocks[..., 0] - QUARTERS) // 4
    return np.where((blocks == FOG).any(2), FOG, cells).astype(tiles.dtype)


def _noisy(clean: Float[np.ndarray, "T V px px 3"], noise: float, seed: int) -> Float[np.ndarray, "T V px px 3"]:
    rng = np.random.default_rng(seed)
    brightness = 1 + rng.uniform(-0.06, 0.06, (len(clean), VARIANTS, 1, 1, 1))
    return clean * brightness + rng.normal(0, noise, clean.shape)


def background(seed: int, canvas: int) -> Int[np.ndarray, "C C"]:
    """A canvas without a board: one texture on three quarters of the tiles, a second on the rest, a little fog."""
    rng = np.random.default_rng([seed, 0])
    main, second = rng.integers(NUM_BACKGROUNDS, size=2)
    u = rng.random((canvas, canvas))
    # fog stands for "cannot be seen" in unsolvable items; here and there on the ground it is nothing new
    codes = np.where(u < 0.75, BACKGROUND + main, BACKGROUND + second)
    return np.where(u > 0.98, FOG, codes).astype(np.int16)


def variants(seed: int, canvas: int) -> Int[np.ndarray, "C C"]:
    """Which noise variant each tile of a picture takes."""
    return np.random.default_rng([seed, 2]).integers(VARIANTS, size=(canvas, canvas))


def image(tiles: UInt8[np.ndarray, "C C px px 3"]) -> Image.Image:
    """Tiles put together."""
    rows, cols, px, _, _ = tiles.shape
    return Image.fromarray(np.ascontiguousarray(tiles.transpose(0, 2, 1, 3, 4)).reshape(rows * px, cols * px, 3))


def picture(
    codes: Int[np.ndarray, "C C"],
    seed: int,
    tile_px: int,
    noise: float = 0.02,
    look: str = "plain",
    cell_side: int = 1,
) -> Image.Image:
    """The picture of a canvas of codes; `seed` picks the noise variants."""
    tiles = atlas(tile_px, noise, look) if cell_side == 1 else _quartered(tile_px, noise, look)
    return image(tiles[codes, variants(seed, len(codes))])


def encode(picture: Image.Image, tile_px: int) -> UInt8[np.ndarray, "C C px px 3"]:
    """A picture cut into tiles.

    Raises:
        InputError: its sides are no multiples of `tile_px`.
    """
    pixels = np.asarray(picture.convert("RGB"))
    height, width = pixels.shape[:2]
    if height % tile_px or width % tile_px:
        raise InputError(f"a picture of tiles has sides that {tile_px} divides, given {width} x {height} pixels")
    return pixels.reshape(height // tile_px, tile_px, width // tile_px, tile_px, 3).transpose(0, 2, 1, 3, 4)


@lru_cache(maxsize=4)
def _prototypes(tile_px: int, look: str) -> tuple[Float[np.ndarray, "T D"], Float[np.ndarray, " T"]]:
    flat = atlas(tile_px, 0.0, look)[:, 0].reshape(NUM_CODES, -1).astype(np.float32) / 255
    return flat, (flat**2).sum(1)


def read(picture: Image.Image, tile_px: int, look: str = "plain") -> Int[np.ndarray, "C C"]:
    """The codes of a picture: for each tile the nearest of the atlas, brightness fitted; right up to noise .05.

    Raises:
        InputError: its sides are no multiples of `tile_px`.
    """
    tiles = encode(picture, tile_px)
    flat = tiles.reshape(tiles.shape[0] * tiles.shape[1], -1).astype(np.float32) / 255
    known, norm = _prototypes(tile_px, look)
    dot = flat @ known.T
    gain = np.clip(dot / norm, 0.9, 1.1)
    distance = gain**2 * norm - 2 * gain * dot  # the tile's own square is the same for every code
    return distance.argmin(1).reshape(tiles.shape[:2]).astype(np.int16)
