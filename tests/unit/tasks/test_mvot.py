"""MVoT's tree: what is read and written again is the same, byte for byte; what contradicts itself is named."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from made import picture, sample
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

from mmroute import hub
from mmroute.errors import InputError
from mmroute.tasks._mvot_export import to_mvot
from mmroute.tasks._mvot_import import from_mvot
from mmroute.tasks._mvot_rows import rows
from mmroute.tasks._pictures import open_image
from mmroute.tasks.base import Generated

# A 3 x 3 spanning tree: a comb that hangs from the top row.
PASSAGES_DOWN = "TTTTTTFFF"
PASSAGES_RIGHT = "TTFFFFFFF"


def _maze_entry(path_id, cells, moves, candidates):
    return {
        "path_id": path_id,
        "grid_num": 3,
        "path_locs": cells,
        "file_prefix": f"maze/grid3/path_{path_id}",
        "action_list": [f"{m}-1" for m in moves],
        "candidate_locs": candidates,
        "maze_info": PASSAGES_DOWN + PASSAGES_RIGHT,
    }


def _noise(seed):
    """A picture that JPEG alters each time it is written."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8))


def _tree(root):
    """A tree as MVoT writes it: two mazes of one size, and two lakes with three episodes."""
    entries = [
        _maze_entry(0, [[1, 0], [0, 0], [0, 1], [1, 1]], ["up", "right", "down"], [[2, 2], [1, 1], [0, 0], [2, 0]]),
        _maze_entry(5, [[0, 2], [1, 2]], ["down"], [[1, 2], [2, 2], [0, 0], [0, 1]]),
    ]
    lakes = {
        # S F F      left 0, down 1, right 2, up 3
        # F H F
        # F F G
        "7": {
            "actions": [[1, 1, 2, 2], [2, 1]],
            "states": [[0, 3, 6, 7, 8], [0, 1, 4]],
            "rewards": [[0.0, 0.0, 0.0, 1.0], [0.0, 0.0]],
            "data_id": [3, 1],
            "env_desc": "SFFFHFFFG",
            "exec_states": ["success", "terminated"],
            "additional_actions": [[0, 3], []],
        },
        "2": {
            "actions": [[0, 2]],
            "states": [[0, 0, 1]],  # the first move leaves the board, so nothing happens
            "rewards": [[0.0, 0.0]],
            "data_id": [0],
            "env_desc": "FFFFFHHGF",
            "exec_states": ["truncated"],
            "additional_actions": [[1]],
        },
    }
    (root / "maze/grid3").mkdir(parents=True)
    (root / "maze/grid3.json").write_text(json.dumps(entries))
    for entry in entries:
        for k in range(1, len(entry["path_locs"]) + 1):
            _noise(k).save(root / f"{entry['file_prefix']}_{k}.jpg")
    for env in lakes.values():
        for data_id, states in zip(env["data_id"], env["states"], strict=True):
            (root / f"frozenlake/level3/{data_id}").mkdir(parents=True)
            for k in range(len(states)):
                picture(40 + k).save(root / f"frozenlake/level3/{data_id}/{k}.png")
    (root / "frozenlake/level3/data.json").write_text(json.dumps(lakes))
    return root


@pytest.fixture
def tree(tmp_path):
    return _tree(tmp_path / "tree")


def _files(root):
    return {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}


def test_a_tree_that_is_read_and_written_is_the_same_tree(tree, tmp_path):
    assert to_mvot(from_mvot(tree), tmp_path / "again") == 5
    one, two = _files(tree), _files(tmp_path / "again")
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith(".json"):
            assert json.loads(one[name].read_text()) == json.loads(two[name].read_text())
        else:
            assert one[name].read_bytes() == two[name].read_bytes()


