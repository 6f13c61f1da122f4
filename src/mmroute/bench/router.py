"""What depth routers choose: how often each kind of position runs a layer again, how alike layers choose, and whether
they choose what the question needs.

Legend: B batch, N positions of one call, D hidden.

Source: Vedas (arXiv 2604.10500), figure 5.
Deviates: choices are held against the cells that the simulator says a hop must see; the paper shows one picture.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mmroute.bench.items import Plan, draw, load_task, messages
from mmroute.bench.svg import Chart, Heat, sheet
from mmroute.deepen.base import Again, Deepener
from mmroute.errors import ConfigError, InputError
from mmroute.recipe import Recipe, equip
from mmroute.tasks.base import Sample, relevant_tokens
from mmroute.tokens import Modality, Tokens

__all__ = ["Choice", "Layer", "Router", "lines", "measure_router", "picture", "watching"]

KINDS = ("text", "vision", "copy", "latent")
"""Text and image tokens of the prompt, copies of image tokens beside a latent, and latents."""


@dataclass(frozen=True)
class Choice:
    """One layer in one call: what stood there, what ran again, and how strongly that counts."""

    layer: int
    columns: list[list[int]]
    """[row]: logical columns of the call's valid positions."""
    kinds: list[list[str]]
    """[row][position], of `KINDS`."""
    again: list[list[bool]]
    """[row][position]: whether it ran the layer again at all."""
    gates: list[list[float]]
    """[row][position]: what the router multiplies the step vector by; 1 where there is no router."""


@dataclass(frozen=True)
class Layer:
    """What one layer chose, over all items."""

    layer: int
    share: dict[str, float]
    """By kind: positions that ran again over all of that kind."""
    gate: dict[str, float]
    """By kind: mean gate of those that ran again; kinds that never did are left out."""
    entropy: float
    """Of the image tokens chosen in the prompt, over places: 1 where every place is as likely, 0 where it is always the
    same one."""
    precision: float | None
    """Of the image tokens chosen in the prompt, the share that some hop must see; None without ground truth."""
    recall: float | None
    """Of those that must be seen, the share that is chosen."""
    chance: float | None
    """The precision of choosing blindly: needed over all image tokens."""


