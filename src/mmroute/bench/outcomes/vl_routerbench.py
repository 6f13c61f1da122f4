"""VL-RouterBench: quality and cost matrices with their registry, or the oracle's scores sample by sample.

data/matrices/Y.npz (quality, samples x models; key Y, data or arr_0)   data/matrices/C.npy (dollars)
data/registry/meta.parquet (sample_id, dataset)   data/registry/models.txt   SPLITS/{train,dev,test}.jsonl
BENCHMARKS/*/*_samples.jsonl (sample_id, prompt, assets)   ORACLE/score/*.parquet (sample_id, model_id, quality)
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from mmroute.bench.outcomes._files import needed, number, records, truth
from mmroute.bench.outcomes.base import UNKNOWN, Row
from mmroute.errors import InputError

__all__ = ["read"]


def read(path: Path, draft: str, target: str) -> list[Row]:
    """The rows of a pair of models.

    Args:
        path: folder of the data set.
        draft: name of a model in it.
        target: likewise.

    Raises:
        InputError: a file is missing, sizes do not fit, or there is no such model.
    """
    known = _matrices(path, draft, target) if (path / "data/matrices/Y.npz").is_file() else _scores(path, draft, target)
    samples = {
        str(record.get("sample_id", record.get("id"))): (file.parent.name, record)
        for file in sorted(path.glob("BENCHMARKS/*/*_samples.jsonl"))
        for record in records(file)
    }
    split = {
        str(record["sample_id"]): file.stem for file in sorted(path.glob("SPLITS/*.jsonl")) for record in records(file)
    }
    rows = []
    for sample, model, quality, usd in known:
        task, record = samples.get(sample, ("", {}))
        rows.append(
            Row(
                query_id=sample,
                role="draft" if model == draft else "target",
                model=model,
                correct=quality,
                usd=usd,
                task=task or str(record.get("dataset", "")),
                group=_image(record) or sample,
                split=split.get(sample, ""),
                text=str(record.get("prompt", record.get("question", ""))),
            )
        )
    return rows


def _matrices(path: Path, draft: str, target: str) -> list[tuple[str, str, float, float]]:
    with np.load(path / "data/matrices/Y.npz", allow_pickle=False) as file:
        quality = file[next((key for key in ("Y", "data", "arr_0") if key in file.files), file.files[0])]
    cost = np.load(path / "data/matrices/C.npy", allow_pickle=False)
    meta = records(path / "data/registry/meta.parquet")
    needed(meta, ["sample_id"], path / "data/registry/meta.parquet")
    names = path / "data/registry/models.txt"
    if not names.is_file():
        raise InputError(f"{names}: no such file; it names the columns of Y.npz")
    models = [line.strip() for line in names.read_text(encoding="utf-8").splitlines() if line.strip()]
    if quality.shape != (len(meta), len(models)) or cost.shape != quality.shape:
        sizes = f"the registry has {len(meta)} samples and {len(models)} models"
        raise InputError(f"{path}: Y is {quality.shape}, C {cost.shape}, {sizes}")
    for model in (draft, target):
        if model not in models:
            raise InputError(f"{path}: no model {model!r}; it has {', '.join(models)}")
    return [
        (str(record["sample_id"]), model, truth(quality[i, j], str(names)), number(cost[i, j], str(names)))
        for i, record in enumerate(meta)
        for model, j in ((m, models.index(m)) for m in (draft, target))
    ]


def _scores(path: Path, draft: str, target: str) -> list[tuple[str, str, float, float]]:
    files = sorted(path.glob("ORACLE/score/*.parquet"))
    if not files:
        raise InputError(f"{path}: neither data/matrices/Y.npz nor ORACLE/score/*.parquet; give the data set's folder")
    out, models = [], set()
    for file in files:
        found = records(file)
        needed(found, ["sample_id", "model_id", "quality"], file)
        for record in found:
            models.add(str(record["model_id"]))
            if record["model_id"] in (draft, target):
                usd = number(record.get("cost", UNKNOWN), str(file))
                out.append((str(record["sample_id"]), record["model_id"], truth(record["quality"], str(file)), usd))
    missing = {draft, target} - models
    if missing:
        raise InputError(f"{path}: no model {', '.join(sorted(missing))}; it has {', '.join(sorted(models))}")
    return out


def _image(record: dict[str, Any]) -> str:
    assets = record.get("assets") or []
    paths = [str(asset.get("path", "")) for asset in assets if isinstance(asset, dict)]
    return json.dumps(paths) if any(paths) else ""
