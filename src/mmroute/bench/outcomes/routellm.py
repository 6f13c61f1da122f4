"""RouteLLM (arXiv 2406.18665): its GSM8K and MMLU tables, `prompt` and one boolean column per model.

Prompts that were in the routers' training data are published as lists; those are left out.
"""

import json
from pathlib import Path

from mmroute.bench.outcomes._files import needed, records, truth
from mmroute.bench.outcomes.base import Row
from mmroute.errors import InputError

__all__ = ["read"]


def read(path: Path, draft: str, target: str, contaminated: Path | None = None) -> list[Row]:
    """The rows of a pair of models; cost is counted in calls.

    Args:
        path: CSV.
        draft: name of a model in the table.
        target: likewise.
        contaminated: JSON or JSONL with the prompts to leave out; None looks for `contaminated_prompts.jsonl` beside.

    Raises:
        InputError: no such model, or a field that cannot be read.
    """
    found = records(path)
    needed(found, ["prompt", draft, target], path)
    beside = path.with_name("contaminated_prompts.jsonl")
    listed = contaminated or (beside if beside.is_file() else None)
    skipped = _prompts(listed) if listed is not None else set()
    return [
        Row(
            query_id=f"{path.stem}-{i}",
            role=role,  # type: ignore[arg-type]
            model=model,
            correct=truth(record[model], f"{path}:{i}"),
            task=str(record.get("domain") or path.stem),
            text=record["prompt"],
        )
        for i, record in enumerate(found, start=2)
        if record["prompt"] not in skipped
        for role, model in (("draft", draft), ("target", target))
    ]


def _prompts(path: Path) -> set[str]:
    try:
        text = path.read_text(encoding="utf-8")
        lines = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a list of prompts: {error}") from None
    return {line["eval_prompt"] if isinstance(line, dict) and "eval_prompt" in line else str(line) for line in lines}
