"""Rows of a public benchmark from the files people have: the Hub's Parquet or Arrow, VLMEvalKit's TSV, JSONL + images.

A reader is asked for a folder and a split. It says whether its files are there, gives rows as plain dictionaries, and
says what to fetch when they are not. Pictures come out as Pillow images (embedded) or paths (apart): never as bytes,
base64 or structs, so that a benchmark's own file need not know which source a row came from.

No file answers for a split that it does not hold: one of some splits names them (`splits`), and one that holds several
names the column by which their rows are told apart (`by`).
"""

import base64
import binascii
import csv
import hashlib
import io
import json
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from mmroute.errors import InputError, MissingExtra
from mmroute.tasks.base import Origin

__all__ = ["HubRows", "JsonlWithImages", "Row", "Source", "SplitColumn", "Tsv"]

log = logging.getLogger(__name__)

Row = dict[str, Any]


class Source(ABC):
    """One place that a benchmark's rows may be in."""

    labels: str = ""
    """Which labels its rows have, where several are about; empty is the benchmark's own."""

    def holds(self, split: str) -> bool:
        """Whether this place has the split at all."""
        return True

    @abstractmethod
    def found(self, root: Path, split: str) -> bool:
        """Whether the files are in this folder."""

    @abstractmethod
    def rows(self, root: Path, split: str) -> Iterator[Row]:
        """The rows, in the order of the files.

        Raises:
            InputError: a file or a picture is broken or missing.
        """

    @abstractmethod
    def wants(self, root: Path, split: str) -> str:
        """What to fetch, and where to put it."""

    @abstractmethod
    def origin(self, root: Path, split: str) -> Origin:
        """What these rows are, as results name it."""


@dataclass(frozen=True)
class SplitColumn:
    """What tells the splits of one file apart: a row is of the split whose values its column has."""

    name: str
    values: Mapping[str, Collection[str]]
    """Our name of a split to what stands in the column."""

    def has(self, row: Row, split: str, where: str) -> bool:
        """Whether a row is of the split.

        Raises:
            InputError: the file has no such column, so that its rows cannot be told apart.
        """
        if self.name not in row:
            raise InputError(f"{where}: no column {self.name!r}, which tells {', '.join(self.values)} apart")
        return str(row[self.name]).strip() in self.values[split]


class _OneFile(Source):
    """Rows of one file, of which a benchmark's splits may be named, counted out, or told apart by a column."""

    splits: Collection[str]
    by: SplitColumn | None

    @abstractmethod
    def _file(self, root: Path, split: str) -> Path:
        """Where it is."""

    def holds(self, split: str) -> bool:
        known = self.by.values if self.by is not None else self.splits
        return not known or split in known

    def found(self, root: Path, split: str) -> bool:
        return self.holds(split) and self._file(root, split).is_file()

    def origin(self, root: Path, split: str) -> Origin:
        path = self._file(root, split)
        return Origin(path.name, _revision([path]))

    def _of(self, row: Row, split: str, where: str) -> bool:
        return self.by is None or self.by.has(row, split, where)


@dataclass(frozen=True)
class Tsv(_OneFile):
    """VLMEvalKit's table: one line per question, pictures as base64 in `image`."""

    name: str
    """Of the file, without `.tsv`; `{split}` is replaced."""
    splits: Collection[str] = ()
    """Which splits it holds; none named is every split, for a name with `{split}` or a benchmark with one."""
    by: SplitColumn | None = None
    """What tells them apart where it holds several."""

    def _file(self, root: Path, split: str) -> Path:
        return root / f"{self.name.format(split=split)}.tsv"

    def wants(self, root: Path, split: str) -> str:
        return f"VLMEvalKit's {self._file(root, split).name} in {root}"

    def rows(self, root: Path, split: str) -> Iterator[Row]:
        path = self._file(root, split)
        csv.field_size_limit(sys.maxsize)  # a picture is far longer than the module's default
        shown: dict[str, str] = {}
        with path.open(encoding="utf-8", newline="") as lines:
            for number, row in enumerate(csv.DictReader(lines, delimiter="\t"), start=2):
                where = f"{path}:{number}"
                if None in row or None in row.values():
                    raise InputError(f"{where}: {len(row)} columns do not fit the head of the table")
                index, image = row.get("index", ""), row.get("image", "")
                shown[index] = image
                # A short value is the index of the row that holds the picture.
                image = shown.get(image, image) if len(image) <= 64 else image
                if self._of(row, split, where):
                    yield {**row, "image": _from_base64(image, where)}


