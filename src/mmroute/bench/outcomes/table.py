"""Any table with a line per query: CSV, TSV, JSONL or Parquet, its columns named by a map.

Without a map the columns are `id, text, group, task, split, draft_correct, target_correct, draft_cost,
target_cost`; every column that begins with `score_` is somebody's router.
"""

from collections.abc import Mapping
from pathlib import Path

from mmroute.bench.outcomes._files import needed, number, records, truth
from mmroute.bench.outcomes.base import UNKNOWN, Row
from mmroute.errors import ConfigError

__all__ = ["COLUMNS", "read"]

COLUMNS = (
    "id",
    "text",
    "group",
    "task",
    "split",
    "draft_correct",
    "target_correct",
    "draft_cost",
    "target_cost",
)
SCORE = "score_"


def read(
    path: Path, draft: str = "draft", target: str = "target", columns: Mapping[str, str] | None = None
) -> list[Row]:
    """The rows of the table's pair; cost is in dollars where it is given.

    Args:
        path: the file.
        draft: what to call the draft.
        target: what to call the target.
        columns: our name to the table's, for those that differ.

    Raises:
        ConfigError: a name that is not one of `COLUMNS`.
        InputError: a column is missing, or a field cannot be read.
    """
    unknown = sorted(set(columns or {}) - set(COLUMNS))
    if unknown:
        raise ConfigError(f"columns: no {', '.join(unknown)}; one of {', '.join(COLUMNS)}")
    named = {name: (columns or {}).get(name, name) for name in COLUMNS}
    found = records(path)
    needed(found, [named["draft_correct"], named["target_correct"]], path)
    routers = [name for name in found[0] if name.startswith(SCORE)]
    rows = []
    for i, record in enumerate(found):
        where = f"{path} line {i + 1}"
        scores = {name.removeprefix(SCORE): number(record[name], where) for name in routers}
        for role, model in (("draft", draft), ("target", target)):
            cost = record.get(named[f"{role}_cost"])
            rows.append(
                Row(
                    query_id=str(record.get(named["id"], i)),
                    role=role,  # type: ignore[arg-type]
                    model=model,
                    correct=truth(record[named[f"{role}_correct"]], where),
                    usd=UNKNOWN if cost in (None, "") else number(cost, where),
                    task=str(record.get(named["task"]) or ""),
                    group=str(record.get(named["group"]) or ""),
                    split=str(record.get(named["split"]) or ""),
                    text=str(record.get(named["text"]) or ""),
                    scores=scores,
                )
            )
    return rows
