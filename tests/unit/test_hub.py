"""The registry: files and entry points by name, described without importing them."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from mmroute import hub
from mmroute.errors import ConfigError

METHOD = '''"""Which positions go on: mine. It has
a second line.

More words.

Source: a paper: with a colon,
    and a second line.
Deviates: in one way.
Not a section: x.
"""

from mmroute.config import options


class Mine:
    """Not the summary."""

    @options
    class Config:
        share: float = 0.5
        """Of all positions."""
        count: int
        """How
        many."""
        silent: str = "x"
'''


@pytest.fixture
def outsider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A method of another package, found by entry point."""
    (tmp_path / "outside_mmroute.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("mine", "outside_mmroute:Mine", "mmroute.prune")
    monkeypatch.setattr(hub, "entry_points", lambda group: [entry] if group == entry.group else [])
    return "mine"


def test_the_folder_is_the_registry() -> None:
    assert {"none", "random", "oracle", "fastv", "pyramiddrop", "knorm", "schedule"} <= set(hub.names("prune"))
    assert not {"base", "_rank", "_budget", "__init__"} & set(hub.names("prune"))
    assert type(hub.load("prune", "fastv", vision_keep=0.3)).__module__ == "mmroute.prune.fastv"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no pruner named 'fastb'; one of .*; did you mean 'fastv'\?"):
        hub.find("prune", "fastb")
    with pytest.raises(ConfigError, match="no pruner named 'fastb'"):
        hub.describe("prune", "fastb")
    with pytest.raises(ConfigError, match="no kind of method named 'prunes'"):
        hub.names("prunes")


def test_an_outsider_is_found_loaded_and_described(outsider: str) -> None:
    assert outsider in hub.names("prune")
    said = hub.describe("prune", outsider)
    assert said.summary == "Which positions go on: mine. It has a second line."
    assert said.source == "a paper: with a colon, and a second line."
    assert said.deviates == "in one way."
    assert said.checked == ""
    assert said.options == [
        hub.Option("share", "float", "0.5", "Of all positions."),
        hub.Option("count", "int", None, "How many."),
        hub.Option("silent", "str", "'x'", ""),
    ]


def test_an_outsider_may_not_take_a_built_in_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("fastv", "outside:FastV", "mmroute.prune")
    monkeypatch.setattr(hub, "entry_points", lambda group: [entry])
    with pytest.raises(ConfigError, match="'fastv' is the name of a built-in file; rename it"):
        hub.find("prune", "fastv")


def test_a_file_that_is_not_python_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def (")
    with pytest.raises(ConfigError, match="not Python"):
        hub.describe_file(path, "broken")


def test_describing_everything_imports_no_torch() -> None:
    code = "import sys; from mmroute import hub\nfor k in hub.KINDS:\n for n in hub.names(k): hub.describe(k, n)\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
