"""Where a figure comes from: the command, the source it ran, and the machine. Stands in every result and checkpoint."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmroute import __version__
from mmroute.config import options

__all__ = ["Machine", "Run", "commit_of_source", "machine_here", "origin_here", "run_here"]


@options
class Run:
    """Where the file comes from."""

    command: str
    commit: str
    dirty: bool
    """Whether the source differed from the commit; such a file may not fill a README table."""
    started_at: str
    wall_s: float
    mmroute: str


@options
class Machine:
    device: str
    cpu: str
    threads: int
    torch: str
    transformers: str
    dtype: str
    attention: str


def commit_of_source() -> tuple[str, bool]:
    """The commit of the running source, and whether tracked source differs from it; ("", True) outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = _git("rev-parse", "--short=12", "HEAD", at=here)
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", str(here), at=here)
    except (OSError, subprocess.CalledProcessError):
        return "", True
    return commit, bool(changed)


def _git(*arguments: str, at: Path) -> str:
    done = subprocess.run(["git", *arguments], cwd=at, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def origin_here(program: str = "mmroute") -> dict[str, Any]:
    """`command`, `commit` and `dirty` of this process, for results that are not a class; ask when the run begins.

    Args:
        program: what stands before the arguments.
    """
    commit, dirty = commit_of_source()
    return {"command": f"{program} {shlex.join(sys.argv[1:])}".strip(), "commit": commit, "dirty": dirty}


def run_here(command: str, commit: str, dirty: bool, started_at: str, wall_s: float) -> Run:
    """Where a result comes from; `commit` and `dirty` as they were when the run began."""
    return Run(command=command, commit=commit, dirty=dirty, started_at=started_at, wall_s=wall_s, mmroute=__version__)


def machine_here(device: str, dtype: str, attention: str, threads: int = 1) -> Machine:
    """What the run runs on; no host name."""
    import torch
    import transformers

    return Machine(
        device=device,
        cpu=_cpu_name(),
        threads=threads,
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
        dtype=dtype,
        attention=attention,
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
