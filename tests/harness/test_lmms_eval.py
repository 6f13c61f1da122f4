"""lmms-eval itself on the bundled model and a local task, in the environment that `make .venv-lmms` sets up.

Another one is used where `MMROUTE_LMMS_PYTHON` names its Python.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("MMROUTE_LMMS_PYTHON", ROOT / ".venv-lmms" / "bin" / "python"))
ITEMS = 16

pytestmark = [
    pytest.mark.harness,
    pytest.mark.skipif(not PYTHON.exists(), reason="lmms-eval has an environment of its own: make .venv-lmms"),
]


def run(python: Path, *arguments: str, cwd: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_harness_finds_the_model_asks_it_and_scores_it_as_we_do(tmp_path: Path) -> None:
    mmroute, lmms = ["-c", "from mmroute.cli import main; main()"], ["-m", "lmms_eval"]
    made = ["--task", "frozenlake", "--split", "test", "--n", str(ITEMS), "--format", "jsonl", "-o", "lakes"]
    run(Path(sys.executable), *mmroute, "data", "make", *made, cwd=tmp_path)
    run(Path(sys.executable), *mmroute, "data", "export", "lakes", "--to", "lmms", "-o", "task", cwd=tmp_path)
    model = ["--model", "mmroute", "--model_args", "pretrained=tiny,recipe=dare-l,traces=costs.jsonl"]
    asked = ["--include_path", "task", "--tasks", "mmroute_frozenlake", "--batch_size", "8", "--output_path", "out"]
    run(PYTHON, *lmms, *model, *asked, cwd=tmp_path)
    (found,) = (json.loads(path.read_text()) for path in tmp_path.glob("out/**/*_results.json"))
    costs = [json.loads(line) for line in (tmp_path / "costs.jsonl").read_text().splitlines()]
    assert [line["doc_id"] for line in costs] == list(range(ITEMS))
    assert all(0 < line["keep"]["vision"] < 1 and line["flops"] > 0 for line in costs)
    assert found["results"]["mmroute_frozenlake"]["acc,none"] > 0.7
