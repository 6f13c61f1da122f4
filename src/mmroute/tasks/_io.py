"""The schema `mmhop/1` on disk: JSONL with an image folder, Parquet shards with embedded PNG, or bare specs.

| format | files | needs |
|---|---|---|
| `jsonl` | `metadata.jsonl` + `images/`: what `datasets` calls an imagefolder | Pillow |
| `parquet` | `test-00000-of-00002.parquet` ..: loads with `datasets` as it is, pictures included | extra `data` |
| `spec` | `task.json` + `specs.jsonl`: no pixels; a few MB for 100k items, drawn again on reading | nothing |

A folder is written beside its place and renamed, so a full disk or a kill leaves nothing half-written in place.
"""

import contextlib
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmroute.errors import ConfigError, InputError
from mmroute.tasks._parquet import read_parquet, write_parquet
from mmroute.tasks._pictures import png_bytes
from mmroute.tasks._rows import SCHEMA, row_of, sample_of
from mmroute.tasks.base import Generated, Sample, Spec

__all__ = ["FORMATS", "new_folder", "read", "read_worlds", "write", "write_specs"]

SPEC_SCHEMA = "mmhop-spec/1"
FORMATS = ("parquet", "jsonl", "spec")


# ---------------------------------------------------------------------- folders


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends well and vanishes when it does not.

    Raises:
        InputError: `out` is a file or holds something already, cannot be made, or the disk fills.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory that does not exist yet")
    if out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; give a new directory, or empty this one first")
    beside = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
    except OSError as error:
        raise InputError(f"{out} cannot be made: {error.strerror}; choose another place") from None
    try:
        yield beside
        os.replace(beside, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise InputError(f"{out}: the disk is full; nothing was kept. Free some space, or write fewer items") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write(samples: Iterable[Sample], out: Path, format: str = "parquet") -> int:
    """Writes samples as a new folder; returns how many.

    Args:
        samples: written as they come.
        out: a directory that does not exist or is empty.
        format: `parquet` or `jsonl`.

    Raises:
        ConfigError: another format.
        InputError: no samples, a broken sample, or a place that cannot be written.
        MissingExtra: Parquet without pyarrow.
    """
    if format not in ("parquet", "jsonl"):
        raise ConfigError(f"samples are written as parquet or jsonl (given {format!r}); spec is for generated tasks")
    with new_folder(out) as folder:
        count = (write_parquet if format == "parquet" else _write_jsonl)(samples, folder)
        if not count:
            raise InputError(f"{out}: there are no samples to write")
    return count


def read(folder: Path) -> Iterator[Sample]:
    """Samples of a folder in any of the formats, in order.

    Images are paths (`jsonl`) or Pillow images that decode on first use (`parquet`); `spec` draws them again.

    Raises:
        InputError: no such folder, not one of ours, or a part of it is missing, broken or outside of it.
        MissingExtra: Parquet without pyarrow.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory")
    if (folder / "metadata.jsonl").is_file():
        return _read_jsonl(folder)
    if (folder / "specs.jsonl").is_file():
        return _read_specs(folder)
    if list(folder.glob("*.parquet")):
        return read_parquet(folder)
    raise InputError(
        f"{folder} is no {SCHEMA} folder: it has neither metadata.jsonl, *.parquet nor specs.jsonl; "
        "make one with: mmroute data make --task maze -o DIR"
    )


# ---------------------------------------------------------------------- jsonl


def _write_jsonl(samples: Iterable[Sample], folder: Path) -> int:
    count = 0
    (folder / "images").mkdir()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8", newline="\n") as lines:
        for count, sample in enumerate(samples, start=1):
            row = row_of(sample)
            # Numbers, not ids: `datasets` would take the word test in a file's name for its split.
            names = [f"images/{count - 1:06d}_{k}.png" for k in range(len(sample.images))]
            for name, image in zip(names, sample.images, strict=True):
                (folder / name).write_bytes(png_bytes(image))
            # `datasets` turns a key `file_names` into a column `images` of decoded pictures.
            row = {("file_names" if k == "images" else k): (names if k == "images" else v) for k, v in row.items()}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    return count


def _read_jsonl(folder: Path) -> Iterator[Sample]:
    root = folder.resolve()
    for where, row in _json_lines(folder / "metadata.jsonl"):
        names = row.pop("file_names", None)
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise InputError(f"{where}: file_names: a list of paths is expected, given {names!r}")
        row["images"] = [_inside(root, name, where) for name in names]
        yield sample_of(row, where)


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line.decode())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise InputError(f"{where}: not a line of JSON: {error}") from None
            if not isinstance(row, dict):
                raise InputError(f"{where}: a JSON object is expected, given {type(row).__name__}")
            yield where, row


def _inside(root: Path, name: str, where: str) -> Path:
    pure = PurePosixPath(name)
    path = (root / pure).resolve()
    if pure.is_absolute() or ".." in pure.parts or not path.is_relative_to(root):
        raise InputError(f"{where}: image path {name!r} leaves the folder; write it relative to {root}")
    if not path.is_file():
        raise InputError(f"{where}: image {name!r} is missing in {root}")
    return path


# ---------------------------------------------------------------------- specs


def write_specs(task: Generated, split: str, n: int | None, out: Path) -> int:
    """Writes the specs of the first `n` items of a generated task as a new folder; returns how many.

    Args:
        task: whose options are written too, so that the same pictures come out.
        split: train, val or test.
        n: None is the whole split.
        out: a directory that does not exist or is empty.

    Raises:
        ConfigError: no such split, or `n` is None and the split has no fixed size.
        InputError: a place that cannot be written.
    """
    n = task.preset.splits.get(split) if n is None else n
    if not n:
        raise ConfigError(f"{task.name}:{task.preset.name} {split!r} has no fixed size; give n")
    head = {"schema": SPEC_SCHEMA, "task": task.name, "config": dataclasses.asdict(task.config)}
    with new_folder(out) as folder:
        (folder / "task.json").write_text(json.dumps(head, indent=1) + "\n")
        with (folder / "specs.jsonl").open("w", newline="\n") as lines:
            for i in range(n):
                lines.write(task.spec(split, i).to_json() + "\n")  # type: ignore[arg-type]
    return n


def _read_specs(folder: Path) -> Iterator[Sample]:
    task = _head(folder)
    for where, spec in _specs(folder, task):
        try:
            sample = task.sample(spec)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"{where}: {task.name} cannot draw this world: {error!r}") from None
        yield sample


def _head(folder: Path) -> Generated:
    from mmroute import hub

    path = folder / "task.json"
    if not path.is_file():
        raise InputError(f"{folder}: task.json is missing; without it specs cannot be drawn")
    try:
        head = json.loads(path.read_text())
        schema, name, config = head["schema"], head["task"], dict(head["config"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not the head of a spec folder: {error!r}") from None
    if schema != SPEC_SCHEMA:
        raise InputError(f"{path}: schema is {schema!r}, this version reads {SPEC_SCHEMA!r}")
    return hub.load("tasks", name, **config)


def _specs(folder: Path, task: Generated) -> Iterator[tuple[str, Spec]]:
    for where, row in _json_lines(folder / "specs.jsonl"):
        try:
            spec = Spec.from_dict(row)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if (spec.task, spec.version) != (task.name, task.version):
            raise InputError(
                f"{where}: made by {spec.task}-v{spec.version}, this version of mmroute has {task.name}-v{task.version}"
            )
        yield where, spec


def read_worlds(folder: Path) -> list[tuple[Generated, str, list[Spec]]]:
    """The worlds behind a folder in any of the formats, nothing drawn: (task, split, specs), in order of appearance.

    Raises:
        InputError: as `read`, or items that no generator of ours made.
    """
    from mmroute import hub

    folder = Path(folder)
    found: dict[tuple[str, str, str], list[Spec]] = {}
    head = _head(folder) if (folder / "specs.jsonl").is_file() else None
    if head is not None:
        for _, spec in _specs(folder, head):
            found.setdefault((spec.task, spec.preset, spec.split), []).append(spec)
    else:
        for sample in read(folder):
            if "spec" not in sample.meta:
                raise InputError(f"{folder}: {sample.id} has no spec in meta; only generated items have their world")
            spec = Spec.from_dict(sample.meta["spec"])
            found.setdefault((spec.task, spec.preset, spec.split), []).append(spec)
    return [
        (head or hub.load("tasks", task, preset=preset), split, specs) for (task, preset, split), specs in found.items()
    ]
