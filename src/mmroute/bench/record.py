"""An outcome as a result file: method, quality and cost of one recipe on one task."""

import hashlib
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean as mean
from typing import Any

from torch import Tensor

from mmroute import cost, hub
from mmroute.bench import schema, stats
from mmroute.bench.answers import Outcome
from mmroute.bench.items import Plan
from mmroute.config import resolved
from mmroute.recipe import Recipe
from mmroute.tasks.base import Sample, Task
from mmroute.trace import Trace
from mmroute.train.delta import fingerprint

__all__ = ["group_sizes", "hash_weights", "result_of"]

_HASHED_PARAMETERS = 200_000_000
"""Larger models are told apart by their name alone: hashing them takes longer than a run."""
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def hash_weights(model: Any) -> str:
    """SHA-256 of a model's own weights, without what a recipe's training changed; empty for models too large to hash
    at every start, and for quantised ones."""
    tensors = dict(model.named_parameters())
    if sum(tensor.numel() for tensor in tensors.values()) > _HASHED_PARAMETERS:
        return ""
    if any(type(tensor.data) is not Tensor for tensor in tensors.values()):
        return ""  # torchao's tensors have no bytes of their own to read
    return fingerprint(tensors)


def result_of(
    model: Any, name: str, weights: str, task: Task, plan: Plan, outcome: Outcome, origin: schema.Run, **more: Any
) -> schema.Result:
    """The content of a result file, without seconds and comparisons.

    Args:
        model: what answered.
        name: what it is called in results.
        weights: what `hash_weights` gives for it.
        task: what was asked.
        plan: which items.
        outcome: what came of them.
        origin: where the file comes from.
        more: further fields of the result.
    """
    text = model.config.get_text_config(decoder=True)
    options, data = getattr(task, "config", None), task.origin(plan.split)
    return schema.Result(
        run=origin,
        machine=schema.machine_here(
            model.device.type, str(model.dtype).removeprefix("torch."), text._attn_implementation
        ),
        model=schema.Model(
            id=name,
            family=model.config.model_type,
            layers=text.num_hidden_layers,
            weights_sha256=weights,
            trained=outcome.recipe.trained or "none",
        ),
        method=_method(outcome.recipe),
        task=schema.Task(
            name=f"{task.name}-v{task.version}",
            preset=plan.task.partition(":")[2],
            split=plan.split,
            n=plan.n,
            seed=plan.seed,
            ids_sha256=hashlib.sha256("\n".join(s.id for s in outcome.samples).encode()).hexdigest(),
            scorer=outcome.scores[0].scorer,
            hop_images=getattr(options, "hop_images", "none"),
            context=plan.context,
            min_hops=plan.min_hops,
            groups=group_sizes(outcome.samples),
            protocol=task.protocol,
            dataset=None if data is None else schema.Dataset(**asdict(data)),
        ),
        quality=_quality(outcome, task),
        cost=_cost(outcome),
        **more,
    )


def group_sizes(samples: Sequence[Sample]) -> str:
    """Sizes of the runs of items that belong together, such as "4,4,4"."""
    keys = [sample.group or sample.id for sample in samples]
    return ",".join(str(len(list(same))) for _, same in itertools.groupby(keys))


def _method(recipe: Recipe) -> schema.Method:
    parts = {kind: recipe.build(kind) for kind in ("prune", "deepen", "think")}
    default = {"prune": "none", "deepen": "none", "think": "text"}
    chosen = {kind: (getattr(recipe, kind) or {}).get("name", default[kind]) for kind in parts}
    pruner = parts["prune"]
    return schema.Method(
        recipe=recipe.name,
        **chosen,
        config={kind: resolved(part.config) for kind, part in parts.items() if part is not None},
        needs=sorted(pruner.needs) if pruner is not None else [],
        checked=hub.describe("prune", chosen["prune"]).checked,
    )


