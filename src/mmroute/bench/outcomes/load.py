"""Opens an outcomes table of any known format."""

import importlib
import json
from pathlib import Path

from mmroute.bench.outcomes.base import Outcomes, Row, pair_up, read_rows
from mmroute.errors import ConfigError, InputError

__all__ = ["FORMATS", "load_outcomes"]

FORMATS = {
    "outcomes": "our own table",
    "table": "a line per query",
    "mmr-bench": "MMR-Bench",
    "vl-routerbench": "VL-RouterBench",
    "routerbench": "RouterBench",
    "routellm": "RouteLLM",
}
"""Name to what it reads."""


def load_outcomes(
    path: Path,
    source: str = "",
    draft: str = "",
    target: str = "",
    unit: str = "",
    columns: dict[str, str] | None = None,
) -> Outcomes:
    """One pair of models out of a file or folder.

    Args:
        path: what to read.
        source: one of `FORMATS`; "" tells our own table from a line per query by itself.
        draft: name of the draft in a table of many models.
        target: likewise.
        unit: what cost is counted in; "" is dollars or FLOPs where they are known, else calls.
        columns: column map of a `table`.

    Raises:
        ConfigError: no such format, or one that needs the models' names.
        InputError: the file cannot be read as that.
    """
    source = source or _guess(path)
    if source not in FORMATS:
        raise ConfigError(f"--from is one of {', '.join(FORMATS)} (given {source!r})")
    if source == "outcomes":
        rows = read_rows(path)
    elif source == "table":
        from mmroute.bench.outcomes import table

        rows = table.read(path, draft or "draft", target or "target", columns)
    else:
        if not (draft and target):
            raise ConfigError(f"{source} holds many models; name a pair with --draft and --target")
        rows = importlib.import_module(f"mmroute.bench.outcomes.{source.replace('-', '_')}").read(path, draft, target)
    return pair_up(rows, unit or _unit(rows))


def _guess(path: Path) -> str:
    """Our own table says in every row which role it is."""
    if path.is_dir() or not path.exists():
        return "outcomes"
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as file:
            first = file.readline()
        try:
            return "outcomes" if "role" in json.loads(first) else "table"
        except (json.JSONDecodeError, TypeError):
            raise InputError(f"{path}:1: not a JSON object") from None
    if path.suffix == ".parquet":
        try:
            read_rows(path)
        except InputError:
            return "table"
        return "outcomes"
    return "table"


def _unit(rows: list[Row]) -> str:
    return next((unit for unit in ("flops", "usd") if all(getattr(row, unit) >= 0 for row in rows)), "calls")
