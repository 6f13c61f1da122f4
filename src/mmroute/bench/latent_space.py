"""Where latents lie: whether they tell inputs and steps apart, what they say and what they are close to.

Legend: D hidden, T steps, n latents, m other vectors.

Source: CapImagine (2602.22766) on collapsed latents; Vedas (arXiv 2604.10500), figure 8, draws them.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmroute.backbones.images import prepare
from mmroute.bench.items import Plan, draw, load_task
from mmroute.bench.plane import Plane, on_plane
from mmroute.bench.record_latents import Item, latents_of, recorded
from mmroute.bench.svg import COLOURS, safe
from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe, equip

__all__ = ["Collapse", "Near", "Point", "collapse", "picture", "survey"]


@dataclass(frozen=True)
class Collapse:
    """How much latents tell inputs and steps apart."""

    cosine_inputs: float
    """Mean cosine of one step's latents between items; above .95 they hardly depend on the input."""
    cosine_steps: float
    """Mean cosine of one item's latents between steps."""
    effective_rank: float
    """(sum of singular values)^2 over the sum of their squares, of all latents less their mean."""
    between_inputs: float
    """Share of the variance that lies between items, of one step."""
    collapsed: bool


def collapse(latents: Sequence[Float[Tensor, "T D"]]) -> Collapse:
    """Whether latents differ.

    Args:
        latents: of each item; items may differ in steps.

    Raises:
        ConfigError: fewer than two items have latents.
    """
    if len(latents) < 2:
        raise ConfigError(f"latents of {len(latents)} items given; at least 2 are compared")
    across, between = [], []
    for step in range(max(map(len, latents))):
        rows = torch.stack([z[step] for z in latents if len(z) > step]).float()
        if len(rows) > 1:
            unit = F.normalize(rows, dim=-1)
            total = unit.sum(0).square().sum() - len(rows)  # cosines of all pairs, each twice
            across.append(float(total) / (len(rows) * (len(rows) - 1)))
            spread = (rows - rows.mean(0)).square().sum()
            between.append(float(spread / rows.square().sum()))
    along = [
        float(F.cosine_similarity(a, b, dim=0))
        for z in latents
        for a, b in itertools.combinations(z.float(), 2)
    ]  # fmt: skip
    every = torch.cat([z.float() for z in latents])
    values = torch.linalg.svdvals(every - every.mean(0))
    rank = float(values.sum() ** 2 / values.square().sum().clamp(min=1e-12))
    cosine = fmean(across)
    return Collapse(cosine, fmean(along) if along else 1.0, rank, fmean(between), cosine > 0.95)


@dataclass(frozen=True)
class Near:
    """What latents lie closest to: cosines, mean over latents."""

    visual: float | None
    """Of a latent and the image token of its own question that is most like it; None without images."""
    words: float
    """Of a latent and the word embedding that is most like it."""


@dataclass(frozen=True)
class Point:
    """One latent on a plane."""

    item: str
    step: int
    x: float
    y: float
    words: list[str]
    """What the model's head reads off it, best first."""


@torch.no_grad()
def survey(
    model: Any,
    recipe: Recipe,
    plan: Plan,
    words: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
    plane: Plane = "pca",
) -> tuple[Collapse, list[Point], Near]:
    """Where the latents of a plan's items lie on a plane, what they say, and what they lie closest to.

    Args:
        model: a loaded stock model with its processor, or a name.
        recipe: thinks in latents.
        plan: task, items, seed and batch.
        words: how many are read off each.
        progress: told what is done, items done and items in all.
        plane: principal components, or t-SNE.

    Raises:
        ConfigError: the recipe takes no latent steps, or t-SNE cannot take so many.
    """
    task = load_task(plan.task)
    samples = draw(task, plan)
    with equip(model, recipe) as (routed, think):
        if not think.num_latents:
            raise ConfigError(f"recipe {recipe.name} takes no latent steps; use one whose `think` does")
        items: list[Item] = []
        visual: list[float] = []
        for start in range(0, len(samples), plan.batch):
            fresh = recorded(routed, think, task, samples[start : start + plan.batch])
            visual += _to_image(routed, fresh)
            items += fresh
            if progress is not None:
                progress("latents", len(items), len(samples))
        found = collapse(latents_of(items))
        every = torch.cat(latents_of(items)).float()
        # What is fed back is the state times one number, which changes no order.
        top = routed.family.head(routed.model, every.to(routed.model.dtype)).topk(words, dim=-1).indices.tolist()
        tokenizer = routed.processor.tokenizer
        table = routed.family.text_model(routed.model).embed_tokens.weight
        near = Near(fmean(visual) if visual else None, fmean(_closest(every, table)))
    flat = on_plane(every, plane).tolist()
    names = [(item.sample.id, step) for item in items for step in range(len(item.latents))]
    points = [
        Point(name, step + 1, round(x, 4), round(y, 4), [tokenizer.decode([i]) for i in best])
        for (name, step), (x, y), best in zip(names, flat, top, strict=True)
    ]
    return found, points, near


def _closest(latents: Float[Tensor, "n D"], others: Float[Tensor, "m D"]) -> list[float]:
    """Cosine of each latent and the row that is most like it."""
    return (F.normalize(latents.float(), dim=-1) @ F.normalize(others.float(), dim=-1).T).amax(1).tolist()


def _to_image(routed: Routed, items: Sequence[Item]) -> list[float]:
    """The same of each latent and the image tokens of its own question."""
    counts = [sum(block["type"] == "image" for turn in item.chat for block in turn["content"]) for item in items]
    if not any(counts):
        return []
    batch = prepare(routed.model, routed.processor, [item.chat for item in items])
    tokens = iter(routed.family.image_features(routed.model, {k: batch[k] for k in routed.family.image_kwargs(batch)}))
    own = [[next(tokens) for _ in range(count)] for count in counts]
    return [
        cosine
        for item, images in zip(items, own, strict=True)
        if images and len(item.latents)
        for cosine in _closest(item.latents, torch.cat(images))
    ]


def picture(points: Sequence[Point], title: str) -> str:
    """The points as a self-contained SVG, a colour for each step; the word that the head reads is the tooltip."""
    width, height, edge = 560, 420, 40
    xs, ys = [p.x for p in points], [p.y for p in points]
    wide, high = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    dots = "".join(
        f'<circle cx="{edge + (width - 2 * edge) * (p.x - min(xs)) / wide:.1f}" '
        f'cy="{height - edge - (height - 2 * edge) * (p.y - min(ys)) / high:.1f}" r="3" fill-opacity="0.7" '
        f'fill="{COLOURS[(p.step - 1) % len(COLOURS)]}"><title>{safe(f"{p.item}, step {p.step}: {p.words[0]}")}'
        "</title></circle>"
        for p in points
    )
    steps = sorted({p.step for p in points})
    legend = "".join(
        f'<text x="{width - edge + 6}" y="{edge + 16 * i}" fill="{COLOURS[(s - 1) % len(COLOURS)]}">{s}</text>'
        for i, s in enumerate(steps[:24])
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"
 font-size="12">
<rect width="{width}" height="{height}" fill="white"/>
<text x="{edge}" y="20" font-size="14">{safe(title)}</text>
{dots}
{legend}
</svg>
"""
