"""Items of the generated worlds: reproducible, in disjoint splits, of the levels and options asked for."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from worlds import SEARCHED, WITHOUT, WORLDS, digest, specs

from mmroute import hub
from mmroute.errors import ConfigError, InputError
from mmroute.tasks._grid import canonical, layout_hash, split_of
from mmroute.tasks._presets import PRESETS, level_of
from mmroute.tasks.base import Spec, State, group_accuracy

GOLDEN = Path(__file__).parents[2] / "golden" / "specs.json"


@pytest.mark.parametrize("name", SEARCHED)
def test_first_specs_of_every_preset_are_the_golden_ones(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())
    for preset in PRESETS:
        if (name, preset) not in WITHOUT:
            assert digest(hub.load("tasks", name, preset=preset)) == golden[f"{name}:{preset}"], preset


@pytest.mark.parametrize("name", WORLDS)
def test_a_spec_is_the_same_alone_and_in_a_run(name: str) -> None:
    task = hub.load("tasks", name)
    in_a_run = [task.spec("val", i) for i in range(10)]
    alone = [hub.load("tasks", name).spec("val", i) for i in (9, 3, 0)]
    assert [in_a_run[i].to_json() for i in (9, 3, 0)] == [s.to_json() for s in alone]
    assert len({s.to_json() for s in in_a_run}) == 10


def test_specs_do_not_depend_on_hash_randomisation() -> None:
    code = (
        "from mmroute import hub; import hashlib;"
        "print([hashlib.sha256(hub.load('tasks', t).spec(s, 5).to_json().encode()).hexdigest()"
        f" for t in {WORLDS} for s in ('train', 'val', 'test')])"
    )
    out = [
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert out[0] == out[1] != b""


@pytest.mark.parametrize("name", WORLDS)
def test_seeds_splits_and_presets_give_other_items(name: str) -> None:
    first = {
        hub.load("tasks", name, **given).spec(split, 0).to_json()
        for given in ({}, {"seed": 1}, {"preset": "wide"})
        for split in ("train", "val", "test")
    }
    assert len(first) == 9


@pytest.mark.parametrize("name", WORLDS)
def test_a_spec_survives_json_and_a_task_survives_pickling(name: str) -> None:
    task = hub.load("tasks", name)
    spec = task.spec("test", 3)
    assert Spec.from_dict(json.loads(spec.to_json())) == spec
    assert pickle.loads(pickle.dumps(task)).spec("test", 3) == spec
    with pytest.raises(InputError, match="not a spec"):
        Spec.from_dict({"offset": [0, 0], "fog": [], "task": "maze"})


@pytest.mark.parametrize("name", SEARCHED)
def test_every_layout_hashes_into_its_split_and_no_layout_is_in_two(name: str) -> None:
    task = hub.load("tasks", name)
    seen = {split: {s.layout_hash for s in specs(task, split, 200)} for split in ("train", "val", "test")}
    for split, hashes in seen.items():
        assert {split_of(h) for h in hashes} == {split}
    rng = np.random.default_rng(0)
    streamed = {split_of(task.stream(rng, n, 2).layout_hash) for n in task.sizes for _ in range(50)}
    assert streamed == {"train"}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORLDS)
def test_many_thousand_items_share_no_layout_between_splits(name: str) -> None:
    task = hub.load("tasks", name)
    count = 1_000 if name == "minibehavior" else 20_000  # its rooms are searched for, two orders slower than the rest
    seen = [{s.layout_hash for s in specs(task, split, count)} for split in ("train", "val", "test")]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


@pytest.mark.parametrize("name", ["maze", "frozenlake", "gridspatial"])
def test_a_quad_lies_in_one_split_and_shares_two_layouts(name: str) -> None:
    task = hub.load("tasks", name)
    for unit in range(6):
        quad = specs(task, "test", 4, 4 * unit)
        assert len({s.group for s in quad}) == 1
        assert {split_of(s.layout_hash) for s in quad} == {"test"}
        # a mirrored board is the same layout
        assert len({s.layout_hash for s in quad}) == (1 if name == "gridspatial" else 2)


def test_the_eight_symmetries_of_a_board_have_one_hash() -> None:
    rng = np.random.default_rng(0)
    board = rng.integers(0, 4, (5, 5))
    keys = {layout_hash("x", 5, canonical(b)) for k in range(4) for b in (np.rot90(board, k), np.rot90(board.T, k))}
    assert len(keys) == 1
    assert layout_hash("x", 5, canonical(board + 1)) not in keys


def test_a_turned_maze_or_arrow_board_turns_its_directions() -> None:
    from mmroute.tasks import arrows, maze
    from mmroute.tasks._grid import spanning_tree

    rng = np.random.default_rng(0)
    walls = np.array(spanning_tree(rng, 4))
    turned = np.rot90(((walls << 1) | (walls >> 3)) & 15)  # up becomes left: bit a moves to a + 1
    assert maze._key("edges", walls.tolist()) == maze._key("edges", turned.tolist())
    assert maze._key("edges", walls.tolist()) != maze._key("edges", np.rot90(walls).tolist())
    ways, colours = rng.integers(4, size=(4, 4)), rng.integers(6, size=(4, 4))
    turned_key = arrows._key(np.rot90((ways + 1) % 4).tolist(), np.rot90(colours))
    assert arrows._key(ways.tolist(), colours) == turned_key
    assert arrows._key(ways.tolist(), colours) != arrows._key(np.rot90(ways).tolist(), np.rot90(colours))


@pytest.mark.parametrize("name", ["maze", "frozenlake"])
def test_no_two_held_out_items_ask_the_same_of_the_same_board(name: str) -> None:
    made = specs(hub.load("tasks", name), "test", 400)
    assert len({json.dumps(s.world, sort_keys=True) for s in made}) == 400


def test_levels_of_held_out_mazes_come_in_the_stated_shares() -> None:
    task = hub.load("tasks", "maze")
    levels = [task._difficulty(s, task.trace(s))["level"] for s in specs(task, "val", 400)]
    share = {x: levels.count(x) / len(levels) for x in ("easy", "medium", "hard")}
    assert share["easy"] == pytest.approx(0.40, abs=0.15)
    assert share["hard"] == pytest.approx(0.25, abs=0.15)
    assert level_of(12, 6, 0.3, 0.02) == (0.72, "hard")


def test_wrong_options_say_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="nano"):
        hub.load("tasks", "maze", preset="huge")
    with pytest.raises(ConfigError, match="variant"):
        hub.load("tasks", "arrows", variant="mvot")
    with pytest.raises(ConfigError, match="no such option"):
        hub.load("tasks", "arrows", varant="quad")
    with pytest.raises(ConfigError, match="another preset"):
        hub.load("tasks", "gridspatial", preset="ood-hops").spec("test", 0)
    with pytest.raises(ConfigError, match="train, val, test"):
        hub.load("tasks", "maze").spec("dev", 0)
    with pytest.raises(ConfigError, match="give n"):
        list(hub.load("tasks", "maze").samples("train"))
    with pytest.raises(ConfigError, match="mvot skin"):
        hub.load("tasks", "arrows", skin="mvot").draw(hub.load("tasks", "arrows").spec("val", 0))


def test_samples_come_in_order_from_an_offset() -> None:
    task = hub.load("tasks", "arrows", preset="nano")
    assert [s.id for s in task.samples("val", 2, offset=198)] == [
        "arrows-v1-nano-val-000198",
        "arrows-v1-nano-val-000199",
    ]
    assert len(list(task.samples("val", offset=197))) == 3


def test_a_group_counts_when_all_of_it_is_right() -> None:
    assert group_accuracy(["a", "a", "b", "", ""], [1, 0, 1, 1, 0]) == 0.5


def test_states_that_look_alike_are_equal() -> None:
    assert State((1, 2), 3, "ice") == State((1, 2), 4, "hole") != State((1, 1), 3, "ice")
