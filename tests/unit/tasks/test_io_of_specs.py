"""Folders of generated items: a spec is drawn again as its task draws it, and what cannot be is named."""

import json
import os

import pytest
from made import comparable, sample

from mmroute import hub
from mmroute.errors import ConfigError, InputError
from mmroute.tasks import _io


@pytest.fixture
def lake():
    return hub.load("tasks", "frozenlake", preset="nano", hop_images="observed")


def test_specs_are_drawn_again_as_the_task_draws_them(tmp_path, lake):
    assert _io.write_specs(lake, "test", 5, tmp_path / "specs") == 5
    drawn = [comparable(s) for s in _io.read(tmp_path / "specs")]
    assert drawn == [comparable(s) for s in lake.samples("test", 5)]
    assert sorted(os.listdir(tmp_path / "specs")) == ["specs.jsonl", "task.json"]


def test_a_generated_item_survives_every_format(tmp_path, lake):
    pytest.importorskip("pyarrow")
    for format in ("jsonl", "parquet"):
        _io.write(lake.samples("val", 4), tmp_path / format, format)
        assert [comparable(s) for s in _io.read(tmp_path / format)] == [comparable(s) for s in lake.samples("val", 4)]


def test_specs_of_a_stream_need_a_count(tmp_path):
    stream = hub.load("tasks", "frozenlake", preset="small")
    with pytest.raises(ConfigError, match="'train' has no fixed size; give n"):
        _io.write_specs(stream, "train", None, tmp_path / "specs")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop("seed"), r"specs.jsonl:2: not a spec"),
        (lambda r: r["world"].pop("goal"), r"specs.jsonl:2: frozenlake cannot draw this world: KeyError\('goal'\)"),
        (lambda r: r["world"].update(goal=[9, 9]), r"specs.jsonl:2: frozenlake cannot draw this world"),
        (lambda r: r.update(version=99), r"specs.jsonl:2: made by frozenlake-v99, this version of mmroute has"),
    ],
)
def test_a_broken_spec_is_named(tmp_path, lake, change, message):
    _io.write_specs(lake, "test", 3, tmp_path / "s")
    rows = [json.loads(line) for line in (tmp_path / "s" / "specs.jsonl").read_text().splitlines()]
    change(rows[1])
    (tmp_path / "s" / "specs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(InputError, match=message):
        list(_io.read(tmp_path / "s"))


@pytest.mark.parametrize("format", ["jsonl", "spec"])
def test_the_worlds_behind_a_folder_come_by_task_and_split_with_nothing_drawn(tmp_path, monkeypatch, lake, format):
    if format == "spec":
        _io.write_specs(lake, "test", 4, tmp_path / "d")
        monkeypatch.setattr(type(lake), "draw", None)
        expected = {"test": [lake.spec("test", i) for i in range(4)]}
    else:
        _io.write([*lake.samples("val", 4), *lake.samples("test", 4)], tmp_path / "d", "jsonl")
        expected = {split: [lake.spec(split, i) for i in range(4)] for split in ("val", "test")}
    worlds = _io.read_worlds(tmp_path / "d")
    assert {split: specs for _, split, specs in worlds} == expected
    assert all(task.name == "frozenlake" and task.preset.name == "nano" for task, _, _ in worlds)


def test_samples_from_elsewhere_have_no_world(tmp_path):
    _io.write([sample()], tmp_path / "d", "jsonl")
    with pytest.raises(InputError, match="maze-v1-small-test-000000 has no spec in meta"):
        _io.read_worlds(tmp_path / "d")


def test_specs_without_their_task_cannot_be_drawn(tmp_path, lake):
    _io.write_specs(lake, "test", 1, tmp_path / "s")
    (tmp_path / "s" / "task.json").write_text('{"schema": "x"}')
    with pytest.raises(InputError, match=r"task.json: not the head of a spec folder"):
        list(_io.read(tmp_path / "s"))
    (tmp_path / "s" / "task.json").unlink()
    with pytest.raises(InputError, match=r"task.json is missing"):
        list(_io.read(tmp_path / "s"))