@dataclass(frozen=True)
class JsonlWithImages(_OneFile):
    """A JSON list or JSON lines, and a folder with the pictures they name."""

    file: str
    """Relative to the benchmark's folder; `{split}` is replaced."""
    images: str = "images"
    """Folder of the pictures."""
    columns: Sequence[str] = ("image",)
    """Which columns name pictures; a missing or empty one is a row without that picture."""
    fetch: str = ""
    """Where the pictures are to be had."""
    encoded: bool = False
    """Pictures stand in the lines as base64 instead."""
    splits: Collection[str] = ()
    """As of a `Tsv`."""
    by: SplitColumn | None = None

    def _file(self, root: Path, split: str) -> Path:
        return root / self.file.format(split=split)

    def wants(self, root: Path, split: str) -> str:
        pictures = "" if self.encoded else f", with pictures in {root / self.images}"
        return f"{self._file(root, split).name} in {self._file(root, split).parent}{pictures} {self.fetch}".strip()

    def rows(self, root: Path, split: str) -> Iterator[Row]:
        path = self._file(root, split)
        for number, row in enumerate(_json_rows(path), start=1):
            where = f"{path}:{number}"
            if not isinstance(row, dict):
                raise InputError(f"{where}: a JSON object is expected, given {type(row).__name__}")
            if not self._of(row, split, where):
                continue
            named = {key: row[key] for key in self.columns if row.get(key)}
            if self.encoded:
                yield {**row, **{key: _from_base64(value, where) for key, value in named.items()}}
            else:
                yield {**row, **{key: self._path(root, str(value), where) for key, value in named.items()}}

    def _path(self, root: Path, name: str, where: str) -> Path:
        folder = (root / self.images).resolve()
        path = (folder / name).resolve()
        if not path.is_relative_to(folder):
            raise InputError(f"{where}: picture {name!r} leaves {folder}")
        if not path.is_file():
            raise InputError(f"{where}: picture {name!r} is missing in {folder}. {self.fetch}".rstrip(". ") + ".")
        return path


