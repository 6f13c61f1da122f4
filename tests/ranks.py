"""Starts a script of `tests/distributed` in one process, or in several of a `torchrun` on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def launch(script: str, *arguments: str, processes: int = 1) -> str:
    """Its standard output; fails where the script does."""
    environment = {
        **os.environ,
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    start: list[str] = []
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        address = ["--master-addr=127.0.0.1", f"--master-port={port}"]
        start = ["-m", "torch.distributed.run", "--nnodes=1", f"--nproc-per-node={processes}", *address, "--"]
    command = [sys.executable, *start, str(HERE / "distributed" / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
