"""The stock Trainer on a routed model: one process, two under DDP and two sharded have the same losses."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as sharded
from ranks import launch

NAMES = ["qwen2_5_vl", "llava"]


def _run(way: str, name: str, out: Path) -> dict:
    launch("worker.py", way, str(out), name, processes=1 if way == "one" else 2)
    return json.loads((out / f"{way}.json").read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_trainers_losses_and_their_shards_open_in_one(name: str, tmp_path: Path) -> None:
    one = _run("one", name, tmp_path)
    assert one["world"] == 1
    assert one["losses"][-1] < one["losses"][0] - 0.5, "nothing was learned"
    for way in ("ddp", "fsdp2"):
        two = _run(way, name, tmp_path)
        assert two["world"] == 2
        # Sums over half the rows are added up in another order: 2e-6 seen.
        assert two["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-5), way

    whole = torch.load(tmp_path / "whole.pt")
    read = {key: torch.zeros_like(value) for key, value in whole.items()}
    sharded.load(read, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert any(key.startswith("mmroute.") for key in read)
    for key, value in whole.items():
        torch.testing.assert_close(read[key], value, rtol=0, atol=1e-5, msg=key)
