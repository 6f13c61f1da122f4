"""Latent steps on a CUDA device: answered and trained as on the CPU, in float32."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from latent_runs import DEPTH, VEDAS
from small_model import write_small

from mmroute import recipe as recipes
from mmroute.backbones.load import load
from mmroute.bench.items import load_task
from mmroute.recipe import equip
from mmroute.train.vedas import VedasRun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

STAGES = [{"name": "all", "steps": 3, "supervise": [[0, 1.0]], "written": 0.5, "warmup": 1}]


@pytest.fixture(autouse=True)
def _plain_arithmetic() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("model") / "m")


@pytest.mark.parametrize("grad", ["full", "none", "truncated:1"])
def test_the_first_losses_are_those_of_a_cpu(folder: Path, tmp_path: Path, grad: str) -> None:
    train: dict[str, Any] = {"tasks": {"arrows:nano": 1}, "batch": 4, "stages": STAGES, "latent_grad": grad}
    train |= {"recon_weight": 0.1} if grad == "full" else {}
    given = recipes.Recipe(name="t", think=VEDAS, deepen=DEPTH, train=train)
    losses = {}
    for device in ("cpu", "cuda"):
        with VedasRun(given, load(folder, dtype="float32").to(device), tmp_path / device) as run:
            losses[device] = []
            for _ in range(3):
                entry = run.step()
                losses[device].append([entry["loss"], entry["supervised"], entry["written"]])
                run.progress.step += 1
    assert torch.tensor(losses["cuda"]).sub(torch.tensor(losses["cpu"])).abs().max() < 1e-3  # three updates apart


def test_answers_are_those_of_a_cpu(folder: Path) -> None:
    task = load_task("arrows:nano")
    chats = [task.messages(sample, "latent") for sample in task.samples("test", 6)]
    given = recipes.Recipe(name="t", think={**VEDAS, "max_new_tokens": 4}, deepen=DEPTH)
    found = {}
    for device in ("cpu", "cuda"):
        with equip(load(folder, dtype="float32").to(device), given) as (routed, think):
            found[device] = [
                (a.ids, a.latents) for n in (1, 3) for a in routed.answer_many(chats, think=think, num_beams=n)
            ]
    assert found["cpu"] == found["cuda"]
