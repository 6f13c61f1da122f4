"""The outcomes table, `outcomes/1`: one row per query, model and sample; and the pair of models that is read out of it.

JSONL is what is collected into, line by line, so that a killed run loses one line at most; Parquet is what is shared.
The content hash is that of the rows in order of their keys, so both files of the same rows have the same hash.

Legend: n queries.
"""

import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mmroute.bench.deferral import Pair
from mmroute.config import options, parse
from mmroute.errors import ConfigError, InputError, MissingExtra

__all__ = [
    "SCHEMA",
    "UNITS",
    "Outcomes",
    "Row",
    "content_hash",
    "pair_up",
    "read_rows",
    "split_of_group",
    "write_parquet",
]

SCHEMA = "outcomes/1"
UNITS = ("flops", "usd", "tokens", "steps", "calls")
"""What cost may be counted in."""
UNKNOWN = -1.0
Array = Float[np.ndarray, " n"]


@options
class Row:
    """What one model made of one query."""

    query_id: str
    role: Literal["draft", "target"]
    model: str
    correct: float
    """0 or 1, or a share; an answer cut at the longest length counts as wrong."""
    task: str = ""
    level: str = ""
    group: str = ""
    """What must not be split: image, layout, quad."""
    split: str = ""
    revision: str = ""
    """Hash of the weights."""
    generation: str = ""
    """Hash of the generation settings."""
    sample: int = 0
    seed: int = 0
    parsed: bool = True
    prediction: str = ""
    scorer: str = ""
    tokens_in: int = 0
    image_tokens: int = 0
    tokens_out: int = 0
    ar_steps: int = 0
    flops: float = UNKNOWN
    """Of the whole answer, prefill and vision tower included; -1 is unknown, here and below."""
    prefill_flops: float = UNKNOWN
    usd: float = UNKNOWN
    prefill_s: float = UNKNOWN
    decode_s: float = UNKNOWN
    finish_reason: str = "stop"
    stats: dict[str, float] = field(default_factory=dict)
    """Figures of the generated tokens, so that post-hoc baselines run offline; see `gate._statistics`."""
    scores: dict[str, float] = field(default_factory=dict)
    """Scores of somebody's routers; larger goes to the target."""
    text: str = ""
    """The prompt's words."""
    pixels: tuple[float, ...] = ()
    prompt_hash: str = ""
    meta: str = "{}"

    @property
    def key(self) -> tuple[str, str, str, str, int]:
        """What is collected once."""
        return (self.prompt_hash or self.query_id, self.model, self.revision, self.generation, self.sample)


@dataclass(frozen=True)
class Outcomes:
    """One draft and one target on the same n queries."""

    draft_model: str
    target_model: str
    unit: str
    ids: list[str]
    tasks: list[str]
    levels: list[str]
    groups: list[str]
    splits: list[str]
    texts: list[str]
    draft: Array
    """Mean success over the samples."""
    target: Array
    draft_cost: Array
    target_cost: Array
    prefill_cost: Array
    """Of the draft; NaN where unknown."""
    prompt_tokens: Array
    image_tokens: Array
    pixels: list[tuple[float, ...]]
    stats: dict[str, Array]
    """Figures of the draft's first sample; NaN where a query has none."""
    labels: list[list[str]]
    """What the draft's samples answered."""
    scores: dict[str, Array]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pair(self) -> Pair:
        return Pair(self.draft, self.target, self.groups)

    def take(self, index: Sequence[int] | np.ndarray) -> "Outcomes":
        """These queries only, by position or by mask."""
        chosen = np.arange(len(self))[np.asarray(index)]
        given: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if isinstance(value, list):
                value = [value[i] for i in chosen]
            elif isinstance(value, np.ndarray):
                value = value[chosen]
            elif isinstance(value, dict):
                value = {name: column[chosen] for name, column in value.items()}
            given[each.name] = value
        return Outcomes(**given)

    @classmethod
    def joined(cls, parts: Sequence["Outcomes"]) -> "Outcomes":
        """The queries of several tables of one pair, in order; figures that not all of them have are left out."""
        given: dict[str, Any] = {}
        for each in dataclasses.fields(cls):
            values = [getattr(part, each.name) for part in parts]
            if isinstance(values[0], list):
                given[each.name] = [entry for value in values for entry in value]
            elif isinstance(values[0], np.ndarray):
                given[each.name] = np.concatenate(values)
            elif isinstance(values[0], dict):
                names = [name for name in values[0] if all(name in value for value in values)]
                given[each.name] = {name: np.concatenate([value[name] for value in values]) for name in names}
            else:
                given[each.name] = values[0]
        return cls(**given)


# ---------------------------------------------------------------------- files


