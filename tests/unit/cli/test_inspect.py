"""`mmroute ask --trace` writes what `mmroute inspect` shows: two commands from a question to a page."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from page_samples import picture_of_noise

from mmroute import cli
from mmroute.trace import Trace

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmroute", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture
def asked(run: Run, tiny_folder: Callable, tmp_path: Path) -> Path:
    """A trace that `ask` wrote."""
    picture_of_noise().save(tmp_path / "noise.png")
    options = ("--set", "think.max_new_tokens=4", "--recipe", "random", "--model", tiny_folder("qwen2_5_vl"))
    code, out, _ = run("ask", "where?", "-i", tmp_path / "noise.png", *options, "--trace", tmp_path / "t.json")
    assert code == 0
    trace = Trace.load(tmp_path / "t.json")
    assert out == trace.story.text + "\n"
    return tmp_path / "t.json"


def test_a_question_becomes_a_trace_and_a_trace_a_page(run: Run, asked: Path) -> None:
    story = Trace.load(asked).story
    assert (story.question.split()[0], story.recipe, len(story.pictures)) == ("where?", "random", 1)
    assert not story.model.startswith("/")  # the folder's name alone: a page may be sent around
    assert run("inspect", asked) == (0, f"wrote {asked.with_suffix('.html')}\n", "")
    html = asked.with_suffix(".html").read_text(encoding="utf-8")
    assert story.pictures[0].png in html
    assert sorted(p.suffix for p in asked.parent.iterdir()) == [".html", ".json", ".png"]


def test_several_traces_are_one_page_and_json_says_what_they_hold(run: Run, asked: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "both.html"
    code, out, _ = run("inspect", asked, asked, "-o", out_file, "--json")
    (line,) = out.splitlines()
    said = json.loads(line)
    assert (code, said["page"]) == (0, str(out_file))
    assert [t["trace"] for t in said["traces"]] == [str(asked)] * 2
    assert said["traces"][0]["kv_bytes"] > 0
    assert 0 < said["traces"][0]["keep"]["vision"] < 1
    assert out_file.read_text().count('"recipe":"random"') == 2


def test_what_cannot_be_shown_is_one_line(run: Run, asked: Path, tmp_path: Path) -> None:
    counts = json.loads(asked.read_text())
    for call in counts["calls"]:
        call["modality"] = call["ids"] = None
    (tmp_path / "counts.json").write_text(json.dumps(counts))
    (tmp_path / "half.json").write_text(asked.read_text()[:500])
    for arguments, code, message in (
        ((tmp_path / "absent.json",), 1, "no such file"),
        ((tmp_path / "half.json",), 1, "not a trace"),
        ((tmp_path / "counts.json",), 2, "how many positions ran, not which"),
        ((asked, "-o", tmp_path / "no" / "page.html"), 1, "cannot be written: no folder"),
        ((asked, "-o", tmp_path), 1, "is a folder; give a file's name"),
        ((), 2, "Missing argument"),
    ):
        got, out, err = run("inspect", *arguments)
        assert (got, out) == (code, "")
        assert message in err
    assert not list(tmp_path.glob("*.html*"))