def test_what_is_written_and_read_is_the_same_sample(tree, tmp_path):
    first = list(from_mvot(tree))
    to_mvot(first, tmp_path / "again")
    second = list(from_mvot(tmp_path / "again"))
    assert [dataclasses.replace(s, images=[]) for s in first] == [dataclasses.replace(s, images=[]) for s in second]
    for a, b in zip(first, second, strict=True):
        assert [p.read_bytes() for p in a.images] == [p.read_bytes() for p in b.images]


def test_an_imported_trajectory_says_what_the_tree_says(tree):
    maze, _, won, fell, safe = from_mvot(tree)
    assert (maze.task, maze.answer, [c.label for c in maze.choices]) == ("maze", "B", ["A", "B", "C", "D"])
    assert [h.text for h in maze.hops] == ["Go up.", "Go right.", "Go down."]
    assert [h.state for h in maze.hops] == ["r0c0", "r0c1", "r1c1"]
    assert [h.image for h in maze.hops] == [1, 2, 3]
    assert maze.images[0].name == "path_0_1.jpg"
    assert [s.answer for s in (won, fell, safe)] == ["A", "B", "C"]
    assert won.meta["spec"]["world"]["actions"] == [2, 2, 3, 3, 1, 0], "what is not executed stands in the prompt too"
    assert safe.meta["spec"]["world"]["actions"] == [1, 3]
    assert [h.state for h in safe.hops] == ["r0c0", "r0c1"]


def test_the_files_have_mvots_names_keys_and_types(tree, tmp_path):
    to_mvot(from_mvot(tree), tmp_path / "out")
    (entry, _) = json.loads((tmp_path / "out/maze/grid3.json").read_text())
    assert {k: type(v).__name__ for k, v in entry.items()} == {
        "path_id": "int",
        "grid_num": "int",
        "path_locs": "list",
        "file_prefix": "str",
        "action_list": "list",
        "candidate_locs": "list",
        "maze_info": "str",
    }
    level = json.loads((tmp_path / "out/frozenlake/level3/data.json").read_text())
    for env in level.values():
        lists = {k: len(v) for k, v in env.items() if k != "env_desc"}
        assert lists.keys() == {"actions", "states", "rewards", "data_id", "exec_states", "additional_actions"}
        assert len(set(lists.values())) == 1, "all lists run over the same episodes"
        assert all(len(s) == len(a) + 1 for s, a in zip(env["states"], env["actions"], strict=True))


def test_samples_without_ids_of_a_tree_get_free_ones(tree, tmp_path):
    items = list(from_mvot(tree))
    anonymous = [dataclasses.replace(s, meta={k: v for k, v in s.meta.items() if k != "mvot"}) for s in items]
    to_mvot([*items, *anonymous, items[0]], tmp_path / "out")
    entries = json.loads((tmp_path / "out/maze/grid3.json").read_text())
    assert [e["path_id"] for e in entries] == [0, 5, 6, 7, 8], "an id that is taken is not given twice"
    level = json.loads((tmp_path / "out/frozenlake/level3/data.json").read_text())
    ids = [i for env in level.values() for i in env["data_id"]]
    assert len(ids) == len(set(ids)) == 6
    rewards = [r for env in level.values() for run in env["rewards"] for r in run]
    assert sum(rewards) == 2, "one at the goal, whether it came from a tree or from us"
    assert len(list(from_mvot(tmp_path / "out"))) == 11


def test_a_trajectory_of_t_moves_gives_2t_plus_1_rows(tree):
    for item in from_mvot(tree):
        made = rows(item)
        assert len(made) == 2 * len(item.hops) + 1
        assert sum(r.kind == "single_step_visualization" for r in made) == len(item.hops)
        assert [bool(r.label) for r in made] == [False] * (len(made) - 1) + [True]
        assert all(r.source.count("<image>") == len(r.images) <= 2 for r in made)
        assert all((r.target == "<image>") == (r.target_image >= 0) for r in made)


