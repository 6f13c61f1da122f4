"""Solvers that do not look or do not read: what they are shown of an item, and how they learn to guess.

Quads are held together: a blind solver learns from some quads and is tested on others.

Legend: N items, K choices, F features of one choice, T items held back.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from mmroute.tasks._grid import DELTA, Cell, neighbours
from mmroute.tasks.base import Generated, Spec

__all__ = ["blind_scores", "clamped", "conditional_logit", "distance", "features", "held_back"]

_MAX_STEPS = 24
_Row = list[float | int]


def held_back(specs: Sequence[Spec]) -> Bool[np.ndarray, " N"]:
    """The last third of the units; the items of a quad stay together."""
    order: dict[str, int] = {}
    unit = np.array([order.setdefault(s.group or f"#{i}", len(order)) for i, s in enumerate(specs)])
    return unit >= len(order) * 2 // 3


def blind_scores(
    x: Float[np.ndarray, "N *K F"], answers: Int[np.ndarray, " N"], test: Bool[np.ndarray, " N"], num_choices: int
) -> Float[np.ndarray, "T K"]:
    """Scores of the choices of the items held back, by a linear solver that was fitted on the others."""
    known = x[~test]
    axes = tuple(range(x.ndim - 1))
    mean, scale = known.mean(axes), known.std(axes) + 1e-3
    x = ((x - mean) / scale).astype(np.float32)
    if x.ndim == 2:  # classes may differ in frequency; plates are exchangeable and have no such term
        x = np.concatenate([x, np.ones((len(x), 1), dtype=np.float32)], axis=1)
    weights = conditional_logit(x[~test], answers[~test], num_choices)
    return x[test] @ weights


def conditional_logit(
    x: Float[np.ndarray, "N *K F"], y: Int[np.ndarray, " N"], num_choices: int, steps: int = 150
) -> Float[np.ndarray, "F ..."]:
    """Weights of linear scores of the choices, fitted by softmax (Adam, ridge 1e-3).

    Args:
        x: features of every choice, which share their weights; or of the item, then each choice has its own.
        y: index of the right choice.
        num_choices: K.
        steps: of full-batch Adam at rate .05.
    """
    rows = np.arange(len(y))
    shared = x.ndim == 3
    w = np.zeros(x.shape[-1:] if shared else (x.shape[1], num_choices), dtype=np.float32)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, steps + 1):
        z = x @ w
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[rows, y] -= 1
        g = (np.tensordot(p, x, axes=2) if shared else x.T @ p) / len(y) + 1e-3 * w
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    return w


def features(task: Generated, specs: Sequence[Spec], kind: str) -> Float[np.ndarray, "N *K F"]:
    """What a blind solver sees: of each plate of a maze, else of the item.

    Args:
        task: what the specs came from.
        specs: items with the same number of choices.
        kind: `text` (the question alone), `image` (the picture alone), or `plates` (maze: the list and where start and
            plates are, without walls).
    """
    if task.name == "maze" and kind in ("image", "plates"):
        rows = [_plates_by_picture(s) if kind == "image" else _plates_by_list(s) for s in specs]
        return np.array(rows, dtype=np.float32)
    make = {
        ("frozenlake", "image"): _lake,
        ("arrows", "image"): _arrow_chain,
        ("gridspatial", "image"): _objects,
        ("gridspatial", "text"): _names,
        ("minibehavior", "text"): _errand,
        ("minibehavior", "image"): _room,
        ("needle", "text"): _asked,
        ("needle", "image"): _glyphs,
        ("arrows", "text"): lambda s: _hot(s.n, 10) + _hot(s.world["k"], _MAX_STEPS + 1),
    }.get((task.name, kind), _moves)
    return np.array([make(s) for s in specs], dtype=np.float32)


def _hot(value: int, size: int) -> _Row:
    """One-hot; beyond the last place counts as the last."""
    return [float(i == min(max(value, 0), size - 1)) for i in range(size)]


def distance(a: Sequence[int], b: Sequence[int]) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _displaced(s: Spec) -> Cell:
    moves = [DELTA[a] for a in s.world["actions"]]
    return s.world["start"][0] + sum(d for d, _ in moves), s.world["start"][1] + sum(r for _, r in moves)


def clamped(s: Spec) -> Cell:
    row, col = s.world["start"]
    for a in s.world["actions"]:
        row, col = min(max(row + DELTA[a][0], 0), s.n - 1), min(max(col + DELTA[a][1], 0), s.n - 1)
    return row, col


def _moves(s: Spec) -> _Row:
    """A list of moves: length, counts, displacement, bigrams, reversals."""
    moves = s.world["actions"]
    counts = [moves.count(a) for a in range(4)]
    down, right = abs(counts[2] - counts[0]), abs(counts[3] - counts[1])
    pairs = list(pairwise(moves))
    back = sum((a - b) % 4 == 2 for a, b in pairs)
    bigrams = [pairs.count((a, b)) / 4 for a in range(4) for b in range(4)]
    straight = float(down + right == len(moves))
    ends = _hot(moves[-1], 4) + _hot(moves[0], 4)
    by_size = [x * (s.n == n) for n in range(3, 9) for x in (1.0, len(moves) / 12, (down + right) / 6, back / 4)]
    return [*_hot(len(moves), _MAX_STEPS + 1), *counts, down, right, straight, back, *bigrams, *ends, *by_size]


def _lake(s: Spec) -> _Row:
    """A lake without its list: sizes, holes, what lies next to start and goal, how far they are apart."""
    w = s.world
    grid, start, goal = w["grid"], tuple(w["start"]), tuple(w["goal"])
    holes = sum(map(sum, grid))
    beside = [sum(grid[r][c] for _, (r, c) in neighbours(x, s.n)) for x in (start, goal)]
    ways = [len(neighbours(x, s.n)) for x in (start, goal)]
    walked = _walks(s.n, start, lambda x: not grid[x[0]][x[1]]).get(goal, 0)
    direct = distance(start, goal)
    local = [x for b, v in zip(beside, ways, strict=True) for x in (*_hot(b, 5), *_hot(v, 5), *_hot(v - b, 5))]
    near = [grid[r][c] for r in range(s.n) for c in range(s.n) if distance((r, c), start) == 2]
    return [
        *_hot(s.n, 9),
        holes,
        holes / s.n**2,
        *local,
        *_hot(direct, 12),
        *_hot(walked, 16),
        walked - direct,
        sum(near),
    ]


def _walks(n: int, start: Cell, is_free: Any) -> dict[Cell, int]:
    """Length of the shortest walk to each cell that can be reached."""
    far, todo = {start: 0}, [start]
    for cell in todo:
        for _, q in neighbours(cell, n):
            if q not in far and is_free(q):
                far[q] = far[cell] + 1
                todo.append(q)
    return far


def _maze_walks(s: Spec) -> dict[Cell, int]:
    board, start = s.world["board"], tuple(s.world["start"])
    if s.world["walls"] == "tiles":
        return _walks(s.n, start, lambda x: not board[x[0]][x[1]])
    far, todo = {start: 0}, [start]
    for cell in todo:
        for a, q in neighbours(cell, s.n):
            if q not in far and not board[cell[0]][cell[1]] >> a & 1:
                far[q] = far[cell] + 1
                todo.append(q)
    return far


def _ranked(values: Sequence[float | int], size: int) -> list[_Row]:
    """For each choice, one-hot of how many others are smaller, and of how many are equal."""
    return [_hot(sum(o < v for o in values), size) + _hot(sum(o == v for o in values) - 1, size) for v in values]


def _plates_by_picture(s: Spec) -> list[_Row]:
    """Each plate: distance and walk from the start, walls around it, other plates near it, and its rank in all."""
    start, plates = tuple(s.world["start"]), [tuple(p) for p in s.world["plates"]]
    far = _maze_walks(s)
    walked = [far.get(p, 0) for p in plates]
    direct = [distance(start, p) for p in plates]
    others = [[distance(p, q) for q in plates if q != p] for p in plates]
    close = [float(sum(o)) for o in others]
    touching = [sum(d == 1 for d in o) for o in others]
    if s.world["walls"] == "tiles":
        degree = [sum(not s.world["board"][r][c] for _, (r, c) in neighbours(p, s.n)) for p in plates]
    else:
        degree = [4 - s.world["board"][p[0]][p[1]].bit_count() for p in plates]
    ranks = [_ranked(x, 4) for x in (walked, direct, close, degree)]
    rows = []
    for i in range(4):
        own = [*_hot(walked[i], 14), *_hot(direct[i], 12), *_hot(degree[i], 5), *_hot(touching[i], 4), close[i] / 10]
        parity = [(direct[i] % 2) * 1.0, (walked[i] - direct[i]) / 4]
        rows.append(own + parity + [x for r in ranks for x in r[i]])
    return rows


def _plates_by_list(s: Spec) -> list[_Row]:
    """Each plate: how far from where the list would end without walls, on its line, of its parity, and its ranks."""
    plates = [tuple(p) for p in s.world["plates"]]
    end, free_end = clamped(s), _displaced(s)
    start, moves = s.world["start"], s.world["actions"]
    near = [float(distance(end, p)) for p in plates]
    loose = [float(distance(free_end, p)) for p in plates]
    ranks = [_ranked(x, 4) for x in (near, loose)]
    rows = []
    for i, p in enumerate(plates):
        from_start = distance(start, p)
        parity = float((len(moves) - from_start) % 2)
        along = [float((p[0] - start[0]) * (end[0] - start[0]) > 0), float((p[1] - start[1]) * (end[1] - start[1]) > 0)]
        last = [
            float(p[0] in (0, s.n - 1) and moves[-1] in (0, 2)),
            float(p[1] in (0, s.n - 1) and moves[-1] in (1, 3)),
        ]
        own = [*_hot(int(near[i]), 12), *_hot(int(loose[i]), 12), *_hot(from_start, 12), parity, *along, *last]
        rows.append(own + [(from_start - len(moves)) / 6] + [x for r in ranks for x in r[i]])
    return rows


def _arrow_chain(s: Spec) -> _Row:
    """The colours along the arrows, as far as the chain goes, and how often each colour occurs."""
    w = s.world
    (row, col), colours = w["start"], []
    for _ in range(w["kmax"]):
        down, right = DELTA[w["arrows"][row][col]]
        row, col = row + down, col + right
        colours.append(w["colours"][row][col])
    count = Counter(c for line in w["colours"] for c in line)
    return [*_hot(s.n, 10), *(x for c in colours for x in _hot(c, 6)), *(count[c] / s.n**2 for c in range(6))]


def _objects(s: Spec) -> _Row:
    """Which kinds are where, by row and column means, without the question."""
    objects = s.world["objects"]
    kinds = [float(any(4 * c + f == k for c, f, _, _ in objects)) for k in range(24)]
    rows = [sum(r for c, f, r, _ in objects if 4 * c + f == k) / s.n for k in range(24)]
    cols = [sum(q for c, f, _, q in objects if 4 * c + f == k) / s.n for k in range(24)]
    return [*_hot(s.n, 10), *_hot(len(objects), 8), *kinds, *rows, *cols]


def _names(s: Spec) -> _Row:
    """The question: relation, what it names in which place."""
    w = s.world
    relation = ("left_of", "right_of", "above", "below", "nearest", "between").index(w["relation"])
    named = [w["objects"][o] for o in (*w["targets"], *w["candidates"])]
    return [*_hot(s.n, 10), *_hot(relation, 6), *(x for c, f, _, _ in named[:2] for x in (*_hot(c, 6), *_hot(f, 4)))]


def _errand(s: Spec) -> _Row:
    """A list of moves and errands: length, counts, order, bigrams, displacement between the errands."""
    acts = s.world["actions"]
    counts = [acts.count(a) for a in range(7)]
    pairs = list(pairwise(acts))
    bigrams = [pairs.count((a, b)) / 4 for a in range(7) for b in range(7)]
    firsts = [x for a in (4, 5, 6) for x in _hot(acts.index(a) if a in acts else 20, 21)]
    order = [float(a in acts and b in acts and acts.index(a) < acts.index(b)) for a, b in ((4, 5), (5, 6), (4, 6))]
    ends = _hot(acts[-1], 7) + _hot(acts[0], 7)
    return [*_hot(s.n, 11), *_hot(len(acts), _MAX_STEPS + 1), *counts, *bigrams, *firsts, *order, *ends]


def _room(s: Spec) -> _Row:
    """A room without its list: how far start, printer and table are from each other, and what is around them."""
    w = s.world
    places = [tuple(w[what]) for what in ("start", "printer", "table")]
    far = [distance(a, b) for i, a in enumerate(places) for b in places[i + 1 :]]
    walls = [sum(w["walls"][r][c] for _, (r, c) in neighbours(p, s.n)) for p in places]
    sides = [float(np.sign(a[i] - b[i])) for a, b in (places[:2], places[1:]) for i in (0, 1)]
    return [*_hot(s.n, 11), *(x for d in far for x in _hot(d, 16)), *(x for k in walls for x in _hot(k, 5)), *sides]


def _asked(s: Spec) -> _Row:
    """The question of a needle: relation, shape of the target, the four colours in their order."""
    w = s.world
    relation = ("", "above", "below", "left_of", "right_of").index(w["relation"])
    shape = w["glyphs"][0][1]
    return [*_hot(relation, 5), *_hot(shape, 4), *(x for c in w["options"] for x in _hot(c, 6))]


def _glyphs(s: Spec) -> _Row:
    """The picture of a needle: how many glyphs of which colour and shape."""
    counts = Counter((c, f) for c, f, _, _ in s.world["glyphs"])
    return [*_hot(len(s.world["glyphs"]), 11), *(float(counts[c, f]) for c in range(6) for f in range(4))]
