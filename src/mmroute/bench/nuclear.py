"""How updates of q, k, v and o behave while latents are learned: nuclear norms, of easy and of hard items.

The stages of a training recipe are run with a few steps each. A first run finds out what is easy: how often each item
is right at checkpoints on the way. A second one, from the same weights, takes half of every batch from the easy third
and half from the hard third and measures the gradient of each half, and the update that both lead to.

Source: Vedas (arXiv 2604.10500), figures 1b, 1c and 7.
Deviates: the paper defines the norm on weights and shows gradients: both are measured; both halves pull at the same
    weights in the same step, so what differs is the items alone; ties in the share of right answers go by the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, pstdev
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmroute.backbones.base import Family
from mmroute.bench.items import Plan
from mmroute.bench.lessons import specs_of
from mmroute.bench.svg import Chart, sheet
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe
from mmroute.tasks.base import Generated, Spec
from mmroute.train.curriculum import Stage
from mmroute.train.examples import IGNORED
from mmroute.train.loop import rate_at
from mmroute.train.recipe import at
from mmroute.train.vedas import VedasRun

__all__ = ["Nuclear", "NuclearTracker", "Spectrum", "Track", "lines", "measure_nuclear", "picture", "spectrum"]

PROJECTIONS = "qkvo"


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix, summed up."""

    nuclear: float
    """Their sum."""
    spectral: float
    """The largest."""
    effective_rank: float
    """(sum)^2 over the sum of squares; 0 of a matrix of zeros."""


@dataclass(frozen=True)
class Track:
    """One projection of one layer, step by step."""

    mean: float
    std: float
    volatility: float
    """`std` over `mean` of the nuclear norm; 0 where it is 0 throughout."""
    nuclear: list[float]
    spectral: list[float]
    effective_rank: list[float]


@dataclass(frozen=True)
class Nuclear:
    """All of it, of one training recipe on one task."""

    task: str
    recipe: str
    n: int
    seed: int
    stages: list[str]
    """[step]: the stage it belongs to."""
    right: dict[str, float]
    """By item: share of the checkpoints at which it was right."""
    easy: list[str]
    hard: list[str]
    tracks: dict[str, dict[str, list[Track]]]
    """[what][projection][layer]: gradients of the `easy` and of the `hard` half, and the `update`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spectrum(left: Float[Tensor, "a r"], right: Float[Tensor, "r b"] | None = None) -> Spectrum:
    """Of a matrix, or of a product of two thin ones without making it.

    Example:
        >>> spectrum(torch.diag(torch.tensor([3.0, 1.0])))
        Spectrum(nuclear=4.0, spectral=3.0, effective_rank=1.6)
    """
    left = left.detach().float()
    if right is not None:  # Q factors turn nothing into singular values
        left = torch.linalg.qr(left).R @ torch.linalg.qr(right.detach().float().T).R.T
    values = torch.linalg.svdvals(left).double()
    total, square = float(values.sum()), float(values.square().sum())
    return Spectrum(total, float(values.max()), total**2 / square if square else 0.0)


class NuclearTracker:
    """Reads gradients and updates of q, k, v and o off a model that is being trained, with adapters or without."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        """
        Args:
            model: its attention weights, or their adapters, are trained.
            family: of the model.

        Raises:
            ConfigError: nothing of the attention is trained.
        """
        layers = family.text_model(model).layers
        self.modules: dict[tuple[str, int], Any] = {
            (p, i): getattr(layer.self_attn, f"{p}_proj") for p in PROJECTIONS for i, layer in enumerate(layers)
        }
        if not any(w.requires_grad for key in self.modules for w in self._learned(key)):
            raise ConfigError("no weight of the attention is trained; use train.backbone full or lora, with q, k, v, o")
        self._before = self._factors()
        self._seen: dict[tuple[str, int], list[Tensor]] = {}

    def _learned(self, key: tuple[str, int]) -> list[Tensor]:
        module = self.modules[key]
        if not hasattr(module, "lora_A"):
            return [module.weight]
        return [module.lora_A["default"].weight, module.lora_B["default"].weight]

    def _factors(self) -> dict[tuple[str, int], tuple[Tensor, Tensor | None]]:
        """The weight; with an adapter what it adds, as its two factors."""
        out: dict[tuple[str, int], tuple[Tensor, Tensor | None]] = {}
        for key, module in self.modules.items():
            weights = [w.detach().clone() for w in self._learned(key)]
            if len(weights) == 1:
                out[key] = weights[0], None
            else:
                out[key] = weights[1] * module.scaling["default"], weights[0]
        return out

    def gradients(self) -> dict[tuple[str, int], Spectrum]:
        """Of what was added to the gradients since the last call; an adapter's two matrices are summed up."""
        out = {}
        for key in self.modules:
            now = [torch.zeros_like(w) if w.grad is None else w.grad.detach().clone() for w in self._learned(key)]
            fresh = [a - b for a, b in zip(now, self._seen.get(key, []), strict=True)] if key in self._seen else now
            self._seen[key] = now
            parts = [spectrum(each) for each in fresh]
            out[key] = Spectrum(
                sum(p.nuclear for p in parts), max(p.spectral for p in parts), fmean(p.effective_rank for p in parts)
            )
        return out

    def updates(self) -> dict[tuple[str, int], Spectrum]:
        """Of what the weights moved since the last call; call it behind the optimiser's step."""
        now, out = self._factors(), {}
        for key, (left, right) in now.items():
            was, was_right = self._before[key]
            if right is None or was_right is None:
                out[key] = spectrum(left - was)
            else:
                out[key] = spectrum(torch.cat([left, -was], 1), torch.cat([right, was_right], 0))
        self._before, self._seen = now, {}
        return out


