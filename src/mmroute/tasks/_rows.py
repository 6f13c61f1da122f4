"""One row of the schema `mmhop/1`: its fields, a sample to it and back, and the same fields for Arrow and `datasets`.

Every struct has the same keys in every row; nothing is null: an empty value is -1, [] or "". `meta` is a JSON string,
which is stable across versions of `datasets`.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from mmroute.errors import InputError
from mmroute.tasks.base import Choice, Hop, Sample

if TYPE_CHECKING:
    import pyarrow

__all__ = ["SCHEMA", "arrow_schema", "row_of", "sample_of"]

SCHEMA = "mmhop/1"

_IMAGE = "image"
# One description from which the Arrow schema, the `datasets` features and the check of what is read are all made:
# a string is a scalar, [x] a list of x, a dictionary a struct.
_FIELDS: dict[str, Any] = {
    "schema": "string",
    "id": "string",
    "task": "string",
    "split": "string",
    "group": "string",
    "question": "string",
    "images": [_IMAGE],
    "prompt_images": ["int32"],
    "hops": [
        {
            "text": "string",
            "image": "int32",
            "boxes": [["float32"]],
            "box_image": "int32",
            "state": "string",
            "relevant": ["int32"],
        }
    ],
    "choices": [{"label": "string", "text": "string"}],
    "answer": "string",
    "answer_index": "int32",
    "answer_text": "string",
    "difficulty": {
        "level": "string",
        "score": "float64",
        "hops": "int32",
        "grid": "int32",
        "distractors": "int32",
        "blocked": "int32",
        "noise": "float64",
        "solvable": "bool",
    },
    "meta": "string",
}
_UNKNOWN: dict[str, Any] = {"string": "", "int32": -1, "float64": -1.0, "bool": True}
_PYTHON: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "int32": (int,),
    "float32": (float, int),
    "float64": (float, int),
    "bool": (bool,),
}


def row_of(sample: Sample) -> dict[str, Any]:
    """The sample as a plain row of the schema; `images` stay what they are.

    Raises:
        InputError: a difficulty that the schema does not know, or an index that points at no image.
    """
    unknown = sorted(set(sample.difficulty) - set(_FIELDS["difficulty"]))
    if unknown:
        raise InputError(f"{sample.id}: difficulty has no field {', '.join(unknown)}; put it into meta")
    difficulty = {k: sample.difficulty.get(k, _UNKNOWN[kind]) for k, kind in _FIELDS["difficulty"].items()}
    row = {
        "schema": SCHEMA,
        **{f.name: getattr(sample, f.name) for f in dataclasses.fields(sample)},
        "prompt_images": list(sample.prompt_images),
        # Parquet keeps boxes as float32: six decimals are the same number there and in JSON.
        "hops": [
            {**dataclasses.asdict(h), "boxes": [[round(float(x), 6) for x in box] for box in h.boxes]}
            for h in sample.hops
        ],
        "choices": [dataclasses.asdict(c) for c in sample.choices],
        "difficulty": difficulty,
        "meta": json.dumps(sample.meta, sort_keys=True, separators=(",", ":")),
    }
    _check_indices(row, sample.id)
    return {key: row[key] for key in _FIELDS}


def sample_of(row: dict[str, Any], where: str) -> Sample:
    """The sample behind a row.

    Args:
        row: as read; `images` may be anything, the rest is checked.
        where: names the row in messages, e.g. `data/metadata.jsonl:12`.

    Raises:
        InputError: another schema, a missing field, a value of the wrong type, or an index that points nowhere.
    """
    if row.get("schema") != SCHEMA:
        raise InputError(f"{where}: schema is {row.get('schema')!r}, this version reads {SCHEMA!r}")
    _check({k: v for k, v in row.items() if k != "images"}, {k: v for k, v in _FIELDS.items() if k != "images"}, where)
    _check_indices(row, where)
    try:
        meta = json.loads(row["meta"])
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: meta is not JSON: {error}") from None
    fields = {f.name: row[f.name] for f in dataclasses.fields(Sample)}
    hops = [Hop(**{**h, "boxes": [[round(x, 6) for x in box] for box in h["boxes"]]}) for h in row["hops"]]
    return Sample(**{**fields, "hops": hops, "choices": [Choice(**c) for c in row["choices"]], "meta": meta})


def _check(value: Any, kind: Any, where: str, path: str = "") -> None:
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise InputError(f"{where}: {path}: a mapping is expected, given {value!r}")
        lead = f"{path}." if path else ""
        for key in kind:
            if key not in value:
                raise InputError(f"{where}: no field '{lead}{key}'")
            _check(value[key], kind[key], where, f"{lead}{key}")
        extra = sorted(set(value) - set(kind))
        if extra:
            raise InputError(f"{where}: unknown field '{lead}{extra[0]}'; known: {', '.join(kind)}")
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise InputError(f"{where}: {path}: a list is expected, given {value!r}")
        for i, item in enumerate(value):
            _check(item, kind[0], where, f"{path}[{i}]")
    elif not isinstance(value, _PYTHON[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise InputError(f"{where}: {path}: {kind} is expected, given {value!r}")


def _check_indices(row: dict[str, Any], where: str) -> None:
    count = len(row["images"])
    wanted = [("prompt_images", i) for i in row["prompt_images"]]
    for n, hop in enumerate(row["hops"]):
        wanted += [(f"hops[{n}].{k}", hop[k]) for k in ("image", "box_image") if hop[k] != -1]
    for name, index in wanted:
        if not 0 <= index < count:
            raise InputError(f"{where}: {name} is {index}, but the row has {count} images")


def _arrow_type(kind: Any, pa: Any) -> "pyarrow.DataType":
    if kind == _IMAGE:
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    if isinstance(kind, list):
        return pa.list_(_arrow_type(kind[0], pa))
    if isinstance(kind, dict):
        return pa.struct([(k, _arrow_type(v, pa)) for k, v in kind.items()])
    return pa.type_for_alias(kind)


def _feature(kind: Any) -> Any:
    if kind == _IMAGE:
        return {"_type": "Image"}
    if isinstance(kind, list):
        return {"feature": _feature(kind[0]), "_type": "List"}
    if isinstance(kind, dict):
        return {k: _feature(v) for k, v in kind.items()}
    return {"dtype": kind, "_type": "Value"}


def arrow_schema(pa: Any) -> "pyarrow.Schema":
    """The same fields as an Arrow schema; `pa` is the module pyarrow, which only its callers import."""
    # The key with which `datasets` knows that the structs are pictures, without being asked.
    info = {"info": {"features": _feature(_FIELDS)}}
    fields = [(k, _arrow_type(v, pa)) for k, v in _FIELDS.items()]
    return pa.schema(fields, metadata={"huggingface": json.dumps(info)})
