"""The root of the command line: fast help, one clear line for what a user can cause, exit codes 0, 1, 2 and 130."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mmroute import cli, errors, hub
from mmroute.cli import info
from mmroute.trace import Shape, Trace

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`mmroute` with arguments, in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mmroute", *arguments])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return call


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `mmroute list` raise."""

    def arrange(error: BaseException) -> None:
        def rows(kind: str) -> list:
            raise error

        monkeypatch.setattr(info, "_rows", rows)

    return arrange


def test_help_names_every_verb_and_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['mmroute', '--help']\nfrom mmroute import cli\ntry: cli.main()\nfinally: "
    code += "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for verb in ("ask", "eval", "demo", "data", "train", "calibrate", "serve", "replay", "list", "env", "check"):
        assert f" {verb} " in done.stdout


def test_version_is_printed(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.strip().count(".") == 2


@pytest.mark.parametrize("arguments", [["nonsense"], ["list"], ["list", "prune", "--nonsense"]])
def test_wrong_usage_is_2(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert "Error" in err


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (errors.ConfigError("two\n lines"), 2),
        (errors.InputError("two\n lines"), 1),
        (errors.BudgetError("two\n lines"), 1),
        (errors.CheckpointMismatch("two\n lines"), 1),
        (FileNotFoundError("two\n lines"), 1),
    ],
)
def test_what_a_user_can_cause_is_one_line_without_traceback(
    run: Run, failing: Callable, error: Exception, expected: int
) -> None:
    failing(error)
    assert run("list", "prune") == (expected, "", "mmroute: two lines\n")


def test_a_full_disk_is_one_line_wherever_the_error_was_wrapped(run: Run, failing: Callable) -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "model.safetensors")
    wrapped = RuntimeError("write failed")
    wrapped.__cause__ = full
    for error in (full, wrapped):
        failing(error)
        code, _, err = run("list", "prune")
        assert code == 1
        assert err == (
            "mmroute: the disk is full at model.safetensors; files already there are whole; make room and run again\n"
        )
    failing(ValueError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert run("list", "prune")[2].startswith("mmroute: the disk is full;")


def test_an_interrupt_is_130(run: Run, failing: Callable) -> None:
    failing(KeyboardInterrupt())
    assert run("list", "prune")[0] == 130


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, failing: Callable) -> None:
    failing(ZeroDivisionError("ours"))
    monkeypatch.setattr(sys, "argv", ["mmroute", "list", "prune"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("kind", [*hub.KINDS, "backbones", "recipes"])
def test_list_says_what_there_is_and_ends_with_one_json_object(run: Run, kind: str) -> None:
    code, out, _ = run("list", kind, "--json")
    assert code == 0
    rows = json.loads(out.splitlines()[-1])[kind]
    if kind in hub.KINDS:
        assert [row["name"] for row in rows] == hub.names(kind)
    assert all(row["summary"] for row in rows)
    if kind != "gate":  # gates come with their own issue
        assert rows


def test_list_shows_options_with_defaults_and_units(run: Run) -> None:
    _, out, _ = run("list", "prune")
    assert "start_layer = 2  First layer, counted from 0, that runs on the survivors; K in the paper." in out


def test_list_of_an_unknown_kind_names_the_kinds(run: Run) -> None:
    code, _, err = run("list", "prunes")
    assert code == 2
    assert "prune, deepen, think, gate, tasks, backbones, recipes" in err


def test_env_prints_versions_extras_and_threads(run: Run) -> None:
    code, out, _ = run("env", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["package"]["torch"].startswith("2.")
    assert set(facts["extra"]) >= {"train", "data", "bench"}
    assert facts["threads"] == 1
    assert "/" not in out.replace("mmroute[", "")  # a path has no place in a bug report
    assert run("env")[1].count("\n") == sum(len(v) if isinstance(v, dict) else 1 for v in facts.values())


def test_env_says_when_torchvision_does_not_fit(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    installed = info._installed
    monkeypatch.setattr(info, "_installed", lambda name: "0.1" if name == "torchvision" else installed(name))
    monkeypatch.syspath_prepend(tmp_path)
    out = run("env")[1]
    assert "0.1 does NOT fit torch" in out
    assert "torchvision::nms does not exist" in out


def test_env_names_what_an_extra_lacks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = info._installed
    monkeypatch.setattr(info, "_installed", lambda name: "missing" if name == "peft" else installed(name))
    assert json.loads(run("env", "--json")[1])["extra"]["train"] == 'missing peft; pip install "mmroute[train]"'


METHOD = """
from mmroute.prune.base import Pruner

__all__ = ["Mine"]


class Mine(Pruner):
    def rate(self, layer, num_layers, hop, modality):
        return RATE

    def scores(self, x, tokens, site):
        return x.float().sum(-1)
"""


def test_check_tells_a_good_method_from_a_bad_one(run: Run, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.py", tmp_path / "bad.py"
    good.write_text(METHOD.replace("RATE", "0.5"))
    bad.write_text(METHOD.replace("RATE", "1.5"))
    assert run("check", str(good)) == (0, f"{good}: ok\n", "")
    code, _, err = run("check", str(bad))
    assert code == 1
    assert "Mine.rate is 1.5" in err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("two.py", "__all__ = ['a', 'b']\na = b = 1", "exactly one class"),
        ("other.py", "__all__ = ['a']\na = 1", "is not a Pruner"),
        ("recipe.yaml", "prune: {name: fastv, vision_kep: 0.3}", "no such option"),
        ("recipe.yaml", "prun: {name: fastv}", "no such option"),
        ("trace.json", "[]", "not a trace"),
        ("trace.json", '{"schema": "trace/9"}', "trace/9"),
        ("note.txt", "", "give a .py, .yaml or .json"),
    ],
)
def test_check_says_what_is_wrong_with_a_file(run: Run, tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    code, out, err = run("check", str(path))
    assert code in (1, 2)
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_check_reads_recipes_and_traces(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    trace.write_text(Trace(Shape(8, 1, 1, 1, 8, 8, 8, 4)).to_json())
    for path in (trace, *hub.recipes().values()):
        assert run("check", str(path)) == (0, f"{path}: ok\n", "")


def test_check_of_a_missing_file_says_so(run: Run) -> None:
    code, _, err = run("check", "nowhere.py")
    assert code == 1
    assert "nowhere.py: no such file" in err
