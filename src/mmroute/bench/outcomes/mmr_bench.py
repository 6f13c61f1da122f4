"""MMR-Bench (arXiv 2601.17814): one CSV of all sets, or one per set.

Columns: `question`, `img_path`, `dataset_idx`, and for each model `<model>_correct` or `<model>_is_correct`, and
`<model>_cost` in dollars. Questions about one image are one group.
"""

import re
from pathlib import Path

from mmroute.bench.outcomes._files import needed, number, records, truth
from mmroute.bench.outcomes.base import Row
from mmroute.errors import InputError

__all__ = ["read"]


def read(path: Path, draft: str, target: str) -> list[Row]:
    """The rows of a pair of models.

    Args:
        path: the CSV, or a folder with one CSV per set.
        draft: name of a model in the table.
        target: likewise.

    Raises:
        InputError: no such model, or a field that cannot be read.
    """
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: no CSV in this folder")
    rows = []
    for file in files:
        found = records(file)
        needed(found, ["dataset_idx", f"{draft}_cost", f"{target}_cost"], file)
        right = {model: _column(found[0], model, file) for model in (draft, target)}
        for i, record in enumerate(found, start=2):
            where, index = f"{file}:{i}", str(record["dataset_idx"])
            for role, model in (("draft", draft), ("target", target)):
                rows.append(
                    Row(
                        query_id=index,
                        role=role,  # type: ignore[arg-type]
                        model=model,
                        correct=truth(record[right[model]], where),
                        usd=number(record[f"{model}_cost"], where),
                        task=re.sub(r"_?\d+$", "", index) or file.stem,
                        group=str(record.get("img_path") or index),
                        text=str(record.get("question", "")),
                    )
                )
    return rows


def _column(record: dict, model: str, path: Path) -> str:
    for name in (f"{model}_correct", f"{model}_is_correct"):
        if name in record:
            return name
    models = sorted({name.removesuffix("_cost") for name in record if name.endswith("_cost")})
    raise InputError(f"{path}: no model {model!r}; it has {', '.join(models)}")
