"""RouterBench (arXiv 2403.12031): `sample_id, prompt, eval_name`, per model its quality and `<model>|total_cost`.

It is released as a pickle, which runs code when it is opened: convert it to CSV or Parquet where you trust it.
"""

from pathlib import Path

from mmroute.bench.outcomes._files import needed, number, records, truth
from mmroute.bench.outcomes.base import Row

__all__ = ["read"]


def read(path: Path, draft: str, target: str) -> list[Row]:
    """The rows of a pair of models.

    Args:
        path: CSV or Parquet.
        draft: name of a model in the table.
        target: likewise.

    Raises:
        InputError: a pickle, no such model, or a field that cannot be read.
    """
    found = records(path)
    needed(found, ["sample_id", draft, target, f"{draft}|total_cost", f"{target}|total_cost"], path)
    return [
        Row(
            query_id=str(record["sample_id"]),
            role=role,  # type: ignore[arg-type]
            model=model,
            correct=truth(record[model], f"{path}:{i}"),
            usd=number(record[f"{model}|total_cost"], f"{path}:{i}"),
            task=str(record.get("eval_name", "")),
            text=str(record.get("prompt", "")),
        )
        for i, record in enumerate(found, start=2)
        for role, model in (("draft", draft), ("target", target))
    ]
