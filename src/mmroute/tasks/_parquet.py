"""`mmhop/1` as Parquet shards with PNG bytes embedded, in the way that `datasets` opens without being told anything."""

import contextlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from mmroute.errors import InputError, MissingExtra
from mmroute.tasks._pictures import png_bytes
from mmroute.tasks._rows import arrow_schema, row_of, sample_of
from mmroute.tasks.base import Sample

__all__ = ["read_parquet", "write_parquet"]

SHARD_BYTES = 256 * 2**20
GROUP_ROWS = 256


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("Parquet", "pyarrow", "data") from None
    return pyarrow


class _Shards:
    """Parquet files of one split, none larger than `SHARD_BYTES` (by the size of pictures and texts)."""

    def __init__(self, folder: Path, split: str, pa: Any) -> None:
        self.folder, self.split, self.pa = folder, split, pa
        self.schema = arrow_schema(pa)
        self.rows: list[dict[str, Any]] = []
        self.held = self.written = self.count = 0
        self.writer: Any = None

    def add(self, row: dict[str, Any], size: int) -> None:
        if self.held + self.written + size > SHARD_BYTES and (self.rows or self.written):
            self.close()
        self.rows.append(row)
        self.held += size
        if len(self.rows) == GROUP_ROWS:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        if self.writer is None:
            self.writer = self.pa.parquet.ParquetWriter(self.folder / f"{self.split}-{self.count:05d}", self.schema)
        table = self.pa.Table.from_pylist(self.rows, schema=self.schema)
        self.writer.write_table(table, row_group_size=GROUP_ROWS)
        self.written, self.held, self.rows = self.written + self.held, 0, []

    def close(self) -> None:
        self.flush()
        if self.writer is not None:
            self.writer.close()
            self.writer, self.written, self.count = None, 0, self.count + 1

    def abandon(self) -> None:
        # A writer whose disk is full cannot close well; what matters is the error that led here.
        if self.writer is not None:
            with contextlib.suppress(self.pa.ArrowException, OSError):
                self.writer.close()

    def finish(self) -> None:
        self.close()
        for i in range(self.count):
            name = f"{self.split}-{i:05d}"
            os.replace(self.folder / name, self.folder / f"{name}-of-{self.count:05d}.parquet")


def write_parquet(samples: Iterable[Sample], folder: Path) -> int:
    """Writes shards into a folder that is there; returns how many samples. For whole folders use `write`.

    Raises:
        InputError: a broken sample.
        MissingExtra: pyarrow is missing.
    """
    pa = _pyarrow()
    shards: dict[str, _Shards] = {}
    count = 0
    try:
        for count, sample in enumerate(samples, start=1):
            row = row_of(sample)
            pictures = [png_bytes(image) for image in sample.images]
            row["images"] = [{"bytes": b, "path": f"{count - 1:06d}_{k}.png"} for k, b in enumerate(pictures)]
            size = sum(map(len, pictures)) + len(row["meta"]) + len(row["question"])
            if not re.fullmatch(r"\w[\w-]*", sample.split):
                raise InputError(f"{sample.id}: a split is a plain word, it names a file (given {sample.split!r})")
            if sample.split not in shards:
                shards[sample.split] = _Shards(folder, sample.split, pa)
            shards[sample.split].add(row, size)
        for part in shards.values():
            part.finish()
    except BaseException:
        for part in shards.values():
            part.abandon()
        raise
    return count


def read_parquet(folder: Path) -> Iterator[Sample]:
    """Samples of all shards of a folder, by the order of their names; pictures decode on first use.

    Raises:
        InputError: a shard is missing or broken, or a row is.
        MissingExtra: pyarrow is missing.
    """
    pa = _pyarrow()
    files = sorted(folder.glob("*.parquet"))
    for file in files:
        numbered = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.parquet", file.name)
        if numbered:
            total = int(numbered[3])
            wanted = [folder / f"{numbered[1]}-{i:05d}-of-{total:05d}.parquet" for i in range(total)]
            missing = [w.name for w in wanted if not w.is_file()]
            if missing:
                raise InputError(f"{folder}: shard {missing[0]} is missing ({len(missing)} of {total}); copy it again")
    for file in files:
        try:
            with pa.parquet.ParquetFile(file) as opened:
                number = 0
                for batch in opened.iter_batches(batch_size=64):
                    for row in batch.to_pylist():
                        yield _from_arrow(row, f"{file}:{number}")
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: not a readable Parquet file: {error}") from None


def _from_arrow(row: dict[str, Any], where: str) -> Sample:
    images = row.get("images")
    if not isinstance(images, list):
        raise InputError(f"{where}: no field 'images'")
    try:
        row["images"] = [Image.open(io.BytesIO(image["bytes"])) for image in images]
    except (OSError, TypeError, KeyError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: an embedded image cannot be read: {error}") from None
    return sample_of(row, where)
