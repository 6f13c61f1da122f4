"""Drawn thoughts are judged exactly on tiles; MVoT's pixel rule finds the way in its own frames."""

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
from worlds import WORLDS

from mmroute import hub
from mmroute.errors import InputError
from mmroute.tasks import _visual


def item(name):
    """An item whose every hop changes the picture: a blocked move would leave a copy of the last one right."""
    task = hub.load("tasks", name)
    for i in range(200):
        spec = task.spec("train", i)
        states = task.trace(spec)
        moved = all((task._codes(spec, a) != task._codes(spec, b)).any() for a, b in pairwise(states))
        if len(states) >= 3 and moved:
            return task, spec, states
    raise AssertionError


@pytest.mark.parametrize("name", WORLDS)
def test_gold_pictures_are_right_and_copies_of_the_last_one_are_not(name):
    task, spec, states = item(name)
    gold = [task.draw(spec, s) for s in states]
    hops = len(states) - 1
    assert _visual.judge_drawings(task, spec, gold[1:]) == _visual.Drawn(1.0, 0.0, hops, 1.0, hops)
    stale = _visual.judge_drawings(task, spec, gold[:-1])
    assert (stale.v_acc, stale.v_steps, stale.v_ratio) == (0.0, 0, 0.0)


def test_another_cell_that_changes_is_redundant_and_ends_the_run():
    task, spec, states = item("frozenlake")
    gold = [task.draw(spec, s) for s in states]
    free = next(c for c in np.ndindex(spec.n, spec.n) if c not in {s.cell for s in states})
    px, tile = task.config.tile_px, task.tile(spec, free)
    row, col = divmod(tile, spec.canvas)
    spoiled = gold[2].copy()
    spoiled.paste(gold[1].crop((0, 0, px, px)), (col * px, row * px))  # a background tile where the board was
    drawn = _visual.judge_drawings(task, spec, [gold[1], spoiled, *gold[3:]])
    hops = len(states) - 1
    assert drawn == _visual.Drawn(1.0, 1 / hops, 1, 1 / hops, hops)


def test_missing_pictures_count_as_wrong_and_too_many_are_refused():
    task, spec, states = item("maze")
    gold = [task.draw(spec, s) for s in states[1:]]
    drawn = _visual.judge_drawings(task, spec, gold[:1])
    assert (drawn.v_acc, drawn.v_steps) == (1 / len(gold), 1)
    with pytest.raises(InputError, match="hops of an item"):
        _visual.judge_drawings(task, spec, [*gold, gold[0]])
    with pytest.raises(InputError, match="the picture"):
        _visual.judge_drawings(task, spec, [gold[0].resize((8, 8))])


def test_the_pixel_rule_sees_the_cells_of_the_way():
    task = hub.load("tasks", "maze", preset="mvot")
    found = 0
    for i in range(20):
        spec = task.spec("val", i)
        states = task.trace(spec)
        way = np.zeros((spec.n, spec.n), dtype=bool)
        for s in states:
            way[s.cell] = True
        red = _visual.red_cells(task.draw(spec, states[-1]), spec.n)
        # the ends of the way hold half an arrow, which the rule may miss: that is its known fault
        inner = [s.cell for s in states[1:-1]]
        found += sum(bool(red[c]) for c in inner) == len(inner)
        assert not red[~way].any()
    assert found >= 15


def test_an_mvot_skin_cannot_be_judged_by_tiles():
    task = hub.load("tasks", "maze", preset="mvot")
    with pytest.raises(InputError, match="skin 'mvot'"):
        _visual.judge_drawings(task, task.spec("val", 0), [])


def test_measures_are_plain_numbers():
    assert [f.name for f in dataclasses.fields(_visual.Drawn)] == ["v_acc", "v_red", "v_steps", "v_ratio", "hops"]
