"""Needle: one tile decides, every letter is right once in a quad, and the target is the only one of its shape."""

import json

import numpy as np
from worlds import specs

from mmroute import hub
from mmroute.tasks._grid import split_of


def test_quads_share_scene_and_question_and_have_each_letter_once():
    task = hub.load("tasks", "needle")
    for unit in range(20):
        quad = specs(task, "test", 4, 4 * unit)
        assert sorted(s.answer for s in quad) == [0, 1, 2, 3]
        assert len({task.question(s) for s in quad}) == 1
        assert len({s.layout_hash for s in quad}) == 1
        assert split_of(quad[0].layout_hash) == "test"
        asked = task._asked(quad[0])
        rest = {json.dumps([g if i != asked else g[1:] for i, g in enumerate(s.world["glyphs"])]) for s in quad}
        assert len(rest) == 1


def test_the_target_alone_has_its_shape_and_the_neighbour_lies_where_it_is_said():
    task = hub.load("tasks", "needle")
    counts = set()
    for spec in specs(task, "train", 200):
        glyphs, relation = spec.world["glyphs"], spec.world["relation"]
        assert sum(g[1] == glyphs[0][1] for g in glyphs) == 1
        assert len({(g[2], g[3]) for g in glyphs}) == len(glyphs)
        counts.add(task._distractors(spec))
        if relation:
            down, right = {"above": (-1, 0), "below": (1, 0), "left_of": (0, -1), "right_of": (0, 1)}[relation]
            assert (glyphs[1][2], glyphs[1][3]) == (glyphs[0][2] + down, glyphs[0][3] + right)
    assert counts == set(range(9))


def test_a_question_names_the_shape_and_asks_one_tile_in_256():
    task = hub.load("tasks", "needle")
    spec = next(s for s in specs(task, "val", 40) if s.world["relation"] == "left_of")
    shape = task._name(spec, 0)[1]
    assert f"Which colour is the shape directly left of the only {shape}?" in task.question(spec)
    needed = {t for hop in range(len(task.trace(spec)) + 1) for t in task.relevant(spec, hop)}
    assert (len(needed), task.codes(spec).size) == (2, 256)
    assert task.draw(spec).size == (448, 448)
    assert len(np.unique(task.codes(spec))) > 3


def test_small_presets_have_small_canvases():
    assert [hub.load("tasks", "needle", preset=p).spec("val", 0).canvas for p in ("nano", "tiny", "small")] == [
        4,
        8,
        16,
    ]
