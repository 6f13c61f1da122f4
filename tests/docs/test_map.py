"""Dependencies go one way, as AGENTS.md says: nothing imports, on top of its file, what stands above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "mmroute"
LEVELS = (
    {"errors"},
    {"tokens", "trace", "config", "files"},
    {"select"},
    {"prune", "deepen", "think"},
    {"rows", "ragged", "cache", "backbones"},
    {"engine"},
    {"decoding", "ledger", "segment", "rollout", "session", "beams", "interleave"},
    {"reason"},
    {"train", "bench", "cli", "serve"},
)
"""From below; a name is a file or a folder."""
PLACE = {name: i for i, names in enumerate(LEVELS) for name in names}


def imported(path):
    """Names below `mmroute` that a file imports whenever it is imported."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmroute"):
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "mmroute" else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("mmroute.")]
        else:
            continue
        yield from (name.split(".")[1] for name in names)


@pytest.mark.parametrize("name", sorted(PLACE))
def test_nothing_imports_what_stands_above_it(name):
    files = sorted((ROOT / name).rglob("*.py")) or [ROOT / f"{name}.py"]
    above = {
        (str(f.relative_to(ROOT)), other) for f in files for other in imported(f) if PLACE.get(other, 0) > PLACE[name]
    }
    assert not above
