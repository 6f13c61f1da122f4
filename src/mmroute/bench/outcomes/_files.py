"""Reading tables of strangers: CSV, JSONL and Parquet as lists of dictionaries, with errors that name the file."""

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmroute.errors import InputError, MissingExtra

__all__ = ["needed", "number", "records", "truth"]


def records(path: Path) -> list[dict[str, Any]]:
    """Every record of a CSV, TSV, JSONL or Parquet file.

    Raises:
        InputError: no such file, another format, or a broken line.
        MissingExtra: Parquet without pyarrow.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    kind = path.suffix.lower()
    if kind in (".pkl", ".pickle"):
        raise InputError(
            f"{path}: a pickle runs code when it is opened; convert it to CSV or Parquet where you trust it"
        )
    if kind == ".parquet":
        return _parquet(path)
    if kind in (".csv", ".tsv"):
        csv.field_size_limit(2**24)
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ","))
    if kind in (".jsonl", ".ndjson"):
        return list(_jsonl(path))
    raise InputError(f"{path}: give a .csv, .tsv, .jsonl or .parquet file")


def _jsonl(path: Path) -> Iterable[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line_number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}:{line_number}: not JSON: {error}") from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingExtra("Parquet", "pyarrow", "data") from None
    return parquet.read_table(path).to_pylist()


def needed(found: Sequence[dict[str, Any]], columns: Sequence[str], path: Path) -> None:
    """Whether the columns are there.

    Raises:
        InputError: an empty table, or one without such a column.
    """
    if not found:
        raise InputError(f"{path}: the table is empty")
    missing = [name for name in columns if name not in found[0]]
    if missing:
        known = ", ".join(list(found[0])[:40])
        raise InputError(f"{path}: no column {', '.join(map(repr, missing))}; it has {known}")


def number(value: Any, where: str) -> float:
    """A number, however it is written.

    Raises:
        InputError: it is none.
    """
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{where}: {value!r} is not a number") from None


def truth(value: Any, where: str) -> float:
    """Success in [0, 1] from a boolean, a word or a number.

    Raises:
        InputError: it is none of these.
    """
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "yes", "no"):
        return float(value.strip().lower() in ("true", "yes"))
    found = number(value, where)
    if not 0 <= found <= 1:
        raise InputError(f"{where}: success is between 0 and 1, given {found}")
    return found