def measure_nuclear(
    model: Any,
    recipe: Recipe,
    plan: Plan,
    steps: int = 30,
    checks: int = 4,
    right: Mapping[str, tuple[float, float]] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Nuclear, dict[str, tuple[float, float]]]:
    """Nuclear norms over the stages of a training recipe; the model is put back at the end.

    Args:
        model: a loaded stock model with its processor; where the training starts.
        recipe: of training (`read_recipe`).
        plan: a generated world, items, seed and batch; half of a batch is easy, half is hard.
        steps: of each stage.
        checks: looks at all items in the first run.
        right: by item, what such a first run found, in place of running it.
        progress: told what runs, steps done and steps in all.

    Returns:
        What was measured, and by item how often it was right with its mean loss.

    Raises:
        ConfigError: fewer than 6 items, a batch of less than 2, no steps or looks, or a recipe that cannot be trained.
    """
    if plan.n < 6 or plan.batch < 2 or steps < 1 or checks < 1:
        raise ConfigError(
            f"n >= 6, batch >= 2, steps >= 1 and checks >= 1 are needed, "
            f"given {plan.n}, {plan.batch}, {steps}, {checks}"
        )
    task, samples, specs = specs_of(plan)
    ids = [sample.id for sample in samples]
    train = {**(recipe.train or {}), "tasks": {plan.task: 1.0}}
    if "stages" in train:
        train["stages"] = [{**stage, "steps": steps, "epochs": None} for stage in train["stages"]]
    short = replace(recipe, train=train)
    with TemporaryDirectory() as folder:
        if right is None:
            with VedasRun(short, model, Path(folder) / "first") as run:
                right = _first(run, task, specs, ids, plan, checks, progress)
        order = sorted(ids, key=lambda i: (-right[i][0], right[i][1], i))  # type: ignore[index]
        easy, hard = order[: plan.n // 3], order[-(plan.n // 3) :]
        of = dict(zip(ids, specs, strict=True))
        halves = {"easy": [of[i] for i in easy], "hard": [of[i] for i in hard]}
        with VedasRun(short, model, Path(folder) / "second") as run:
            stages, series = _second(run, task, halves, plan, progress)
    tracks = {
        what: {p: [_track(rows[p, i]) for i in range(len(rows) // len(PROJECTIONS))] for p in PROJECTIONS}
        for what, rows in series.items()
    }
    shares = {i: right[i][0] for i in ids}
    return Nuclear(plan.task, recipe.name, plan.n, plan.seed, stages, shares, easy, hard, tracks), dict(right)


def _track(seen: Sequence[Spectrum]) -> Track:
    nuclear = [s.nuclear for s in seen]
    mean, std = fmean(nuclear), pstdev(nuclear)
    return Track(mean, std, std / mean if mean else 0.0, nuclear, [s.spectral for s in seen],
                 [s.effective_rank for s in seen])  # fmt: skip


def _steps(run: VedasRun, progress: Callable[[str, int, int], None] | None, name: str) -> Any:
    """(stage, step of it, its length), one after the other; an update belongs behind each."""
    total, done = sum(run.lengths), 0
    for number, (stage, length) in enumerate(zip(run.config.stages, run.lengths, strict=True)):
        run.progress.phase = number
        if stage.reset_optimizer:
            run.learners.reset()
        for step in range(length):
            yield stage, step, length
            done += 1
            if progress is not None:
                progress(name, done, total)


def _backward(run: VedasRun, task: Generated, specs: Sequence[Spec], stage: Stage, done: float, share: float) -> None:
    worked = run.passes.work(
        run.teacher.lesson([(task, spec) for spec in specs], "latent"), stage.latents, stage.keep_last
    )
    (share * run.loss(worked, at(stage.supervise, done))).backward()


def _first(
    run: VedasRun,
    task: Generated,
    specs: Sequence[Spec],
    ids: Sequence[str],
    plan: Plan,
    checks: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, tuple[float, float]]:
    """By item: share of the looks at which all it writes is right, and its mean loss over them."""
    total = sum(run.lengths)
    looks = {max(1, round(total * (i + 1) / checks)) for i in range(checks)}
    good: list[list[bool]] = [[] for _ in specs]
    cost: list[list[float]] = [[] for _ in specs]
    for done, (stage, step, length) in enumerate(_steps(run, progress, "what is easy"), start=1):
        run.model.train()
        rng = np.random.default_rng([plan.seed, done])
        rows = rng.choice(len(specs), min(plan.batch, len(specs)), replace=False)
        _backward(run, task, [specs[i] for i in rows], stage, step / length, 1.0)
        run.learners.step(rate_at(step, length, stage.warmup, stage.floor), stage)
        if done not in looks:
            continue
        run.model.eval()
        for start in range(0, len(specs), plan.batch):
            part = specs[start : start + plan.batch]
            for b, (fine, loss) in enumerate(_judged(run, task, part, stage)):
                good[start + b].append(fine)
                cost[start + b].append(loss)
    return {i: (fmean(a), fmean(b)) for i, a, b in zip(ids, good, cost, strict=True)}


@torch.no_grad()
def _judged(run: VedasRun, task: Generated, specs: Sequence[Spec], stage: Stage) -> list[tuple[bool, float]]:
    """[item]: whether every word it has to write is the likeliest, and its mean loss."""
    lesson = run.teacher.lesson([(task, spec) for spec in specs], "latent")
    most = max(map(len, lesson.groups)) if stage.latents == "all" else stage.latents
    replaced = [min(most, len(groups) - stage.keep_last) for groups in lesson.groups]
    _, H, labels = run.passes.chunks(lesson, run.passes.counts(replaced, stage.latents), replaced, training=False)
    logits = run.passes.head(H)
    loss = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    learned = labels != IGNORED
    right = ((logits.argmax(-1) == labels) | ~learned).all(1)
    return list(zip(right.tolist(), (loss.sum(1) / learned.sum(1)).tolist(), strict=True))


def _second(
    run: VedasRun,
    task: Generated,
    halves: Mapping[str, Sequence[Spec]],
    plan: Plan,
    progress: Callable[[str, int, int], None] | None,
) -> tuple[list[str], dict[str, dict[tuple[str, int], list[Spectrum]]]]:
    tracker = NuclearTracker(run.model, run.routed.family)
    series: dict[str, dict[tuple[str, int], list[Spectrum]]] = {
        what: {key: [] for key in tracker.modules} for what in (*halves, "update")
    }

    def note(what: str, seen: Mapping[tuple[str, int], Spectrum]) -> None:
        for key, value in seen.items():
            series[what][key].append(value)

    stages = []
    run.model.train()
    for done, (stage, step, length) in enumerate(_steps(run, progress, "easy and hard")):
        rng = np.random.default_rng([plan.seed, done])
        for what, specs in halves.items():
            rows = rng.choice(len(specs), min(plan.batch // 2, len(specs)), replace=False)
            _backward(run, task, [specs[i] for i in rows], stage, step / length, 0.5)
            note(what, tracker.gradients())
        run.learners.step(rate_at(step, length, stage.warmup, stage.floor), stage)
        note("update", tracker.updates())
        stages.append(stage.name)
    return stages, series


def lines(found: Sequence[Nuclear]) -> list[str]:
    """What a person wants to know of one or more recipes."""
    out = []
    for each in found:
        shares = [fmean(each.right[i] for i in ids) for ids in (each.easy, each.hard)]
        out.append(
            f"{each.task}, seed {each.seed}, recipe {each.recipe}, {len(each.stages)} steps: {len(each.easy)} "
            f"easy items (right at {shares[0]:.0%} of the looks), {len(each.hard)} hard ones ({shares[1]:.0%})"
        )
        out.append(f"{'nuclear norm':14}" + "".join(f"{f'{p}: mean':>12}{'volatility':>12}" for p in PROJECTIONS))
        for what, rows in each.tracks.items():
            told = [(fmean(t.mean for t in rows[p]), fmean(t.volatility for t in rows[p])) for p in PROJECTIONS]
            out.append(f"{what:14}" + "".join(f"{mean:12.3g}{wild:12.2f}" for mean, wild in told))
    return out


def picture(found: Sequence[Nuclear]) -> str:
    """Nuclear norm over steps, mean over layers; a row of panels per recipe, a panel per projection; SVG."""
    panels = [
        Chart(
            f"{each.recipe}: {p}",
            {
                what: [(i, fmean(t.nuclear[i] for t in each.tracks[what][p])) for i in range(len(each.stages))]
                for what in ("easy", "hard")
            },
            "step",
            "nuclear norm of the gradient",
        )
        for each in found
        for p in PROJECTIONS
    ]
    return sheet(f"{found[0].task}: gradients of easy and hard items", panels, columns=4)
