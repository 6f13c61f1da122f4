"""Processes that train one model together, each on its share of every batch.

    torchrun --nproc-per-node 8 --no-python -- mmroute train vedas --recipe latent --device cuda  # or accelerate launch

Every process draws the whole batch, since what a step draws depends on the seed and the step alone, and works on its
rows. Losses are means over all words of all processes and gradients are averaged before they are clipped, so the
updates are those of one process with the whole batch, but for the order of sums. The first process looks and writes.

Source: none.
Deviates: the papers name no way to spread; weights, moments and caches are whole on every device.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from mmroute.errors import ConfigError, MissingExtra
from mmroute.processes import num_processes

__all__ = ["Ranks"]

_T = TypeVar("_T")


class Ranks:
    """This process among those of the run; alone without a launcher."""

    def __init__(self, world: int = 1, rank: int = 0) -> None:
        self.world, self.rank = world, rank

    @classmethod
    def launched(cls, device: torch.device) -> "Ranks":
        """What `torchrun` or `accelerate launch` started; joins the others.

        Args:
            device: what this process computes on.

        Raises:
            MissingExtra: there are others, and accelerate is not installed.
        """
        if num_processes() == 1:
            return cls()
        try:
            from accelerate import PartialState
        except ImportError as error:
            raise MissingExtra("training on several processes", "accelerate", "train") from error
        state = PartialState(cpu=device.type == "cpu")
        return cls(state.num_processes, state.process_index)

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, rows: Sequence[_T]) -> list[_T]:
        """The rows of this process: every `world`-th.

        Raises:
            ConfigError: fewer rows than processes.
        """
        if len(rows) < self.world:
            raise ConfigError(
                f"{len(rows)} rows a batch for {self.world} processes; give each one at least, train.batch"
            )
        return list(rows[self.rank :: self.world])

    def mean(self, values: Tensor) -> Tensor:
        """What this process adds to the mean over all processes' values, times their number: once gradients are
        averaged, they are those of the mean.

        Args:
            values: (n,) with a gradient; n may differ from process to process. The mean of none at all is 0.
        """
        if self.world == 1:
            return values.mean() if values.numel() else values.sum()
        count = torch.tensor(float(values.numel()), device=values.device)
        torch.distributed.all_reduce(count)
        return values.sum() * self.world / count.clamp(min=1)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replaces gradients by their mean over all processes; no gradient counts as zero where others have one."""
        if self.world == 1:
            return
        learned = list(parameters)
        has = torch.tensor([float(p.grad is not None) for p in learned], device=learned[0].device)
        # Once for all: who has a gradient may differ, and every process must wait for as many.
        torch.distributed.all_reduce(has)
        for p, somewhere in zip(learned, has.tolist(), strict=True):
            if somewhere:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)
                p.grad /= self.world

    def over_all(self, value: Tensor) -> float:
        """The mean of a number over all processes, for the log."""
        value = value.detach().clone()
        if self.world > 1:
            torch.distributed.all_reduce(value)
        return value.item() / self.world

    def told(self, found: Callable[[], _T]) -> _T:
        """What the first process finds, on every process: nobody goes another way by a rounding."""
        if self.world == 1:
            return found()
        box = [found() if self.writes else None]
        torch.distributed.broadcast_object_list(box)
        return box[0]  # type: ignore[return-value]  # the first one's, which is no None