@dataclass(frozen=True)
class Router:
    """All of it, of one recipe on one task."""

    task: str
    recipe: str
    n: int
    seed: int
    layers: list[Layer]
    overlap: dict[str, float]
    """`a-b`: positions that two layers both chose over those that either did, mean over prompts."""
    grid: tuple[int, int] | None
    """Rows and columns of the image tokens, where all items have the same."""
    places: dict[str, list[float]]
    """By layer: how often each image token of the prompt ran again; empty where grids differ."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def watching(deepener: Deepener) -> Iterator[list[Choice]]:
    """Every choice that a deepener makes while the block runs, its extra passes joined."""
    found: list[Choice] = []
    real = deepener.again
    open_at: dict[int, int] = {}

    def again(x: Tensor, tokens: Tokens, ran: Tensor, sizes: Any, latents: Any, layer: int, depth: int) -> Again | None:
        out = real(x, tokens, ran, sizes, latents, layer, depth)
        mask = torch.zeros_like(tokens.valid) if out is None else out.mask
        if depth == 1:
            scorer: Any = deepener
            gate = torch.ones_like(mask, dtype=torch.float32)
            if hasattr(scorer, "scores"):
                gate = scorer.gates(scorer.scores(x, tokens, layer))
            rows = [valid.nonzero().flatten() for valid in tokens.valid]
            named = [
                list(map(_kind, tokens.modality[b, i].tolist(), tokens.hop[b, i].tolist())) for b, i in enumerate(rows)
            ]
            found.append(
                Choice(
                    layer,
                    [tokens.position[b, i].tolist() for b, i in enumerate(rows)],
                    named,
                    [mask[b, i].tolist() for b, i in enumerate(rows)],
                    [gate[b, i].float().tolist() for b, i in enumerate(rows)],
                )
            )
            open_at[layer] = len(found) - 1
        return out  # later passes are for whom the first one chose

    deepener.again = again  # type: ignore[method-assign]
    try:
        yield found
    finally:
        del deepener.again


def _kind(modality: int, hop: int) -> str:
    if modality == Modality.LATENT:
        return "latent"
    if modality == Modality.VISION:
        return "copy" if hop else "vision"
    return "text"


@torch.no_grad()
def measure_router(
    model: Any,
    recipe: Recipe,
    plan: Plan,
    progress: Callable[[str, int, int], None] | None = None,
) -> Router:
    """Answers a plan's items and looks at what ran again.

    Args:
        model: a loaded stock model with its processor, or a name.
        recipe: has a deepener.
        plan: task, items, seed and batch.
        progress: told what is done, items done and items in all.

    Raises:
        ConfigError: the recipe deepens nothing.
    """
    if recipe.deepen is None or recipe.deepen.get("name") == "none":
        raise ConfigError(
            f"recipe {recipe.name} has no deepener; use one whose `deepen` has, as latent-depth and vedas"
        )
    task = load_task(plan.task, plan.settings)
    samples = draw(task, plan)
    seen = _Seen()
    with equip(model, recipe) as (routed, think):
        for start in range(0, len(samples), plan.batch):
            part = samples[start : start + plan.batch]
            with watching(routed.controller.deepener) as choices:
                routed.answer_many([messages(routed, task, sample, think) for sample in part], think=think)
            seen.take(choices, part)
            if progress is not None:
                progress("router", min(start + plan.batch, len(samples)), len(samples))
    return seen.summary(plan, recipe.name)


class _Seen:
    """Sums over batches; no choice is kept."""

    def __init__(self) -> None:
        self.counts: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))
        self.places: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self.truth: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0])  # chosen, needed, both, all
        self.overlaps: dict[tuple[int, int], list[float]] = defaultdict(list)
        self.grids: set[tuple[int, int]] = set()
        self.items = 0

    def take(self, choices: Sequence[Choice], samples: Sequence[Sample]) -> None:
        prompts: dict[int, Choice] = {}
        self.items += len(samples)
        for choice in choices:
            for kinds, again, gates in zip(choice.kinds, choice.again, choice.gates, strict=True):
                for kind, chosen, gate in zip(kinds, again, gates, strict=True):
                    row = self.counts[choice.layer][kind]
                    row[0] += 1
                    row[1] += chosen
                    row[2] += gate * chosen
            prompts.setdefault(choice.layer, choice)  # the first call of a session is its prompt
        for b, sample in enumerate(samples):
            sets = {}
            for layer, choice in prompts.items():
                picked = [a for a, kind in zip(choice.again[b], choice.kinds[b], strict=True) if kind == "vision"]
                for place, chosen in enumerate(picked):
                    self.places[layer][place] += chosen
                needed = _needed(sample, len(picked))
                if needed is not None:
                    t = self.truth[layer]
                    t[0], t[1], t[3] = t[0] + sum(picked), t[1] + sum(needed), t[3] + len(picked)
                    t[2] += sum(p and n for p, n in zip(picked, needed, strict=True))
                sets[layer] = {c for c, a in zip(choice.columns[b], choice.again[b], strict=True) if a}
            for a, c in combinations(sorted(sets), 2):
                either = sets[a] | sets[c]
                if either:
                    self.overlaps[a, c].append(len(sets[a] & sets[c]) / len(either))
            grid = sample.meta.get("canvas")
            if grid:
                self.grids.add((grid[0], grid[1]))

    def summary(self, plan: Plan, recipe: str) -> Router:
        layers = []
        for layer, kinds in sorted(self.counts.items()):
            chosen, needed, both, every = self.truth[layer]
            layers.append(
                Layer(
                    layer,
                    {k: kinds[k][1] / kinds[k][0] for k in KINDS if k in kinds},
                    {k: kinds[k][2] / kinds[k][1] for k in KINDS if k in kinds and kinds[k][1]},
                    _entropy(list(self.places[layer].values())),
                    both / chosen if every and chosen else None,
                    both / needed if every and needed else None,
                    needed / every if every else None,
                )
            )
        grid = next(iter(self.grids)) if len(self.grids) == 1 else None
        fits = grid is not None and all(len(rows) == grid[0] * grid[1] for rows in self.places.values())
        places = {
            str(layer): [rows[i] / self.items for i in range(len(rows))] for layer, rows in sorted(self.places.items())
        }
        overlap = {f"{a}-{b}": fmean(values) for (a, b), values in sorted(self.overlaps.items())}
        return Router(
            plan.task, recipe, plan.n, plan.seed, layers, overlap, grid if fits else None, places if fits else {}
        )


def _needed(sample: Sample, tokens: int) -> list[bool] | None:
    """[image token of the prompt]: whether some hop must see it; None where nobody knows."""
    canvas = sample.meta.get("canvas")
    if not canvas or canvas[0] * canvas[1] != tokens:
        return None
    try:
        return [bool(x) for x in relevant_tokens(sample, (1, canvas[0], canvas[1]), 1).needed]
    except InputError:
        return None


def _entropy(counts: Sequence[int]) -> float:
    total = sum(counts)
    if not total or len(counts) < 2:
        return 0.0
    return -sum(c / total * math.log(c / total) for c in counts if c) / math.log(len(counts))


def lines(found: Router) -> list[str]:
    """What a person wants to know of it."""
    out = [
        f"{found.task}, seed {found.seed}, {found.n} items, recipe {found.recipe}: share of positions that run a layer "
        "again",
        f"{'layer':>5}" + "".join(f"{kind:>9}" for kind in KINDS) + "  entropy  precision  recall  by chance",
    ]
    for layer in found.layers:
        shares = "".join(f"{layer.share[kind]:9.3f}" if kind in layer.share else f"{'-':>9}" for kind in KINDS)
        told = [f"{x:.3f}" if x is not None else "-" for x in (layer.precision, layer.recall, layer.chance)]
        out.append(f"{layer.layer:5}{shares}  {layer.entropy:7.3f}  {told[0]:>9}  {told[1]:>6}  {told[2]:>9}")
    if found.overlap:
        out.append(f"overlap of two layers' choices in the prompt: {fmean(found.overlap.values()):.3f} on average")
    return out


def picture(found: Router) -> str:
    """Shares and gates by layer, and where in the image each layer looks again; SVG."""
    kinds = [kind for kind in KINDS if any(kind in layer.share for layer in found.layers)]
    share = {k: [(float(x.layer), x.share[k]) for x in found.layers if k in x.share] for k in kinds}
    gate = {k: [(float(x.layer), x.gate[k]) for x in found.layers if k in x.gate] for k in kinds}
    panels: list[Any] = [
        Chart("share that runs again", share, "layer", "share"),
        Chart("mean gate of those", {k: line for k, line in gate.items() if line}, "layer", "gate"),
    ]
    if found.grid is not None:
        wide = found.grid[1]
        for layer, rows in found.places.items():
            table = [rows[i : i + wide] for i in range(0, len(rows), wide)]
            panels.append(Heat(f"layer {layer}: places of the image", table, "column", "row"))
    return sheet(f"{found.task}, {found.recipe}: what runs a layer again", panels)