@dataclass(frozen=True)
class HubRows(Source):
    """A data set of the Hugging Face Hub: Parquet or Arrow files, a folder `datasets` saved, or the Hub itself."""

    id: str
    configs: Sequence[str] = ()
    """Parts with a folder of their own; a row says which one it is of under `config`."""
    splits: dict[str, str] = field(default_factory=dict)
    """Our name of a split to theirs, where they differ."""
    join: tuple[str, str, str] | None = None
    """(config of the pictures, column here, column there): questions and pictures are kept apart."""
    labels: str = ""

    def found(self, root: Path, split: str) -> bool:
        return any(self._parts(root, split))

    def wants(self, root: Path, split: str) -> str:
        theirs = self.splits.get(split, split)
        return f"the Parquet files of {self.id} ({theirs}) in {root}, or access to the Hub"

    def origin(self, root: Path, split: str) -> Origin:
        files = list(self._parts(root, split))
        return Origin(self.id, _revision(files) if files else self._commit(), self.labels)

    def _commit(self) -> str:
        """The Hub's commit that is read; empty where the Hub does not tell."""
        try:
            import datasets

            return str(datasets.load_dataset_builder(self.id, next(iter(self.configs), None)).hash or "")
        except (ImportError, OSError, ValueError):
            return ""

    def rows(self, root: Path, split: str) -> Iterator[Row]:
        pictures: dict[Any, Any] = {}
        if self.join is not None:
            config, _, there = self.join
            pictures = {row[there]: row["image"] for row in self._read(root, split, config)}
        here = [config for config in self.configs if self._files(root, split, config)]
        if here and len(here) < len(self.configs):
            log.warning(
                "%s: %d of %d parts are in %s; the others are left out", self.id, len(here), len(self.configs), root
            )
        for config in here or self.configs or ("",):
            for row in self._read(root, split, config):
                if self.configs:
                    row["config"] = config
                if self.join is not None:
                    key = row[self.join[1]]
                    if key not in pictures:
                        raise InputError(f"{self.id}: no picture {key!r} among {len(pictures)}; fetch {self.join[0]}")
                    row["image"] = pictures[key]
                yield row

    def _parts(self, root: Path, split: str) -> Iterator[Path]:
        return (path for config in self.configs or ("",) for path in self._files(root, split, config))

    def _files(self, root: Path, split: str, config: str) -> list[Path]:
        theirs, folder = self.splits.get(split, split), root / config if config else root
        for pattern in ("{}-*-of-*.parquet", "{}.parquet", "**/{}-*-of-*.parquet", "**/{}.parquet", "{}/*.arrow"):
            if files := sorted(folder.glob(pattern.format(theirs))):
                return files
        return []

    def _read(self, root: Path, split: str, config: str) -> Iterator[Row]:
        files = self._files(root, split, config)
        if not files:
            yield from self._from_hub(split, config)
            return
        for path in files:
            for number, row in enumerate(_arrow_rows(path)):
                yield {key: _decoded(value, f"{path}:{number}") for key, value in row.items()}

    def _from_hub(self, split: str, config: str) -> Iterator[Row]:
        try:
            import datasets
        except ImportError:
            raise MissingExtra(f"reading {self.id} from the Hub", "datasets", "data") from None
        theirs = self.splits.get(split, split)
        try:
            loaded = datasets.load_dataset(self.id, config or None, split=theirs)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise InputError(f"{self.id} ({theirs}) cannot be read from the Hub: {error}") from None
        for row in loaded:
            yield dict(row)


def _revision(files: Sequence[Path]) -> str:
    """What files hold, whatever they are called."""
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(_digest(path, stat.st_size, stat.st_mtime_ns))
    return f"sha256:{digest.hexdigest()[:16]}"


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, changed_ns: int) -> bytes:
    """Of one file; both sides of a comparison ask for it, and it may have gigabytes."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _arrow_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("Parquet", "pyarrow", "data") from None
    try:
        if path.suffix == ".arrow":
            with pyarrow.memory_map(str(path)) as source:
                for batch in pyarrow.ipc.open_stream(source):
                    yield from batch.to_pylist()
            return
        with pyarrow.parquet.ParquetFile(path) as opened:
            for batch in opened.iter_batches(batch_size=64):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable file: {error}") from None


def _decoded(value: Any, where: str) -> Any:
    """A value with its embedded pictures opened."""
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return _opened(value["bytes"], where) if value["bytes"] else None
    if isinstance(value, list):
        return [_decoded(item, where) for item in value]
    return value


def _from_base64(text: Any, where: str) -> Any:
    """One picture, or a list of them where the text is a JSON list; None where it is empty."""
    if not text:
        return None
    if isinstance(text, str) and text.startswith("["):
        return [_from_base64(item, where) for item in json.loads(text.replace("'", '"'))]
    try:
        return _opened(base64.b64decode(text, validate=True), where)
    except (binascii.Error, TypeError) as error:
        raise InputError(f"{where}: the picture is not base64: {error}") from None


def _opened(data: bytes, where: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: an embedded picture cannot be read: {error}") from None


def _json_rows(path: Path) -> Iterator[Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            yield from json.loads(text)
        else:
            for line in text.splitlines():
                if line.strip():
                    yield json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON: {error}") from None
