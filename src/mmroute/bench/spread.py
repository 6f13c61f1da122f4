"""One evaluation on many processes: the ranks of `torchrun`, or actors on a Ray cluster. Each item is answered once.

A batch changes no answer, so neither does a share: what comes back is what one process would have found. Items that
are answered are written down one line each, and a run that is started again asks only for the rest.

Deviates: times are still taken by one process alone; only answers are spread.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmroute.bench.answers import Outcome, Progress, answer_items, answer_prompts
from mmroute.bench.items import Plan, Prompts, draw, load_task
from mmroute.errors import InputError, MissingExtra
from mmroute.processes import device_named
from mmroute.reason import Answer
from mmroute.recipe import Recipe, equip
from mmroute.tasks.base import Sample, Score
from mmroute.trace import Trace

__all__ = ["Parts", "actor_needs", "on_ray", "over_ranks"]


# ---------------------------------------------------------------------- what came of items, as lines


def _lines(indices: Sequence[int], outcome: Outcome) -> list[str]:
    """One JSON object per item."""
    out = []
    for at, index in enumerate(indices):
        answer = outcome.answers[at]
        plain = {key: getattr(answer, key) for key in Answer.__dataclass_fields__ if key != "trace"}
        found = {"answer": plain | {"trace": answer.trace.to_dict()}, "score": asdict(outcome.scores[at])}
        exact = None if outcome.exact is None else outcome.exact[at]
        out.append(json.dumps({"index": index, **found, "exact": exact, "tower": outcome.flops_tower}))
    return out


def _joined(recipe: Recipe, samples: Sequence[Sample], found: dict[int, dict[str, Any]]) -> Outcome:
    """One outcome in the items' order.

    Raises:
        InputError: an item has none.
    """
    missing = [i for i in range(len(samples)) if i not in found]
    if missing:
        raise InputError(f"{len(missing)} of {len(samples)} items have no answer, first {missing[0]}; run it again")
    rows = [found[i] for i in range(len(samples))]
    towers, exact = [row["tower"] for row in rows], [row["exact"] for row in rows]
    return Outcome(
        recipe,
        list(samples),
        [Answer(**{**row["answer"], "trace": Trace.from_dict(row["answer"]["trace"])}) for row in rows],
        [Score(**row["score"]) for row in rows],
        flops_tower=None if None in towers else float(np.mean(towers)),
        exact=None if None in exact else exact,
    )


class Parts:
    """A file of answered items that outlives its process; its first line says what was asked of whom.

    A line that a kill cut short is left out, and its item is asked again.
    """

    def __init__(
        self, path: Path, recipe: Recipe, plan: Plan, model: str, device: str = "cpu", dtype: str = ""
    ) -> None:
        """Opens or begins the file.

        Args:
            path: the file.
            recipe: what is asked.
            plan: on what.
            model: of whom.
            device: `cpu` or `cuda`; they round differently, so one file holds answers of one.
            dtype: as `--dtype`.

        Raises:
            InputError: it belongs to another question.
        """
        self.path, self.found = path, dict[int, dict[str, Any]]()
        asked = {key: value for key, value in asdict(plan).items() if key in _DECIDES}
        where = {key: value for key, value in (("device", device), ("dtype", dtype)) if value not in ("cpu", "")}
        head = json.dumps({"model": model, "recipe": asdict(recipe), **asked, **where}, sort_keys=True, default=str)
        whole = path.read_bytes().rpartition(b"\n")[0].decode().splitlines() if path.exists() else []
        if whole and whole[0] != head:
            raise InputError(f"{path} holds answers to another run; give another file, or remove it")
        for line in whole[1:]:
            row = json.loads(line)
            self.found[row["index"]] = row
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = "".join(f"{line}\n" for line in whole or [head])
        self._file = path.open("r+" if path.exists() else "w")
        self._file.truncate(len(kept.encode()))
        self._file.seek(0)
        self._file.write(kept)
        self._file.flush()

    def add(self, line: str) -> None:
        """Writes an item down; one that is there already stays as it was."""
        row = json.loads(line)
        if row["index"] in self.found:
            return
        self._file.write(line + "\n")
        self._file.flush()
        self.found[row["index"]] = row

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


_DECIDES = ("task", "n", "seed", "split", "settings", "context")
"""What of a plan decides answers."""


# ---------------------------------------------------------------------- ranks


def over_ranks(
    model: Any, sides: Sequence[Recipe], plan: Plan, progress: Progress | None = None
) -> list[Outcome] | None:
    """Rank r answers items r, r + W, ... of every recipe; rank 0 gets all of them, the others None.

    Args:
        model: a loaded stock model with its processor, the same on every rank; on CUDA each rank has its own card.
        sides: recipes to answer with.
        plan: on what.
        progress: told rank 0's own items.
    """
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        rank, world = dist.get_rank(), dist.get_world_size()
        task = load_task(plan.task, plan.settings)
        samples = draw(task, plan)
        mine = range(rank, len(samples), world)
        told = progress if rank == 0 else None
        out = []
        for side in sides:
            lines: list[str] = []
            if mine:
                lines = _lines(mine, answer_items(model, side, task, [samples[i] for i in mine], plan.batch, told))
            gathered: list[Any] | None = [None] * world if rank == 0 else None
            dist.gather_object(lines, gathered, dst=0)
            if gathered is not None:
                rows = [json.loads(line) for part in gathered for line in part]
                out.append(_joined(side, samples, {row["index"]: row for row in rows}))
        return out if rank == 0 else None
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------- Ray


@dataclass(frozen=True)
class _Job:
    """What an actor needs to answer by itself."""

    model: str
    recipe: Recipe
    plan: Plan
    device: str
    dtype: str


class _Answerer:
    """An actor: loads and attaches once, answers what it is given."""

    def __init__(self, job: _Job) -> None:
        from mmroute.backbones.load import load

        self.job = job
        # Ray shows an actor the one card that it asked for, whatever number it has on the machine.
        loaded = load(job.model, device=device_named(job.device), dtype=job.dtype or None)
        self.task = load_task(job.plan.task, job.plan.settings)
        self.samples = draw(self.task, job.plan)
        self.stack = ExitStack()
        self.routed, self.think = self.stack.enter_context(equip(loaded, job.recipe))

    def __call__(self, asked: dict[str, np.ndarray]) -> dict[str, list[str]]:
        indices = [int(i) for i in asked["index"]]
        prompts = Prompts([self.samples[i] for i in indices], self.job.plan.batch)
        return {"line": _lines(indices, answer_prompts(self.routed, self.think, self.job.recipe, self.task, prompts))}


def actor_needs(actors: int, device: str, resources: Mapping[str, float]) -> dict[str, int]:
    """What each actor asks Ray for.

    Args:
        actors: how many there shall be.
        device: `cpu` or `cuda`.
        resources: what the whole cluster has, as Ray says it.

    Returns:
        Options of `map_batches`: on CUDA a card for each; a CPU each is what Ray gives unasked.

    Raises:
        InputError: the cluster has not enough.
    """
    if device == "cuda":
        cards = int(resources.get("GPU", 0))
        if actors > cards:
            raise InputError(
                f"--ray {actors} --device cuda, but {cards} actors fit: one on each card of the cluster; give fewer, "
                "or --device cpu"
            )
        return {"num_gpus": 1}
    free = int(resources.get("CPU", 0)) - 1
    if actors > free:
        raise InputError(f"--ray {actors}, but {free} actors fit: the cluster's CPUs less one for the reader")
    return {}


def on_ray(
    model: str,
    recipe: Recipe,
    plan: Plan,
    parts: Path,
    actors: int,
    progress: Progress | None = None,
    *,
    device: str = "cpu",
    dtype: str = "",
) -> Outcome:
    """Answers on a Ray cluster: each of some actors holds the model. An actor that dies is replaced, its items are
    asked again, and none counts twice.

    Args:
        model: bundled name, folder that every node sees, or Hub id.
        recipe: what is evaluated.
        plan: on what.
        parts: file that answered items are written to; one that exists is gone on with.
        actors: how many, at least 1; at most the cluster's CPUs less one, or the reader has none to run on, and on
            CUDA at most its cards.
        progress: told recipe name, items done and items in all.
        device: `cpu`, or `cuda`: each actor asks for a card of its own.
        dtype: float32, bfloat16 or float16; the checkpoint's own if empty.

    Raises:
        MissingExtra: Ray is not installed.
        InputError: the file belongs to another run, or more actors than CPUs or cards allow.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("eval --ray", "ray", "ray") from error
    samples = draw(load_task(plan.task, plan.settings), plan)
    with Parts(parts, recipe, plan, model, device, dtype) as known:
        rest = [i for i in range(len(samples)) if i not in known.found]
        if rest:
            if not ray.is_initialized():
                ray.init(log_to_driver=False)
            needs = actor_needs(actors, device, ray.cluster_resources())
            for line in _answered(rest, _Job(model, recipe, plan, device, dtype), actors, needs):
                known.add(line)
                if progress is not None:
                    progress(recipe.name, len(known.found), len(samples))
        return _joined(recipe, samples, known.found)


def _answered(rest: Sequence[int], job: _Job, actors: int, needs: Mapping[str, int]) -> Iterator[str]:
    """Lines in the order in which they are ready."""
    import ray

    blocks = -(-len(rest) // job.plan.batch)
    asked = ray.data.from_items([{"index": i} for i in rest], override_num_blocks=blocks)
    found = asked.map_batches(
        _Answerer,
        fn_constructor_args=(job,),
        batch_size=job.plan.batch,
        compute=ray.data.ActorPoolStrategy(size=actors),
        **needs,
    )
    for row in found.iter_rows():
        yield str(row["line"])