def _quality(outcome: Outcome, task: Task) -> schema.Quality:
    by_level: dict[str, list[int]] = defaultdict(list)
    by_hops: dict[int, list[int]] = defaultdict(list)
    for sample, right in zip(outcome.samples, outcome.correct, strict=True):
        by_level[str(sample.difficulty.get("level", ""))].append(right)
        by_hops[sample.difficulty.get("hops", 0)].append(right)
    correct = outcome.correct
    return schema.Quality(
        accuracy=mean(correct),
        wilson95=stats.wilson(sum(correct), len(correct)),
        correct="".join(map(str, correct)),
        parsed=mean(score.parsed for score in outcome.scores),
        by_level={level: mean(values) for level, values in sorted(by_level.items()) if level},
        by_hops={str(hops): (sum(values), len(values)) for hops, values in sorted(by_hops.items()) if hops > 0},
        predicted=_predicted(outcome),
        exact="".join(map(str, outcome.exact or [])),
        forced="".join(map(str, outcome.forced or [])),
        metrics=_metrics(task.metrics(outcome.samples, outcome.scores)),
    )


def _metrics(found: Mapping[str, float]) -> dict[str, float]:
    """What stands beside accuracy; a figure without items, as of groups that are all cut, is none."""
    return {k: v for k, v in found.items() if k not in ("accuracy", "parsed") and not math.isnan(v)}


def _predicted(outcome: Outcome) -> str:
    """One character per item, or nothing where answers are not choices."""
    if any(not 0 < len(sample.choices) <= len(_DIGITS) for sample in outcome.samples):
        return ""
    out = ""
    for sample, score in zip(outcome.samples, outcome.scores, strict=True):
        labels = [choice.label for choice in sample.choices]
        out += _DIGITS[labels.index(score.prediction)] if score.prediction in labels else "-"
    return out


def _cost(outcome: Outcome) -> schema.Cost:
    traces = [answer.trace for answer in outcome.answers]
    flops = [cost.estimate_flops(trace) for trace in traces]
    tokens = [cost.effective_tokens(trace) for trace in traces]
    shares = [cost.keep_shares(trace) for trace in traces]
    by_hop = [cost.estimate_kv_bytes_by_hop(trace) for trace in traces]
    having = [[kv[hop] for kv in by_hop if len(kv) > hop] for hop in range(max(map(len, by_hop)))]
    return schema.Cost(
        flops_prefill=mean(f.prefill for f in flops),
        flops_decode=mean(f.decode for f in flops),
        flops_extra=mean(f.extra for f in flops),
        flops_lm_head=mean(f.lm_head for f in flops),
        flops_answer=mean(f.total for f in flops),
        flops_tower=outcome.flops_tower,
        v_eff=mean(t.vision for t in tokens),
        t_eff=mean(t.text for t in tokens),
        keep={name: mean(share[name] for share in shares) for name in ("vision", "text")},
        kv_bytes_prefill=mean(cost.estimate_kv_bytes(trace, "prefill") for trace in traces),
        kv_bytes_peak=mean(cost.estimate_kv_bytes(trace, "peak") for trace in traces),
        kv_bytes_end=mean(cost.estimate_kv_bytes(trace) for trace in traces),
        ar_steps=mean(answer.ar_steps for answer in outcome.answers),
        kv_bytes_by_hop=[mean(values) for values in having],
        items_by_hop=[len(values) for values in having],
        keep_map=_keep_map(traces),
    )


def _keep_map(traces: Sequence[Trace]) -> dict[str, list[list[float | None]]]:
    """Means over the items that have the hop; rounded, as a picture needs them."""
    maps = [cost.keep_maps(trace) for trace in traces]
    hops, layers = max(len(each["kv"]) for each in maps), traces[0].shape.layers
    out: dict[str, list[list[float | None]]] = {}
    for name in ("vision", "text", "kv"):
        out[name] = []
        for hop in range(hops):
            rows = [each[name][hop] for each in maps if len(each[name]) > hop]
            known = [[row[layer] for row in rows if row[layer] is not None] for layer in range(layers)]
            out[name].append([round(mean(values), 4) if values else None for values in known])  # type: ignore[arg-type]
    return out