def read_rows(path: Path) -> list[Row]:
    """The rows of a JSONL or Parquet table, or of every `*.jsonl` of a folder; of doubles the first one stays.

    A last line that was torn by a kill is dropped; a torn line elsewhere is an error.

    Raises:
        InputError: no such file, or a line that is no row.
        MissingExtra: Parquet without pyarrow.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise InputError(f"{path}: no outcomes there; give a .jsonl or .parquet file, or a folder of .jsonl files")
    rows: dict[tuple, Row] = {}
    for file in files:
        for row in _parquet(file) if file.suffix == ".parquet" else _jsonl(file):
            rows.setdefault((row.query_id, row.role, *row.key), row)
    return list(rows.values())


def _jsonl(path: Path) -> Iterable[Row]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            data = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                return  # killed while it was written
            raise InputError(f"{path}:{number}: not JSON: {error}") from None
        yield _row(data, f"{path}:{number}")


def _row(data: Any, where: str) -> Row:
    if not isinstance(data, dict):
        raise InputError(f"{where}: a row is a JSON object, given {type(data).__name__}")
    try:
        return parse(Row, data, where)
    except ConfigError as error:
        raise InputError(str(error)) from None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("Parquet", "pyarrow", "data") from None
    return pyarrow


_JSON_COLUMNS = ("stats", "scores", "pixels")


def write_parquet(rows: Sequence[Row], path: Path) -> str:
    """Writes the table beside and renames it; its content hash stands in the file's metadata and is returned."""
    pa = _pyarrow()
    digest = content_hash(rows)
    columns: dict[str, list[Any]] = {
        each.name: [getattr(row, each.name) for row in rows] for each in dataclasses.fields(Row)
    }
    for name in _JSON_COLUMNS:
        columns[name] = [json.dumps(value) for value in columns[name]]
    table = pa.table(columns).replace_schema_metadata({"schema": SCHEMA, "content_sha256": digest})
    beside = path.with_name(f".{path.name}.part")
    pa.parquet.write_table(table, beside)
    beside.replace(path)
    return digest


def _parquet(path: Path) -> Iterable[Row]:
    pa = _pyarrow()
    try:
        table = pa.parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a Parquet file: {error}") from None
    if (table.schema.metadata or {}).get(b"schema") != SCHEMA.encode():
        raise InputError(f"{path}: not a table of {SCHEMA}; for a published table name its format with --from")
    for number, data in enumerate(table.to_pylist(), start=1):
        data |= {name: json.loads(data[name]) for name in _JSON_COLUMNS}
        yield _row(data, f"{path} row {number}")


def content_hash(rows: Sequence[Row]) -> str:
    """SHA-256 of the rows, whatever their order and the file they came from."""
    lines = sorted(json.dumps(dataclasses.asdict(row), sort_keys=True) for row in rows)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------------- a pair


def split_of_group(
    group: str, shares: Sequence[tuple[str, float]] = (("train", 0.6), ("calibration", 0.2), ("test", 0.2))
) -> str:
    """The split a group belongs to: a function of its name alone, so no two processes disagree."""
    u = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    for name, share in shares:
        if u < share:
            return name
        u -= share
    return shares[-1][0]


def pair_up(rows: Sequence[Row], unit: str = "flops") -> Outcomes:
    """The queries that both roles answered.

    Args:
        rows: of one draft and one target.
        unit: what cost is counted in; `flops` and `usd` must be known for every row, `tokens` are in and out alike.

    Raises:
        ConfigError: no such unit.
        InputError: more than one model in a role, no query in common, or a cost that is unknown.
    """
    if unit not in UNITS:
        raise ConfigError(f"cost is counted in one of {', '.join(UNITS)} (given {unit!r})")
    by: dict[str, dict[str, list[Row]]] = {"draft": defaultdict(list), "target": defaultdict(list)}
    for row in rows:
        by[row.role][row.query_id].append(row)
    names = {role: sorted({row.model for row in rows if row.role == role}) for role in by}
    if any(len(models) != 1 for models in names.values()):
        raise InputError(f"a pair is one draft and one target; the table has {names['draft']} and {names['target']}")
    ids = [i for i in by["draft"] if i in by["target"]]
    if not ids:
        raise InputError("draft and target have no query in common; check the ids of the two")
    drafts, targets = ([sorted(by[role][i], key=lambda row: row.sample) for i in ids] for role in ("draft", "target"))
    first = [group[0] for group in drafts]
    unknown = [row.query_id for group in (*drafts, *targets) for row in group if _cost(row, unit) < 0]
    if unknown:
        raise InputError(
            f"{len(unknown)} rows have no {unit} ({unknown[0]!r}); count cost in another unit: {', '.join(UNITS)}"
        )
    keys = sorted({key for row in first for key in row.stats})
    routers = sorted({key for row in first for key in row.scores})
    return Outcomes(
        draft_model=names["draft"][0],
        target_model=names["target"][0],
        unit=unit,
        ids=ids,
        tasks=[row.task for row in first],
        levels=[row.level for row in first],
        groups=[row.group or row.query_id for row in first],
        splits=[row.split for row in first],
        texts=[row.text for row in first],
        draft=np.array([np.mean([row.correct for row in group]) for group in drafts]),
        target=np.array([np.mean([row.correct for row in group]) for group in targets]),
        draft_cost=np.array([np.mean([_cost(row, unit) for row in group]) for group in drafts]),
        target_cost=np.array([np.mean([_cost(row, unit) for row in group]) for group in targets]),
        prefill_cost=np.array([_prefill(row, unit) for row in first]),
        prompt_tokens=np.array([row.tokens_in for row in first], float),
        image_tokens=np.array([row.image_tokens for row in first], float),
        pixels=[tuple(row.pixels) for row in first],
        stats={key: np.array([row.stats.get(key, np.nan) for row in first]) for key in keys},
        labels=[[row.prediction for row in group] for group in drafts],
        scores={key: np.array([row.scores.get(key, np.nan) for row in first]) for key in routers},
    )


def _cost(row: Row, unit: str) -> float:
    counted = {"tokens": float(row.tokens_in + row.tokens_out), "steps": float(row.ar_steps), "calls": 1.0}
    return counted.get(unit, getattr(row, unit, UNKNOWN))


def _prefill(row: Row, unit: str) -> float:
    known = {"flops": row.prefill_flops, "tokens": float(row.tokens_in), "steps": 0.0, "calls": 0.0}.get(unit, UNKNOWN)
    return known if known >= 0 else float("nan")
