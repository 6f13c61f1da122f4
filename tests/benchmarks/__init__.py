"""Made rows of every public benchmark, in each format its rows come in."""

from pathlib import Path

from benchmarks import choices, details, problems, relations
from benchmarks.rows import Case, P, write

__all__ = ["CASES", "P", "place", "write"]

CASES: dict[str, Case] = {**relations.CASES, **choices.CASES, **details.CASES, **problems.CASES}


def place(root: Path, name: str, which: int) -> None:
    """Writes one format of a benchmark below a data root."""
    for files in CASES[name].sources[which]:
        write(root / name, files)
