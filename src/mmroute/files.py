"""Files and folders that are whole or not there: written beside their name, and renamed once all is on disk."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmroute.errors import InputError

__all__ = ["replacing", "replacing_folder", "write_json", "write_text"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; it takes the name when the block ends well, and is gone if not.

    The folder is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    try:
        yield beside
        with beside.open("rb") as written:
            os.fsync(written.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path` to write to; it takes the name, and what stood there goes, when the block ends
    well.
    """
    beside, old = _beside(path), _beside(path, ".old")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        if path.exists():
            path.rename(old)
        beside.rename(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _beside(path: Path, mark: str = "") -> Path:
    return path.with_name(f".{path.stem}{mark}.{os.getpid()}{path.suffix}")  # some writers go by the suffix


def write_json(path: Path, data: Any) -> None:
    """Writes one JSON file, and its folder where it is missing; without NaN, which JSON does not have."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Writes one file where the user said: whole or not at all.

    Raises:
        InputError: the folder is not there, or the name is a folder's.
    """
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder; give a file's name" if path.is_dir() else f"cannot be written: no folder {path.parent}"
        raise InputError(f"{path} {reason}")
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
