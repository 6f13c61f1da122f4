"""`mmroute train vedas` on two processes makes the updates of one process with the whole batch."""

import json
from pathlib import Path

import pytest
import yaml
from ranks import launch
from safetensors.torch import load_file

from mmroute.tasks._texts import VOCABULARY
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build

SMALL = Shape(
    hidden=32, layers=3, heads=2, kv_heads=1, mlp=48, mrope_section=(2, 3, 3), vision_hidden=32, vision_mlp=48
)
RECIPE = {
    "think": {"name": "vedas", "num_latents": 8, "stop": "head", "replay_tokens": 3},
    "deepen": {"name": "vedas", "deepen_tokens": 5, "chunk_tokens": 2, "scale_init": 0.2},
    "train": {
        "tasks": {"arrows:nano": 1, "frozenlake:nano": 1},
        "batch": 4,
        "stages": [
            {"name": "one", "latents": 1, "steps": 3, "mix": 0.5, "written": 0.5},
            {"name": "all", "steps": 3, "supervise": [[0, 1.0]], "written": 0},
        ],
        "save_every": 2,
        "eval_every": 3,
        "eval_items": 4,
    },
}


def trained(tmp_path: Path, processes: int) -> tuple[list[dict], dict, dict]:
    """The log, the facts of the result, and the new weights."""
    out = tmp_path / f"run-{processes}"
    options = ["--recipe", str(tmp_path / "small.yaml"), "--model", str(tmp_path / "model"), "--out", str(out)]
    launch("mmroute_main.py", "train", "vedas", *options, processes=processes)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    facts = json.loads((out / "latent" / "RESULTS.json").read_text())
    return lines, facts, load_file(next((out / "latent").glob("backbone.safetensors")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_two_processes_make_the_updates_of_one(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", build(SMALL, VOCABULARY, 0), "x: 1\n", {})
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(RECIPE))
    one, facts, weights = trained(tmp_path, 1)
    two, shared, others = trained(tmp_path, 2)
    assert (facts["processes"], shared["processes"]) == (1, 2)
    assert len(one) == len(two), "one process writes"
    assert facts["tasks"] == shared["tasks"]
    steps = [(a, b) for a, b in zip(one, two, strict=True) if "loss" in a]
    assert len(steps) == 6
    for a, b in steps:
        for name in ("loss", "supervised", "written", "norm"):
            if name in a:
                # Sums over half the rows are added up in another order.
                assert b[name] == pytest.approx(a[name], abs=3e-5), (name, a["step"])
    moved = max(float((weights[name].float() - others[name].float()).abs().max()) for name in weights)
    assert moved < 1e-2, "both stand at the same weights, but for the last bits of bfloat16"
