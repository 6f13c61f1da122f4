"""The stock Trainer on a routed model: one process, two under DDP and two sharded have the same losses."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as sharded

HERE = Path(__file__).parent
NAME = "qwen2_5_vl"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(way: str, out: Path) -> dict:
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
    }
    launch = ["-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    start = [] if way == "one" else [*launch, f"--master-port={_free_port()}"]
    command = [sys.executable, *start, str(HERE / "worker.py"), way, str(out), NAME]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((out / f"{way}.json").read_text())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_two_processes_have_the_trainers_losses_and_their_shards_open_in_one(tmp_path: Path) -> None:
    one = _run("one", tmp_path)
    assert one["world"] == 1
    assert one["losses"][-1] < one["losses"][0] - 0.5, "nothing was learned"
    for way in ("ddp", "fsdp2"):
        two = _run(way, tmp_path)
        assert two["world"] == 2
        # Sums over half the rows are added up in another order: 2e-6 seen.
        assert two["losses"] == pytest.approx(one["losses"], rel=0, abs=1e-5), way

    whole = torch.load(tmp_path / "whole.pt")
    read = {name: torch.zeros_like(value) for name, value in whole.items()}
    sharded.load(read, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert any(name.startswith("mmroute.") for name in read)
    for name, value in whole.items():
        torch.testing.assert_close(read[name], value, rtol=0, atol=1e-5, msg=name)
