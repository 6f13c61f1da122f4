"""How strongly the loss pulls at each kind of position: norms of the gradient on the residual stream, by stage.

A stage replaces the first s groups of a rationale by latents. What is written then has a loss; its gradient with
respect to what each layer leaves at each position is taken, and positions are told apart by what they hold.

Legend: B batch, N positions of one call, D hidden.

Source: Vedas (arXiv 2604.10500), figure 1a.
Deviates: positions are sorted by modality masks, never by index (an earlier version of the paper read its own curve
    with the wrong spans); a row's loss is the mean over its written words and rows do not share it, so a norm does not
    depend on the batch.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from mmroute.bench.items import Plan
from mmroute.bench.lessons import Study, opened
from mmroute.bench.svg import Chart, sheet
from mmroute.recipe import Recipe
from mmroute.rollout import Rollout
from mmroute.tokens import Modality
from mmroute.train.examples import IGNORED
from mmroute.train.lessons import Lesson

__all__ = ["KINDS", "Gradients", "Norms", "kinds_of", "lines", "measure_gradients", "picture"]

Kind = Literal["system", "visual", "question", "replay", "latent", "step", "answer"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Text in front of the first image, image tokens, text behind it, copies of image tokens, latents, written steps, and
the answer."""
_PAD = -1


@dataclass(frozen=True)
class Norms:
    """Positions of one kind at one layer, in one stage."""

    count: int
    mean: float
    median: float
    share: float
    """Of the sum of all norms at this layer and stage."""


@dataclass(frozen=True)
class Gradients:
    """All of it, of one recipe on one task."""

    task: str
    recipe: str
    n: int
    seed: int
    layers: int
    stages: dict[str, dict[str, list[Norms]]]
    """[stage][kind][layer]: stage s replaces s groups by latents, `all` every one; kinds that do not occur are left
    out."""
    sample: dict[str, Any] = field(default_factory=dict)
    """One item at the last stage: `kinds` of its positions, and by layer their `norms`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def kinds_of(
    lesson: Lesson, rollout: Rollout, replaced: Sequence[int], labels: Int[Tensor, "B M"]
) -> Int[Tensor, "B S"]:
    """(B, S): number in `KINDS` of every position that entered, call after call; -1 at padding.

    Args:
        lesson: the prompts.
        rollout: the latent steps behind them.
        replaced: [row]: groups that latents stand for.
        labels: what is written behind those, `IGNORED` behind a row's end.
    """
    prompt, valid = lesson.modality, lesson.mask.bool()
    visual = (prompt == Modality.VISION) & valid
    behind = visual.cumsum(1) > 0
    out = torch.where(
        visual, KINDS.index("visual"), torch.where(behind, KINDS.index("question"), KINDS.index("system"))
    )
    parts = [out.masked_fill(~valid, _PAD)]
    for thought in rollout.thoughts:
        kind = torch.where(thought.modality == Modality.LATENT, KINDS.index("latent"), KINDS.index("replay"))
        parts.append(kind.masked_fill(~thought.valid, _PAD))
    steps = [sum(map(len, groups[n:])) for groups, n in zip(lesson.groups, replaced, strict=True)]
    at = torch.arange(labels.shape[1], device=labels.device)
    written = torch.where(
        at < torch.tensor(steps, device=labels.device)[:, None], KINDS.index("step"), KINDS.index("answer")
    )
    parts.append(written.masked_fill(labels == IGNORED, _PAD))
    return torch.cat(parts, 1)


@contextmanager
def _streams(study: Study) -> Any:
    """By layer, what it leaves at every call while the block runs, as part of the graph."""
    text = study.routed.family.text_model(study.routed.model)
    found: list[list[Tensor]] = [[] for _ in text.layers]

    def entering(module: Any, args: Any, kwargs: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if not x.requires_grad:  # with frozen weights nothing below has a gradient
            x.requires_grad_(True)

    def keep(i: int) -> Callable[..., None]:
        return lambda module, args, out: found[i].append(out[0] if isinstance(out, tuple) else out)

    with ExitStack() as stack:
        handle = text.layers[0].register_forward_pre_hook(entering, with_kwargs=True)
        stack.callback(handle.remove)
        for i, layer in enumerate(text.layers):
            stack.callback(layer.register_forward_hook(keep(i)).remove)
        yield found


def norms_of(study: Study, lesson: Lesson, stage: int) -> tuple[Int[Tensor, "B S"], Tensor]:
    """What every position of a lesson holds, and (layers, B, S) norms of the gradient there.

    Args:
        study: the attached model.
        lesson: its items.
        stage: groups that latents replace, at most all of a row.
    """
    passes = study.passes
    replaced = [min(stage, len(groups)) for groups in lesson.groups]
    with torch.enable_grad(), _streams(study) as streams:
        rollout, H, labels = passes.chunks(lesson, passes.counts(replaced, stage), replaced, training=True)
        loss = _loss(passes.head(H[labels != IGNORED]), labels)
    flat = [x for layer in streams for x in layer]
    grads = torch.autograd.grad(loss, flat, allow_unused=True)
    sizes = [(torch.zeros_like(x) if g is None else g).float().norm(dim=-1) for x, g in zip(flat, grads, strict=True)]
    calls = len(streams[0])
    norms = torch.stack([torch.cat(sizes[i * calls : (i + 1) * calls], 1) for i in range(len(streams))])
    return kinds_of(lesson, rollout, replaced, labels), norms.detach()


def _loss(logits: Tensor, labels: Int[Tensor, "B M"]) -> Tensor:
    """Sum over rows of the mean over each one's written words."""
    learned = labels != IGNORED
    each = F.cross_entropy(logits, labels[learned], reduction="none")
    share = (1 / learned.sum(1, keepdim=True)).expand_as(labels)[learned]
    return (each * share).sum()


