"""The items of a phase's steps: what a step draws depends on the seed and the step alone, so any process can draw it.

On a GPU drawing takes a third of a step; worker processes then draw ahead (`torch.utils.data.DataLoader`).
"""

from collections.abc import Iterator, Mapping

import numpy as np
from torch.utils.data import DataLoader, Dataset

from mmroute.tasks.base import Generated
from mmroute.train.examples import Batch, collate, item, on_canvas
from mmroute.train.recipe import Phase, at

__all__ = ["Stream"]

_NEWEST = 0.4
"""Share of the items that have the largest board of the moment, and of the batches that have the largest picture."""


class Stream(Dataset[Batch]):
    """Batches of one phase by the number of the step in it."""

    def __init__(
        self, phase: Phase, tasks: Mapping[str, Generated], index: Mapping[str, int], seed: int, before: int
    ) -> None:
        """
        Args:
            phase: whose items.
            tasks: all tasks of the recipe.
            index: word to token id.
            seed: of the run.
            before: steps of the run that lie before this phase.
        """
        self.phase, self.tasks, self.index, self.seed, self.before = phase, tasks, index, seed, before
        self.side = next(iter(tasks.values())).preset.canvas

    def __getitem__(self, step: int) -> Batch:
        phase, done = self.phase, step / self.phase.steps
        rng = np.random.default_rng([self.seed, self.before + step])
        side = min(self.side, int(at(phase.canvas, done)))
        if phase.smaller is not None and rng.random() >= _NEWEST:  # one side a batch: its pictures are one tensor
            side = int(rng.integers(min(phase.smaller, side), side + 1))
        names = list(self.tasks)
        weights = np.array([phase.tasks.get(name, 1.0) for name in names])
        items = []
        for _ in range(phase.batch):
            task = self.tasks[names[int(rng.choice(len(weights), p=weights / weights.sum()))]]
            sizes = [n for n in task.sizes if n <= min(side, int(at(phase.size, done)))] or [task.sizes[0]]
            size = sizes[-1] if rng.random() < _NEWEST else sizes[int(rng.integers(len(sizes)))]
            spec = task.stream(rng, size, int(rng.integers(1, task.max_length(size) + 1)))
            if side != self.side:
                spec = on_canvas(spec, side, rng)
            items.append(item(task, spec, "probe" if rng.random() < at(phase.probe, done) else "cot"))
        return collate(items, self.index)

    def since(self, step: int, workers: int) -> Iterator[Batch]:
        """The batches from a step of the phase to its end, drawn ahead by this many processes; 0 draws in this one."""
        steps = range(step, self.phase.steps)
        return iter(
            DataLoader(
                self, batch_size=None, sampler=steps, num_workers=workers, prefetch_factor=4 if workers else None
            )
        )
