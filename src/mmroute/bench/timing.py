"""Seconds of recipes, interleaved in one process: only their ratios mean anything.

Legend: B batch, N positions of a prompt.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmroute.backbones.images import prepare
from mmroute.bench import items
from mmroute.bench.measure import Timings, clock_of, interleave, measure_generation
from mmroute.engine.attach import Routed
from mmroute.recipe import Recipe, equip
from mmroute.tasks.base import Sample, Task
from mmroute.think.base import Thinker

__all__ = ["measure_recipes"]


def measure_recipes(
    model: Any, recipes: Sequence[Recipe], task: Task, samples: Sequence[Sample], plan: items.Plan
) -> Timings:
    """Prefill and decode seconds of the recipes, interleaved: a round is one item, the same for all.

    Batch 1, forced length. A recipe that routes nothing runs the stock model with its stock cache.

    Returns:
        Timings whose cases are `"0"`, `"1"`, ... in the order of `recipes`.
    """
    clock, tower = clock_of(model.device), model.get_encoder("image")
    apart = None if tower in (model, model.base_model) else tower  # Chameleon names no tower

    def case(recipe: Recipe) -> Callable[[], Mapping[str, float]]:
        with equip(model, recipe) as (routed, think):
            batches = itertools.cycle([_timed_batch(routed, task, sample, think) for sample in samples])

        def run() -> Mapping[str, float]:
            batch = next(batches)
            with _running(model, recipe):
                return measure_generation(model, batch, plan.forced_tokens, clock=clock, tower=apart).parts

        return run

    return interleave({str(i): case(r) for i, r in enumerate(recipes)}, plan.rounds, plan.warmup, clock)


def _running(model: Any, recipe: Recipe) -> Any:
    if recipe.prune is None and recipe.deepen is None:
        return torch.no_grad()
    return equip(model, recipe)


def _timed_batch(routed: Routed, task: Task, sample: Sample, think: Thinker) -> dict[str, Tensor]:
    batch = dict(prepare(routed.model, routed.processor, [items.messages(routed, task, sample, think)]))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    batch["position_ids"] = routed.family.positions(routed.model, ids, mask, batch.get("image_grid_thw"))
    known = items.relevance(routed, [sample], batch)
    if known is not None:
        relevance = torch.zeros(ids.shape, device=ids.device)
        vision = torch.isin(ids, torch.tensor(routed.family.vision_ids(routed.model), device=ids.device))
        relevance[vision] = torch.tensor(known[0], device=ids.device)
        batch["relevance"] = relevance
    return batch
