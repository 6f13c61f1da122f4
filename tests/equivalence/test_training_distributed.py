"""Two processes train what one does: DDP and FSDP2, gloo over loopback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMES = ["qwen2_5_vl", "chameleon", "llava"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path):
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "MMROUTE_TEST_FOLDER": str(tmp_path),
    }
    launch = ["-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    command = [sys.executable, *launch, f"--master-port={_free_port()}", str(ROOT / "distributed_worker.py"), *NAMES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["world"] == 2
    for name in NAMES:
        one = found[name]["one"]
        assert one[-1] < one[0] - 0.1, "nothing was learned"
        assert found[name]["saved"], "sharded routers came back as something else"
        for way in ("ddp", "fsdp", "fsdp checkpointed"):
            assert found[name][way] == pytest.approx(one, rel=0, abs=2e-6), f"{name}, {way}"
