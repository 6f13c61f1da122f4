"""Which of the processes that `torchrun` or `accelerate launch` started this one is, and what it computes on.

Launchers tell their processes by the variables `WORLD_SIZE` and `LOCAL_RANK`.
"""

import os
from typing import TYPE_CHECKING

from mmroute.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["choose_device", "device_named", "num_processes", "refuse_company"]

_NAMES = ("cpu", "cuda", "auto")


def num_processes() -> int:
    """Processes of this launch, on all its machines; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def refuse_company(command: str, instead: str) -> None:
    """Stops a command that knows one process only, before N of it write the same files.

    Args:
        command: what was typed, for the message.
        instead: what several processes can do.

    Raises:
        ConfigError: a launcher started more than one.
    """
    world = num_processes()
    if world > 1:
        raise ConfigError(
            f"`{command}` is one process, and {world} were started (WORLD_SIZE={world}): each would do all of it and "
            f"write the same files; start it once, without torchrun or accelerate launch; {instead}"
        )


def choose_device(name: str, process: int, cards: int) -> str:
    """What `--device` means to one process: `cpu`, or the card of its own.

    Args:
        name: `cpu`, `cuda`, or `auto`: a card where the machine has any.
        process: its number on this machine, from 0.
        cards: CUDA devices that it sees.

    Returns:
        `cpu` or `cuda:N`.

    Raises:
        ConfigError: another name, no card though `cuda` was asked for, or fewer cards than processes.
    """
    if name not in _NAMES:
        raise ConfigError(f"--device is one of {', '.join(_NAMES)} (given {name!r})")
    if name == "cpu" or (name == "auto" and cards == 0):
        return "cpu"
    if cards == 0:
        raise ConfigError("--device cuda, but torch finds no CUDA device on this machine; use cpu, or auto")
    if process >= cards:
        raise ConfigError(
            f"--device {name}: process {process} of this machine has no CUDA device of its own, there are {cards}; "
            f"start at most {cards} processes on a machine, or use cpu"
        )
    return f"cuda:{process}"


def device_named(name: str, process: int | None = None) -> "torch.device":
    """`choose_device` for this process on this machine; a card becomes torch's current one.

    Args:
        name: as in `choose_device`.
        process: its number, where no launcher counts: `LOCAL_RANK`, or 0, if not given.

    Raises:
        ConfigError: as in `choose_device`.
    """
    import torch  # seconds to import; the rest of this file is asked by commands that may never need it

    number = int(os.environ.get("LOCAL_RANK", 0)) if process is None else process
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(choose_device(name, number, cards))
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams and clocks are those of the current one
    return device
