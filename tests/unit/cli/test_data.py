"""`mmroute data`: from a task to other people's files and back, and one line for every mistake."""

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made import picture, sample

from mmroute import cli, hub
from mmroute.cli import data
from mmroute.tasks import _io
from mmroute.tasks.base import Generated

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`mmroute data` with arguments, in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmroute", "data", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.mark.parametrize("format", ["jsonl", "parquet", "spec"])
def test_make_writes_what_the_task_says(run: Run, tmp_path: Path, format: str) -> None:
    if format == "parquet":
        pytest.importorskip("pyarrow")
    out = tmp_path / "d"
    code, said, _ = run(
        "make", "--task", "maze:nano", "--split", "val", "--n", 3, "--format", format, "-o", out, "--json"
    )
    assert code == 0
    assert json.loads(said.splitlines()[-1]) == {"out": str(out), "n": 3, "task": "maze", "format": format}
    assert [s.split for s in _io.read(out)] == ["val"] * 3


def test_make_takes_the_preset_apart_and_options_of_the_task(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "d"
    options = ("--preset", "nano", "--format", "jsonl", "--n", 2, "--set", "task.hop_images=observed")
    code, said, _ = run("make", "--task", "frozenlake", *options, "-o", out)
    assert (code, said) == (0, f"2 samples in {out}\n")
    assert all(len(s.images) == len(s.hops) + 1 for s in _io.read(out))


def test_a_whole_split_is_made_by_default(run: Run, tmp_path: Path) -> None:
    code, said, _ = run(
        "make", "--task", "maze:nano", "--split", "val", "--format", "spec", "-o", tmp_path / "d", "--json"
    )
    assert code == 0
    assert json.loads(said)["n"] == 200


@pytest.mark.parametrize("to", ["trl", "llava", "sharegpt", "vlmeval", "lmms"])
def test_export_reads_a_folder_and_says_how_many(run: Run, tmp_path: Path, to: str) -> None:
    if to == "lmms":
        pytest.importorskip("pyarrow")
    _io.write([sample(i) for i in range(2)], tmp_path / "d", "jsonl")
    code, said, _ = run("export", tmp_path / "d", "--to", to, "-o", tmp_path / "out", "--json")
    assert code == 0
    assert json.loads(said)["n"] == 2
    assert any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("source", "flagged"), [("mvot", False), ("mvot-dare", True)])
def test_import_reads_what_export_wrote(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, flagged: bool
) -> None:
    monkeypatch.setattr(Generated, "_mvot", lambda self, spec, state: picture(state.step))
    _io.write_specs(hub.load("tasks", "frozenlake", preset="nano"), "test", 4, tmp_path / "d")
    assert run("export", tmp_path / "d", "--to", "mvot", "-o", tmp_path / "tree")[0] == 0
    options = ("--from", source, "--format", "jsonl", "-o", tmp_path / "back", "--json")
    code, said, _ = run("import", tmp_path / "tree", *options)
    assert (code, json.loads(said)["n"]) == (0, 4)
    back = list(_io.read(tmp_path / "back"))
    assert sorted(s.answer for s in back) == sorted(s.answer for s in _io.read(tmp_path / "d"))
    assert all(s.meta.get("untrusted_labels", False) == flagged for s in back)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("make", "--task", "mase", "-o", "OUT"), 2, "no task named 'mase'; .* did you mean 'maze'"),
        (("make", "--task", "maze:huge", "-o", "OUT"), 2, "tasks.maze.preset: one of .*'huge'"),
        (("make", "--task", "maze:nano", "--preset", "tiny", "-o", "OUT"), 2, "names the preset 'nano' .* give one"),
        (("make", "--task", "maze:small", "--split", "train", "-o", "OUT"), 2, "'train' has no fixed size; give n"),
        (("make", "--task", "maze:nano", "--split", "all", "--n", 1, "-o", "OUT"), 2, "split is one of"),
        (("make", "--task", "maze:nano", "--format", "csv", "-o", "OUT"), 2, "--format is one of .*'csv'"),
        (("make", "--task", "maze:nano", "--set", "task.skim=x", "-o", "OUT"), 2, "no such option"),
        (("make", "--task", "maze:nano", "--set", "prune.x=1", "-o", "OUT"), 2, "write --set task.NAME=VALUE"),
        (("make", "--task", "maze:nano", "--n", 0, "-o", "OUT"), 2, "--n"),
        (("make", "--task", "maze:nano", "--n", 1), 2, "Missing option .*--out"),
        (("export", "GONE", "--to", "trl", "-o", "OUT"), 1, "no such directory"),
        (("export", "EMPTY", "--to", "trl", "-o", "OUT"), 1, "has neither metadata.jsonl"),
        (("export", "DATA", "--to", "coco", "-o", "OUT"), 2, "no export format named 'coco'; one of trl"),
        (("export", "DATA", "--to", "mvot", "-o", "OUT"), 1, "meta has no spec"),
        (("export", "DATA", "--to", "trl", "-o", "DATA"), 1, "is not empty"),
        (("import", "EMPTY", "--from", "mvot", "-o", "OUT"), 1, "is no MVoT tree"),
        (("import", "EMPTY", "--from", "coco", "-o", "OUT"), 2, "--from is one of mvot, mvot-dare"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    run: Run, tmp_path: Path, arguments: tuple, code: int, message: str
) -> None:
    places = {
        "OUT": tmp_path / "out",
        "GONE": tmp_path / "gone",
        "EMPTY": tmp_path / "empty",
        "DATA": tmp_path / "data",
    }
    places["EMPTY"].mkdir()
    _io.write([sample()], places["DATA"], "jsonl")
    got, said, err = run(*(places.get(a, a) for a in arguments))
    assert (got, said) == (code, "")
    assert re.search(message, " ".join(err.replace("│", " ").split()))
    assert sorted(os.listdir(tmp_path)) == ["data", "empty"]


