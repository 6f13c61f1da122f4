"""Files that are whole or not there."""

import os
from pathlib import Path

from mmroute.errors import InputError

__all__ = ["write_text"]


def write_text(path: Path, text: str) -> None:
    """Writes beside the name and renames: a killed run leaves the old file, never half a new one.

    Raises:
        InputError: the folder is not there, or the name is a folder's.
    """
    if path.is_dir() or not path.parent.is_dir():
        reason = "is a folder; give a file's name" if path.is_dir() else f"cannot be written: no folder {path.parent}"
        raise InputError(f"{path} {reason}")
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