def measure_gradients(
    model: Any,
    recipe: Recipe,
    plan: Plan,
    progress: Callable[[str, int, int], None] | None = None,
) -> Gradients:
    """Norms of the gradient by kind of position, layer and stage.

    Args:
        model: a loaded stock model with its processor, or a name.
        recipe: thinks in latents; its `train.latent_grad` says how far gradients run.
        plan: a generated world, items, seed and batch.
        progress: told the stage, items done and items in all.

    Raises:
        ConfigError: the recipe takes no latent steps or too few, or the task is no generated world.
    """
    stages: dict[str, dict[str, list[Norms]]] = {}
    sample: dict[str, Any] = {}
    with opened(model, recipe, plan) as study:
        lessons = [lesson for _, lesson in study.lessons()]
        most = max(len(groups) for lesson in lessons for groups in lesson.groups)
        layers = study.routed.controller.shape.layers
        was = study.routed.model.training
        study.routed.model.train()
        try:
            for stage in range(most + 1):
                name, done = str(stage) if stage < most else "all", 0
                values: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in range(layers)])
                for lesson in lessons:
                    kinds, norms = norms_of(study, lesson, stage)
                    for i, kind in enumerate(KINDS):
                        for layer, own in enumerate(norms[:, kinds == i].tolist()):
                            if own:
                                values[kind][layer] += own
                    if stage == most and not sample:
                        real = kinds[0] != _PAD
                        named = [KINDS[k] for k in kinds[0][real].tolist()]
                        sample = {"kinds": named, "norms": norms[:, 0, real].tolist()}
                    done += len(kinds)
                    if progress is not None:
                        progress(f"stage {name}", done, plan.n)
                stages[name] = _summed(values, layers)
        finally:
            study.routed.model.train(was)
    return Gradients(plan.task, recipe.name, plan.n, plan.seed, layers, stages, sample)


def _summed(values: dict[str, list[list[float]]], layers: int) -> dict[str, list[Norms]]:
    whole = [sum(sum(rows[layer]) for rows in values.values()) or 1.0 for layer in range(layers)]
    return {
        kind: [
            Norms(len(own), fmean(own), median(own), sum(own) / whole[layer]) for layer, own in enumerate(values[kind])
        ]
        for kind in KINDS
        if kind in values
    }


def lines(found: Gradients) -> list[str]:
    """What a person wants to know of it."""
    out = [
        f"{found.task}, seed {found.seed}, {found.n} items, recipe {found.recipe}: norm of the gradient on the "
        "residual stream, mean over layers",
        f"{'stage':6}" + "".join(f"{kind:>10}" for kind in KINDS) + "   visual/question",
    ]
    for stage, kinds in found.stages.items():
        mean = {kind: fmean(layer.mean for layer in rows) for kind, rows in kinds.items()}
        told = "".join(f"{mean[kind]:10.2e}" if kind in mean else f"{'-':>10}" for kind in KINDS)
        known = "visual" in mean and mean.get("question")
        out.append(f"{stage:6}{told}   {mean['visual'] / mean['question']:.2f}" if known else f"{stage:6}{told}")
    return out


def picture(found: Gradients) -> str:
    """Mean norm by layer for each stage, and one item's positions with their kinds as background; SVG."""
    panels = [
        Chart(
            f"stage {stage}",
            {kind: [(i, layer.mean) for i, layer in enumerate(rows)] for kind, rows in kinds.items()},
            "layer",
            "mean norm",
        )
        for stage, kinds in found.stages.items()
    ]
    kinds, norms = found.sample["kinds"], found.sample["norms"]
    edges = [0, *(i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]), len(kinds)]
    spans = [(a, b, kinds[a]) for a, b in pairwise(edges)]
    panels += [
        Chart(f"one item, layer {layer}", {"norm": list(enumerate(norms[layer]))}, "position", "norm", spans)
        for layer in sorted({0, len(norms) // 2, len(norms) - 1})
    ]
    return sheet(f"{found.task}, {found.recipe}: gradient by kind of position", panels)
