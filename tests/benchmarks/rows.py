"""What made rows are made of, and how they are written: the real columns and types, invented content.

A row holds `P(i)` where a picture belongs; the writers turn it into base64, an embedded struct, or a file.
"""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from made import picture

Rows = list[dict[str, Any]]


class P(NamedTuple):
    """The picture with this number."""

    number: int


class Files(NamedTuple):
    """Rows, and the file below the benchmark's folder that they are written to."""

    file: str
    rows: Rows
    images: str = ""
    """Folder of the pictures, for JSON."""
    named: str = "{}.jpg"


class Case(NamedTuple):
    split: str
    sources: list[list[Files]]
    """One entry per format; a format may need several files."""


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


def _encoded(value: Any) -> Any:
    if isinstance(value, P):
        return base64.b64encode(png(value.number)).decode()
    if isinstance(value, list) and value and isinstance(value[0], P):
        return json.dumps([_encoded(v) for v in value])
    return value


def _struct(value: Any) -> Any:
    return {"bytes": png(value.number), "path": f"{value.number}.png"} if isinstance(value, P) else value


def write(root: Path, files: Files) -> None:
    """One file in the format of its name."""
    path = root / files.file
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tsv":
        with path.open("w", newline="", encoding="utf-8") as out:
            table = csv.DictWriter(out, list(files.rows[0]), delimiter="\t")
            table.writeheader()
            table.writerows([{k: _encoded(v) for k, v in row.items()} for row in files.rows])
    elif path.suffix == ".parquet":
        _write_parquet(path, files.rows)
    else:
        rows = [{k: _stored(root, files, v) for k, v in row.items()} for row in files.rows]
        is_list = path.suffix == ".json"
        path.write_text(json.dumps(rows) if is_list else "\n".join(json.dumps(r) for r in rows) + "\n")


def _stored(root: Path, files: Files, value: Any) -> Any:
    if not isinstance(value, P):
        return value
    if not files.images:
        return _encoded(value)
    name = files.named.format(f"{value.number:012d}")
    path = root / files.images / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value.number))
    return name


def _write_parquet(path: Path, rows: Rows) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictured = [k for k in rows[0] if any(isinstance(row[k], P) for row in rows)]
    table = pa.Table.from_pylist([{k: _struct(v) for k, v in row.items()} for row in rows])
    features = {k: {"_type": "Image"} if k in pictured else {"dtype": "string", "_type": "Value"} for k in rows[0]}
    info = {"info": {"features": features}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path)


def shard(split: str, folder: str = "") -> str:
    return f"{folder}{split}-00000-of-00001.parquet"


def lettered(question: str, options: list[str], answer: str, image: Any, **more: Any) -> dict[str, Any]:
    """A row of VLMEvalKit's multiple-choice tables."""
    letters = {letter: options[i] if i < len(options) else "" for i, letter in enumerate("ABCD")}
    return {"index": more.pop("index", 0), "image": image, "question": question, **letters, "answer": answer, **more}
