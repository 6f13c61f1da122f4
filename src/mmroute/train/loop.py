"""Training that can be killed: one state file written beside and renamed, a log cut back to it, nothing random kept.

Everything a step draws comes from (seed, step), so the state is the weights, the optimisers' moments and the step. A
run that was killed and resumed therefore gives the weights of one that was not, bit for bit, on the same machine.
"""

import errno
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmroute import files
from mmroute.errors import CheckpointMismatch, ConfigError, InputError, MmrouteError
from mmroute.train.follow import Follower

__all__ = [
    "Journal",
    "Learning",
    "Optimisers",
    "Progress",
    "go_on",
    "load_moments",
    "load_state",
    "moments",
    "rate_at",
    "refuse_old_run",
    "replacing",
    "save_state",
    "unwritable",
]

logger = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the name `path` only when all of it is on disk.

    Raises:
        MmrouteError: the disk is full; what stood at `path` still stands there.
    """
    try:
        with files.replacing(path) as beside:
            yield beside
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: Exception) -> MmrouteError:
    """What to raise when a file could not be written."""
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    what = "the disk is full" if full else str(error)
    return MmrouteError(
        f"could not write {path}: {what}; what was written before is intact: make room, then run again with --resume"
    )


class Journal:
    """An append-only JSONL file that can be cut back to where a checkpoint stands, and who else hears its lines."""

    def __init__(self, path: Path | None, keep_bytes: int = 0, followers: Sequence[Follower] = ()) -> None:
        """Drops what was written after `keep_bytes`. None writes nothing: another process of the run does."""
        self.path, self.followers = path, followers
        self.num_bytes = keep_bytes
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.truncate(keep_bytes)
        except OSError as error:
            raise unwritable(path, error) from error

    def begin(self, done: int, total: int) -> None:
        """Tells the followers where the run stands, before its first line.

        Args:
            done: steps of it that are over.
            total: steps in all, at most.
        """
        for follower in self.followers:
            follower.begin(done, total)

    def write(self, **entry: Any) -> None:
        """Appends one line.

        Raises:
            MmrouteError: the disk is full.
        """
        if self.path is None:
            return
        line = json.dumps(entry).encode() + b"\n"
        try:
            with self.path.open("ab") as file:
                file.write(line)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self.num_bytes += len(line)
        for follower in self.followers:
            follower.hear(entry)


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    """Steps done over all phases; seeds the next step's randomness."""
    phase: int = 0
    phase_step: int = 0
    """Steps done in this phase."""
    log_bytes: int = 0
    cpu_s: float = 0.0
    """CPU seconds of all processes that worked on this run."""
    recipe: str = ""
    """The recipe as JSON: a run is not resumed with another one."""
    finished: bool = False


class Learning(Protocol):
    """What a run saves of its optimisers, and takes back."""

    def tensors(self) -> dict[str, Tensor]:
        """By name."""

    def load(self, tensors: dict[str, Tensor]) -> None:
        """What `tensors` gave."""


def moments(name: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's moments as `name.INDEX.KEY`."""
    return {
        f"{name}.{index}.{key}": value
        for index, state in optimiser.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_moments(name: str, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Takes what `moments` gave out of tensors that may be others' too."""
    state: dict[int, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        owner, _, rest = path.partition(".")
        if owner == name:
            index, key = rest.split(".", 1)
            state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


class Optimisers:
    """Muon for the matrices, AdamW for embeddings, the patch projection, norms and biases."""

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n and "norm" not in n]
        taken = {id(p) for p in matrices}
        rest = [p for _, p in named if id(p) not in taken]
        self.muon = torch.optim.Muon(
            matrices, lr=1.0, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
                {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=1.0,
            betas=(0.9, 0.98),
        )

    def step(self, muon: float, adamw: float) -> None:
        """One update at these rates; clears the gradients."""
        for optimiser, rate in ((self.muon, muon), (self.adamw, adamw)):
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """All moments, by name."""
        return moments("muon", self.muon) | moments("adamw", self.adamw)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes the moments that `tensors` gave."""
        load_moments("muon", self.muon, tensors)
        load_moments("adamw", self.adamw, tensors)


def rate_at(step: int, steps: int, warmup: int, floor: float) -> float:
    """Share of the peak rate: a straight rise, then a cosine down to `floor`.

    Example:
        >>> rate_at(0, 100, 10, 0.1), round(rate_at(99, 100, 10, 0.1), 3)
        (0.1, 0.1)
    """
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / warmup) * cosine


_NO_STATE = "is no training state of this recipe"


def save_state(path: Path, model: nn.Module, optimisers: Learning, progress: Progress) -> None:
    """Writes all that a resumed run needs, in one file that is whole or not there.

    Raises:
        MmrouteError: the disk is full; the state before this one is intact.
    """
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= optimisers.tensors()
    with replacing(path) as beside:
        save_file(
            {name: t.contiguous().cpu() for name, t in tensors.items()},
            beside,
            metadata={"progress": json.dumps(vars(progress))},
        )


def load_state(path: Path, model: nn.Module, optimisers: Learning) -> Progress:
    """Puts a saved state into the model and the optimisers.

    Raises:
        CheckpointMismatch: not a state of this model.
    """
    progress = _progress_of(path)
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: what is mapped would hold on to the old file's room after it is replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(tensors.pop(f"model.{name}"))
    except (SafetensorError, KeyError, TypeError, RuntimeError, OSError) as error:
        raise CheckpointMismatch(f"{path} {_NO_STATE} ({error}); start without --resume") from error
    optimisers.load(tensors)
    return progress


def _progress_of(path: Path) -> Progress:
    try:
        with safe_open(path, framework="pt") as file:
            return Progress(**json.loads((file.metadata() or {})["progress"]))
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointMismatch(f"{path} {_NO_STATE} ({error}); start without --resume") from error


def refuse_old_run(state: Path, resume: bool) -> None:
    """
    Raises:
        InputError: there is a state already, and nobody asked to go on with it.
    """
    if state.exists() and not resume:
        raise InputError(f"{state.parent} holds a run already; add --resume to go on with it, or give another --out")


def go_on(state: Path, model: nn.Module, learning: Learning, fresh: Progress) -> Progress:
    """Where a folder's run stands, its weights and moments put back; `fresh` where it has not begun.

    Raises:
        ConfigError: the state belongs to another recipe.
        CheckpointMismatch: it is no state of this model.
    """
    if not state.exists():
        return fresh
    if _progress_of(state).recipe != fresh.recipe:  # before anything is put back: another recipe has other parts
        raise ConfigError(f"{state.parent} was started with another recipe; give the same one, or another --out")
    return load_state(state, model, learning)