def test_gates_pass_on_counterbalanced_items(run: Run, tmp_path: Path) -> None:
    _io.write_specs(hub.load("tasks", "gridspatial", preset="tiny"), "test", 240, tmp_path / "d")
    code, said, err = run("gates", tmp_path / "d", "--json")
    *table, last = said.splitlines()
    found = json.loads(last)
    assert (code, err, found["passed"]) == (0, "", True)
    assert {g["name"] for g in found["gates"]} == {"answer_prior", "oracle", "blind_text", "blind_image"}
    assert len(table) == len(found["gates"])
    assert all(line.startswith("ok   gridspatial:tiny test") for line in table)


def test_a_failing_gate_fails_the_command(run: Run, tmp_path: Path) -> None:
    _io.write_specs(hub.load("tasks", "maze", preset="mvot"), "val", 90, tmp_path / "d")
    code, said, err = run("gates", tmp_path / "d", "--json")
    found = json.loads(said.splitlines()[-1])
    blind = next(g for g in found["gates"] if g["name"] == "wall_blind")
    assert (code, found["passed"], blind["passed"]) == (1, False, False)
    assert blind["value"] > 0.95, "start plus displacement solves the published mazes"
    assert "gates failed" in err
    assert any(line.startswith("FAIL maze:mvot val") and "wall_blind" in line for line in said.splitlines())


def test_gates_with_a_model_show_it_other_pictures(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answering(name: str) -> Callable[..., object]:
        asked.append(name)
        return lambda task: lambda samples: [task.score(s, "answer: success") for s in samples]

    monkeypatch.setattr(data, "_answering", answering)
    _io.write_specs(hub.load("tasks", "frozenlake", preset="tiny"), "test", 96, tmp_path / "d")
    _, said, _ = run("gates", tmp_path / "d", "--model", "some-model", "--json")
    (gate,) = (g for g in json.loads(said.splitlines()[-1])["gates"] if g["name"] == "shuffled_image")
    assert (asked, gate["passed"], gate["num_items"]) == (["some-model"], True, 96)
    assert gate["value"] == pytest.approx(1 / 3, abs=0.05)


def test_gates_want_enough_items_of_a_world_they_know(run: Run, tmp_path: Path) -> None:
    _io.write_specs(hub.load("tasks", "maze", preset="nano"), "test", 8, tmp_path / "few")
    code, said, err = run("gates", tmp_path / "few")
    assert (code, said) == (1, "")
    assert "need 48 or more, given 8 of maze test" in err
    _io.write([sample()], tmp_path / "foreign", "jsonl")
    code, _, err = run("gates", tmp_path / "foreign")
    assert (code, "has no spec in meta" in err) == (1, True)


def test_a_full_disk_is_said_in_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(image: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_io, "png_bytes", full)
    code, said, err = run("make", "--task", "maze:nano", "--n", 2, "--format", "jsonl", "-o", tmp_path / "d")
    assert (code, said) == (1, "")
    assert "the disk is full; nothing was kept" in err
    assert len(err.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_parquet_without_its_extra_says_what_to_install(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, _, err = run("make", "--task", "maze:nano", "--n", 1, "-o", tmp_path / "d")
    assert code == 1
    assert 'pip install "mmroute[data]"' in err
    assert os.listdir(tmp_path) == []
