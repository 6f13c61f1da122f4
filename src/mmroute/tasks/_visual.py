"""How good are the pictures a model draws as its thoughts? Exact on tiles, and MVoT's own count of red pixels.

On tiles a picture is decoded, so a cell is right or it is not:

| measure | question |
|---|---|
| `v_acc` | is every cell that had to change what it should be? |
| `v_red` | did any other cell change? |
| `v_steps` | how many pictures from the first on are right, and nothing else changed |
| `v_ratio` | that, over the number of hops |

Source: names and meaning from MVoT (arXiv 2501.07542), evaluation; the pixel rule's geometry as in its code.
Deviates: MVoT judges mazes only, by pixels; ours decodes tiles and holds for every world. Its pixel rule is kept for
    comparison and is miscalibrated: gold frames get .66 to .93 by it, so calibrate `least` on gold frames per size.

Legend: n cells of one side of the board.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from PIL import Image

from mmroute.errors import InputError
from mmroute.tasks._schema import Spec
from mmroute.tasks.base import Generated

__all__ = ["Drawn", "judge_drawings", "red_cells"]

_SPACE, _TOP, _LEFT, _SIDE = 512, 61, 147, 362
"""MVoT counts in a square of `_SPACE` pixels; the other three say where the maze lies in a frame of 640 x 480."""


@dataclass(frozen=True)
class Drawn:
    """What the pictures of one item's hops are worth; shares in [0, 1]."""

    v_acc: float
    """Share of hops whose changed cells are right."""
    v_red: float
    """Share of hops in which another cell changed too."""
    v_steps: int
    """Hops from the first on that are right with nothing else changed."""
    v_ratio: float
    hops: int


def judge_drawings(task: Generated, spec: Spec, drawn: Sequence[Image.Image]) -> Drawn:
    """Compares the pictures of all hops with the simulator.

    Args:
        task: what the item came from, with the tiles skin.
        spec: the item.
        drawn: one picture per hop; missing ones count as wrong.

    Raises:
        InputError: more pictures than hops, the mvot skin, or a picture of another size.
    """
    states = task.trace(spec)
    hops = len(states) - 1
    if len(drawn) > hops or task.skin != "tiles":
        raise InputError(
            f"{hops} hops of an item with tiles are judged, given {len(drawn)} pictures and the skin {task.skin!r}"
        )
    gold = [task.cells(spec, task.codes(spec, i)) for i in range(hops + 1)]
    right, redundant = [], []
    for before, after, picture in zip(gold, gold[1:], drawn, strict=False):
        seen, changes = task.seen_cells(picture, spec), before != after
        right.append(bool((seen[changes] == after[changes]).all()))
        redundant.append(bool((seen[~changes] != after[~changes]).any()))
    steps = next((i for i, (r, x) in enumerate(zip(right, redundant, strict=True)) if not r or x), len(right))
    total = max(hops, 1)
    return Drawn(sum(right) / total, sum(redundant) / total, steps, steps / total, hops)


def red_cells(frame: Image.Image, n: int, least: float = 0.025) -> Bool[np.ndarray, "n n"]:
    """Cells of a maze frame in MVoT's look that count as walked on: those with enough red pixels.

    Args:
        frame: drawn or gold, of any size.
        n: cells of one side.
        least: share of a cell's pixels that must be red (r > 120, g and b < 109).
    """
    pixels = np.asarray(frame.convert("RGB").resize((_SPACE, _SPACE))).astype(int)
    red = (pixels[..., 0] > 120) & (pixels[..., 1] < 109) & (pixels[..., 2] < 109)
    edges = np.arange(n + 1) * _SIDE / n
    rows = ((_TOP + edges) * _SPACE / 480).round().astype(int)
    cols = ((_LEFT + edges) * _SPACE / 640).round().astype(int)
    share = [[red[rows[r] : rows[r + 1], cols[c] : cols[c + 1]].mean() for c in range(n)] for r in range(n)]
    return np.array(share) > least