def test_actions_accumulate_and_only_the_latest_thought_image_stays(tree):
    first, *_ = from_mvot(tree)
    made = rows(first)
    done = [r.source.split("Response: ")[1] for r in made]
    assert done == [
        "",
        "Go up. ",
        "Go up. <image>",
        "Go up. <image>Go right. ",
        "Go up. Go right. <image>",
        "Go up. Go right. <image>Go down. ",
        "Go up. Go right. Go down. <image>",
    ]
    assert [r.images for r in made] == [[0], [0], [0, 1], [0, 1], [0, 2], [0, 2], [0, 3]]
    assert [r.target_image for r in made] == [-1, 1, -1, 2, -1, 3, -1]
    assert made[0].target == "Go up."
    assert made[-1].target == "Action sequence finished. The answer is B."


def test_the_lake_names_its_options_and_says_stopped(tree):
    won = list(from_mvot(tree))[2]
    last = rows(won)[-1]
    assert last.target == "Action sequence stopped. The answer is A."
    assert "Go right. Go right. Go left. Go up.\nInitial State: <image>\nResponse: " in last.source
    safe = list(from_mvot(tree))[4]
    assert "Action sequence: Go left. Go right. Go down.\n" in rows(safe)[0].source
    assert last.source.index("Options:") < last.source.index("Action sequence:")


def test_rows_need_a_picture_for_every_hop(tree):
    first, *_ = from_mvot(tree)
    bare = dataclasses.replace(first, hops=[dataclasses.replace(h, image=-1) for h in first.hops])
    with pytest.raises(InputError, match=r"--set task.hop_images=observed"):
        rows(bare)


@pytest.mark.parametrize("options", [{"preset": "mvot"}, {"preset": "tiny", "skin": "tiles", "coords": "board"}])
@pytest.mark.parametrize("name", ["maze", "frozenlake"])
def test_what_our_worlds_make_comes_back_with_the_same_content(tmp_path, monkeypatch, name, options):
    # A world without MVoT's look would refuse to draw; the look itself is not what is tested here.
    monkeypatch.setattr(Generated, "_mvot", lambda self, spec, state: picture(state.step))
    task = hub.load("tasks", name, hop_text="action", **options)
    made = list(task.samples("val", 6))
    to_mvot(made, tmp_path / "tree")
    back = list(from_mvot(tmp_path / "tree"))

    def content(item):
        return (item.question, item.choices, item.answer_index, [(h.text, h.state) for h in item.hops])

    assert sorted(map(content, made), key=repr) == sorted(map(content, back), key=repr)  # a tree sorts by size
    assert all(len(rows(s)) == 2 * len(s.hops) + 1 for s in back)
    if options["preset"] == "mvot":  # a split is a function of the layout; of wall tiles a tree keeps passages only
        assert {s.split for s in back} == {"val"}


# ---------------------------------------------------------------------- what can go wrong


def _change_maze(tree, **changes):
    path = tree / "maze/grid3.json"
    entries = json.loads(path.read_text())
    entries[1] |= changes
    path.write_text(json.dumps(entries))


