"""The rules of single worlds."""

import json

import numpy as np
import pytest
from worlds import WORLDS, specs

from mmroute import hub
from mmroute.tasks._texts import COLOURS, SHAPES


def test_maze_quads_have_two_boards_two_permuted_lists_and_four_ends() -> None:
    task = hub.load("tasks", "maze")
    for unit in range(30):
        quad = specs(task, "val", 4, 4 * unit)
        assert sorted(s.answer for s in quad) == [0, 1, 2, 3]
        assert len({json.dumps(s.world["board"]) for s in quad}) == 2
        lists = {tuple(s.world["actions"]) for s in quad}
        assert len(lists) == 2
        assert len({tuple(sorted(x)) for x in lists}) == 1
        assert len({json.dumps(s.world["plates"]) for s in quad}) == 1
        for s in quad:
            assert s.world["start"] not in s.world["plates"]
            assert s.n >= 4
            assert sum(x.event == "wall" for x in task.trace(s)) <= len(s.world["actions"]) // 2 + 1
            same_board = [x for x in quad if x.world["board"] == s.world["board"]]
            assert len({(x.seed, x.offset) for x in same_board}) == 1  # they share their picture


def test_lake_quads_swap_their_two_classes() -> None:
    task = hub.load("tasks", "frozenlake")
    pairs = []
    for unit in range(24):
        quad = specs(task, "val", 4, 4 * unit)
        table: dict[str, dict[str, int]] = {}
        for s in quad:
            table.setdefault(json.dumps(s.world["grid"]) + json.dumps(s.world["goal"]), {})[
                json.dumps(s.world["actions"])
            ] = s.answer
        (first, second) = table.values()
        assert set(first) == set(second)
        assert len(set(first.values())) == 2
        assert all(first[k] != second[k] for k in first)
        pairs.append(frozenset(first.values()))
    assert {p: pairs.count(p) for p in pairs} == dict.fromkeys(
        (frozenset((0, 1)), frozenset((0, 2)), frozenset((1, 2))), 8
    )


@pytest.mark.parametrize("name", ["maze", "frozenlake"])
def test_no_listed_move_that_is_executed_points_off_the_board(name: str) -> None:
    task = hub.load("tasks", name)
    for spec in [*specs(task, "train", 100), *specs(task, "test", 100)]:
        for state, action in zip(task.trace(spec)[:-1], spec.world["actions"], strict=False):
            row, col = state.cell
            down, right = ((-1, 0), (0, -1), (1, 0), (0, 1))[action]
            assert 0 <= row + down < spec.n
            assert 0 <= col + right < spec.n


def test_arrow_chains_never_cross_and_carry_each_colour_once() -> None:
    task = hub.load("tasks", "arrows")
    ks = []
    for spec in specs(task, "test", 300):
        w = spec.world
        cell, chain = tuple(w["start"]), []
        for _ in range(6):
            down, right = ((-1, 0), (0, -1), (1, 0), (0, 1))[w["arrows"][cell[0]][cell[1]]]
            cell = (cell[0] + down, cell[1] + right)
            chain.append(cell)
        assert len({*chain, tuple(w["start"])}) == 7
        assert sorted(w["colours"][r][c] for r, c in chain) == list(range(6))
        ks.append(w["k"])
    assert np.abs(np.bincount(ks, minlength=7)[1:] - 50).max() < 28  # 4 sigma


def test_gridspatial_quads_mirror_the_board_and_invert_the_relation() -> None:
    task = hub.load("tasks", "gridspatial")
    kinds = set()
    for unit in range(40):
        quad = specs(task, "val", 4, 4 * unit)
        kinds.add(quad[0].world["relation"])
        if len(task.choices(quad[0])) == 4:
            assert sorted(s.answer for s in quad) == [0, 1, 2, 3]
            continue
        by_relation: dict[str, list[int]] = {}
        for s in quad:
            by_relation.setdefault(s.world["relation"], []).append(s.answer)
        assert len(by_relation) == 2
        assert all(sorted(x) == [0, 1] for x in by_relation.values())
    assert kinds >= {"nearest", "between"}


def test_gridspatial_distractors_share_a_colour_or_a_shape() -> None:
    for spec in specs(hub.load("tasks", "gridspatial"), "train", 100):
        kinds = [(c, s) for c, s, _, _ in spec.world["objects"]]
        assert len(set(kinds)) == len(kinds)
        assert all(c < len(COLOURS) and s < len(SHAPES) for c, s in kinds)
        assert all(any(a != b and (a[0] == b[0] or a[1] == b[1]) for b in kinds) for a in kinds)


def test_classes_of_the_lake_stream_are_even_at_every_length() -> None:
    task, rng = hub.load("tasks", "frozenlake"), np.random.default_rng(0)
    for n, length in ((3, 1), (4, 4), (6, 12)):
        counts = np.bincount([task.stream(rng, n, length).answer for _ in range(600)], minlength=3)
        assert np.abs(counts - 200).max() < 4 * np.sqrt(600 * 2 / 9)


@pytest.mark.parametrize("name", WORLDS)
def test_streamed_items_have_the_size_and_length_asked_for(name: str) -> None:
    task, rng = hub.load("tasks", name), np.random.default_rng(0)
    for n in task.sizes:
        for length in (1, task.max_length(n)):
            spec = task.stream(rng, n, length)
            assert spec.n == n
            if name in ("maze", "frozenlake", "arrows"):  # elsewhere a length is a kind of question, or a least one
                assert len(spec.world.get("actions", [0] * spec.world.get("k", 0))) == length
