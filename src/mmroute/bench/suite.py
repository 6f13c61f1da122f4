"""Runs a bench: every case on every task and seed, one result file each, in several processes if asked.

A run whose file is there is not run again, so a bench that was killed goes on where it was: each process loses at most
the run it was in.
"""

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mmroute import backbones
from mmroute.bench import schema
from mmroute.bench.answers import answer_prompts
from mmroute.bench.grid import Case, Grid, cases, key_of
from mmroute.bench.items import Plan, Prompts, draw, load_task
from mmroute.bench.measure import WALL
from mmroute.bench.record import hash_weights, result_of
from mmroute.processes import device_named
from mmroute.recipe import equip

__all__ = ["Job", "Suite", "run"]

log = logging.getLogger(__name__)

_KEEP_BYTES = 512 * 2**20
"""Prepared prompts that a process keeps for the next method."""


@dataclass(frozen=True)
class Job:
    """One run: a case on one task with the items of one seed."""

    case: Case
    plan: Plan
    file: str
    control: str
    """File of the control; empty where there is none."""


@dataclass(frozen=True)
class Suite:
    """A bench against one model: its jobs in order, and where their files go."""

    grid: Grid
    folder: Path
    jobs: list[Job]
    infeasible: list[Case]
    layers: int
    weights: str

    @classmethod
    def plan(cls, grid: Grid, model: Any, folder: Path) -> "Suite":
        """All jobs of a bench, before any runs.

        Raises:
            ConfigError: a recipe, a task or a folder of trained routers that is not there.
            InputError: a split with fewer items.
        """
        shape = backbones.of(model).shape(model)
        weights = hash_weights(model)
        found = cases(grid, shape)
        jobs: dict[str, Job] = {}
        for task in grid.tasks:
            for seed in grid.seeds:
                plan = Plan(
                    task=task,
                    n=grid.n,
                    seed=seed,
                    split=grid.split,
                    settings=grid.task,
                    min_hops=grid.min_hops,
                    context=grid.context,
                    batch=grid.batch,
                )
                named = load_task(task, grid.task)
                draw(named, replace(plan, n=1))  # what is wrong with a task is reported before the first run
                about = {
                    "model": grid.model,
                    "weights": weights,
                    "task": f"{task} v{named.version}",
                    "settings": grid.task,
                    "context": grid.context,
                    "split": grid.split,
                    "n": grid.n,
                    "seed": seed,
                    "forced": grid.forced,
                    **_unusual(grid),
                }

                def file_of(case: Case, about: dict[str, Any] = about, task: str = task, seed: int = seed) -> str:
                    key = key_of(case.recipe, about)
                    return f"{case.label}--{task.replace(':', '-')}--s{seed}--{key}.json"

                for case in (c for c in found if not c.infeasible):
                    control = "" if case.control is None else file_of(case.control)
                    if case.control is not None and control not in jobs:
                        jobs[control] = Job(case.control, plan, control, "")
                    jobs[file_of(case)] = Job(case, plan, file_of(case), control)
        return cls(grid, folder, list(jobs.values()), [c for c in found if c.infeasible], shape.layers, weights)

    def left(self) -> list[Job]:
        """Jobs whose result is not there yet."""
        return [job for job in self.jobs if not (self.folder / job.file).is_file()]

    def files(self) -> list[Path]:
        """Result files of this plan that are there."""
        return [self.folder / job.file for job in self.jobs if (self.folder / job.file).is_file()]


def run(
    suite: Suite, model: Any, command: str, jobs: int = 1, told: Callable[[str, int, int], None] | None = None
) -> int:
    """Runs what is left of a bench.

    Args:
        suite: the plan.
        model: loaded; other processes load their own.
        command: what the user typed, for the result files.
        jobs: processes. Each computes in one thread.
        told: hears a line per finished run, how many are done and how many there are.

    Returns:
        How many runs were made.
    """
    origin = schema.commit_of_source()
    for case in suite.infeasible:
        row = schema.Infeasible(
            row=case.row, recipe=case.recipe.name, budget=case.budget, layers=suite.layers, reason=case.infeasible
        )
        schema.write_result(suite.folder / f"{case.label}--infeasible.json", row)
    left, total = suite.left(), len(suite.jobs)
    for done, line in enumerate(_results(suite, left, model, command, origin, jobs), start=total - len(left) + 1):
        if told is not None:
            told(line, done, total)
    return len(left)


def _results(
    suite: Suite, left: Sequence[Job], model: Any, command: str, origin: tuple[str, bool], jobs: int
) -> Iterator[str]:
    given: tuple[Any, ...] = (suite.grid, suite.folder, suite.weights, command, origin)
    if jobs == 1 or len(left) < 2:
        runner = _Runner(model, *given)
        for job in left:
            yield runner.run(job)
        return
    context = multiprocessing.get_context("spawn")  # a forked torch may hang in its own threads
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(numbers, *given)) as pool:
        waiting = [pool.submit(_work, job) for job in left]
        try:
            for future in as_completed(waiting):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Runner:
    """What one process holds: the model, and the prompts of the task it was at last."""

    def __init__(
        self, model: Any, grid: Grid, folder: Path, weights: str, command: str, origin: tuple[str, bool]
    ) -> None:
        torch.set_num_threads(1)  # also in one process: results do not depend on how many there are
        self.model, self.grid, self.folder, self.weights = model, grid, folder, weights
        self.command, self.origin = command, origin
        self._at: tuple[Plan, Any, Prompts] | None = None

    def run(self, job: Job) -> str:
        """One result file, and a line about it."""
        began, start = datetime.now(UTC).isoformat(timespec="seconds"), WALL.read()
        plan = job.plan
        if self._at is None or self._at[0] != plan:
            task = load_task(plan.task, plan.settings)
            self._at = plan, task, Prompts(draw(task, plan), plan.batch, _KEEP_BYTES)
        _, task, prompts = self._at
        recipe = job.case.recipe
        with equip(self.model, recipe) as (routed, think):
            outcome = answer_prompts(routed, think, recipe, task, prompts, force=self.grid.forced)
        wall = WALL.read() - start
        source = schema.run_here(self.command, *self.origin, began, wall)
        found = result_of(self.model, self.grid.model, self.weights, task, plan, outcome, source)
        found = replace(
            found,
            method=replace(found.method, row=job.case.row, budget=job.case.budget, control=job.control),
        )
        schema.write_result(self.folder / job.file, found)
        return f"{plan.task} s{plan.seed} {job.case.label}: {found.quality.accuracy:.3f}, {wall:.1f} s"


_RUNNER: _Runner | None = None


def _start(numbers: Any, grid: Grid, *given: Any) -> None:
    """Begins a worker process: its own model, one thread, and its number's turn at the cards."""
    from mmroute.backbones.load import load

    global _RUNNER
    number = numbers.get() % max(torch.cuda.device_count(), 1)
    model = load(grid.model, device=device_named(grid.device, number), dtype=grid.dtype or None)
    _RUNNER = _Runner(model, grid, *given)


def _unusual(grid: Grid) -> dict[str, Any]:
    """Settings that name a run only where they are not the usual ones: files of older benches keep their names."""
    usual = {"min_hops": 0, "device": "cpu", "dtype": ""}
    return {name: getattr(grid, name) for name, value in usual.items() if getattr(grid, name) != value}


def _work(job: Job) -> str:
    assert _RUNNER is not None
    return _RUNNER.run(job)