def _change_lake(tree, **changes):
    path = tree / "frozenlake/level3/data.json"
    level = json.loads(path.read_text())
    level["7"] |= changes
    path.write_text(json.dumps(level))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path_locs": [[0, 2], [2, 2]]}, r"entry 1: the moves lead through .* --from mvot-dare"),
        ({"action_list": ["down-1", "up-1"]}, "entry 1: 2 moves need 3 states, given 2"),
        ({"action_list": ["north-1"]}, "entry 1: not as MVoT writes it"),
        ({"maze_info": "TF"}, "maze_info is 18 letters T or F"),
        ({"maze_info": "F" * 8 + "T" + "F" * 9}, r"maze_info opens cell \(2, 2\) towards the outside"),
        ({"candidate_locs": [[1, 2], [2, 7], [0, 0], [0, 1]]}, r"cell \(2, 7\) is not on a board of 3 x 3"),
        ({"candidate_locs": [[0, 0]]}, "entry 1: not as MVoT writes it"),
        ({"file_prefix": "../outside"}, "leaves the folder"),
        ({"file_prefix": "maze/grid3/path_9"}, r"picture 'maze/grid3/path_9_1.jpg' is missing"),
        ({"path_locs": None}, "entry 1: not as MVoT writes it: TypeError"),
    ],
)
def test_a_maze_that_contradicts_itself_is_named(tree, changes, message):
    _change_maze(tree, **changes)
    with pytest.raises(InputError, match=message):
        list(from_mvot(tree))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": [[0, 3, 6, 7, 8], [0, 1, 2]]}, "7: episode 1: the moves lead through"),
        ({"states": [[0, 3, 6, 7, 9], [0, 1, 4]]}, r"cell \(3, 0\) is not on a board of 3 x 3"),
        ({"actions": [[1, 1, 2, -1], [2, 1]]}, "episode 0: not as MVoT writes it"),
        ({"env_desc": "SFFF"}, "env_desc is a square of S, F, H and one G"),
        ({"exec_states": ["won", "lost"]}, "exec_states is one of success, terminated, truncated, given 'won'"),
        ({"data_id": [3]}, "episode 1: not as MVoT writes it: IndexError"),
        ({"data_id": [4, 1]}, r"picture '4/0.png' is missing"),
        ({"actions": [[1, 1, 2, 9], [2, 1]]}, "episode 0: not as MVoT writes it"),
    ],
)
def test_a_lake_that_contradicts_itself_is_named(tree, changes, message):
    _change_lake(tree, **changes)
    with pytest.raises(InputError, match=message):
        list(from_mvot(tree))


def test_an_outcome_the_board_contradicts_is_named(tree):
    _change_lake(tree, exec_states=["terminated", "terminated"])
    with pytest.raises(InputError, match=r"episode 0: .* ends in success, not terminated"):
        list(from_mvot(tree))


def test_untrusted_trees_are_read_as_they_stand_and_flagged(tree, tmp_path):
    _change_maze(tree, path_locs=[[0, 2], [1, 1]], candidate_locs=[[1, 1], [2, 2], [0, 0], [0, 1]])
    items = list(from_mvot(tree, trusted=False))
    assert all(s.meta["untrusted_labels"] for s in items)
    assert items[1].hops[0].state == "r1c1"
    to_mvot(items, tmp_path / "again")
    assert json.loads((tmp_path / "again/maze/grid3.json").read_text())[1]["path_locs"] == [[0, 2], [1, 1]]


def test_trees_that_are_none_say_so(tmp_path):
    with pytest.raises(InputError, match="is no MVoT tree"):
        from_mvot(tmp_path)
    (tmp_path / "maze").mkdir()
    (tmp_path / "maze/grid3.json").write_text("{")
    with pytest.raises(InputError, match=r"grid3.json: not JSON"):
        list(from_mvot(tmp_path))
    (tmp_path / "maze/grid3.json").write_text("{}")
    with pytest.raises(InputError, match="a JSON list is expected"):
        list(from_mvot(tmp_path))


def test_one_task_alone_is_a_tree_too(tree):
    shutil.rmtree(tree / "maze")
    assert {s.task for s in from_mvot(tree)} == {"frozenlake"}


def test_samples_the_format_cannot_hold_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds maze and frozenlake, this is arrows"):
        to_mvot([sample(task="arrows")], tmp_path / "x")
    with pytest.raises(InputError, match="meta has no spec"):
        to_mvot([sample()], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_maze_pictures_become_jpeg_and_lake_pictures_png(tree, tmp_path):
    items = [dataclasses.replace(s, images=[open_image(p) for p in s.images]) for s in from_mvot(tree)]
    to_mvot(items, tmp_path / "out")
    with Image.open(tmp_path / "out/maze/grid3/path_0_1.jpg") as maze:
        assert maze.format == "JPEG"
        assert get_sampling(maze) == 0, "thin coloured lines survive only without chroma subsampling"
    with Image.open(tmp_path / "out/frozenlake/level3/3/4.png") as lake:
        assert (lake.format, lake.tobytes()) == ("PNG", picture(44).tobytes())
