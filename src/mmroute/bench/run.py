"""One recipe on one task: accuracy, FLOPs, KV bytes and seconds from one run, against another recipe on the same
items.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from mmroute.bench import schema, stats
from mmroute.bench.answers import Outcome, Progress, answer_items
from mmroute.bench.items import Plan, draw, load_task
from mmroute.bench.measure import WALL, Timings, realised_saving
from mmroute.bench.record import hash_weights, result_of
from mmroute.bench.timing import measure_recipes
from mmroute.recipe import Recipe

__all__ = ["Evaluation", "Outcome", "Plan", "answer_items", "draw", "evaluate", "lines", "load_task", "measure_recipes"]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: the one-line summary, and a result file's content for each side."""

    summary: schema.Summary
    result: schema.Result
    baseline: schema.Result | None


def evaluate(
    model: Any,
    recipe: Recipe,
    plan: Plan,
    *,
    against: Recipe | None = None,
    command: str = "",
    name: str = "",
    progress: Progress | None = None,
    outcomes: Sequence[Outcome] | None = None,
) -> Evaluation:
    """How good and how expensive a recipe is, and how it compares on the same items.

    Args:
        model: a loaded stock model with its processor; unattached again afterwards.
        recipe: what is evaluated.
        plan: on what.
        against: the recipe to compare with, answered and timed in the same run.
        command: what the user typed, for the result file.
        name: what the model is called in results.
        progress: told recipe name, items done and items in all.
        outcomes: what each side answered elsewhere (`bench.spread`); they answer here if not given.
    """
    commit, dirty = schema.commit_of_source()
    began, start = datetime.now(UTC).isoformat(timespec="seconds"), WALL.read()
    task = load_task(plan.task, plan.settings)
    samples = draw(task, plan)
    sides = [recipe] if against is None else [recipe, against]
    if outcomes is None:
        outcomes = [answer_items(model, side, task, samples, plan.batch, progress) for side in sides]
    timings = measure_recipes(model, sides, task, samples[: plan.timed_items], plan)
    origin = schema.run_here(command, commit, dirty, began, WALL.read() - start)
    weights = hash_weights(model)
    results = [
        result_of(model, name, weights, task, plan, outcome, origin, time=_time(timings, side, plan))
        for side, outcome in enumerate(outcomes)
    ]
    ours = results[0]
    if against is None:
        return Evaluation(_summary(plan, ours), ours, None)
    result = _compared(ours, results[1], outcomes, timings)
    baseline = _summary(plan, results[1])
    ratio = schema.Ratios(
        flops=ours.cost.flops_answer / results[1].cost.flops_answer,
        kv_bytes=ours.cost.kv_bytes_end / results[1].cost.kv_bytes_end,
        prefill=timings.ratio("0", "1", "prefill").median,
        decode=timings.ratio("0", "1", "decode").median,
    )
    return Evaluation(_summary(plan, result, baseline, ratio), result, results[1])


def _time(timings: Timings, side: int, plan: Plan) -> schema.Time:
    return schema.Time(
        prefill_s=asdict(timings.spread(str(side), "prefill")),
        decode_s_per_token=asdict(timings.spread(str(side), "decode")),
        tower_s=asdict(timings.spread(str(side), "tower")),
        forced_tokens=plan.forced_tokens,
        batch=1,
        items=min(plan.timed_items, plan.n),
        clock=timings.clock,  # type: ignore[arg-type]
    )


def _compared(
    ours: schema.Result, theirs: schema.Result, outcomes: Sequence[Outcome], timings: Timings
) -> schema.Result:
    """Our result with the paired comparison and the time ratios filled in."""
    assert ours.time is not None
    right, other = (outcome.correct for outcome in outcomes)
    groups = [sample.group or sample.id for sample in outcomes[0].samples]
    difference = stats.paired_bootstrap(right, other, groups=groups)
    only_ours = sum(a > b for a, b in zip(right, other, strict=True))
    only_theirs = sum(a < b for a, b in zip(right, other, strict=True))
    ratio = {part: timings.ratio("0", "1", part) for part in ("prefill", "decode")}
    flop_ratio = (ours.cost.flops_prefill + ours.cost.flops_extra) / theirs.cost.flops_prefill
    return replace(
        ours,
        time=replace(
            ours.time,
            ratio={part: asdict(spread) for part, spread in ratio.items()},
            realised_saving=realised_saving(ratio["prefill"].median, flop_ratio),
        ),
        baseline=schema.Baseline(
            recipe=theirs.method.recipe,
            diff=difference.diff,
            ci95=(difference.low, difference.high),
            only_ours=only_ours,
            only_theirs=only_theirs,
            mcnemar_p=stats.mcnemar(only_ours, only_theirs),
            not_worse_at_1_point=difference.is_not_worse(0.01),
        ),
    )


def _summary(
    plan: Plan, result: schema.Result, baseline: schema.Summary | None = None, ratio: schema.Ratios | None = None
) -> schema.Summary:
    assert result.time is not None
    return schema.Summary(
        task=plan.task,
        recipe=result.method.recipe,
        model=result.model.id,
        n=plan.n,
        accuracy=result.quality.accuracy,
        ci95=result.quality.wilson95,
        flops=result.cost.flops_answer,
        kv_bytes=result.cost.kv_bytes_end,
        ar_steps=result.cost.ar_steps,
        prefill_s=result.time.prefill_s["median"],
        decode_s_per_token=result.time.decode_s_per_token["median"],
        keep=result.cost.keep,
        seed=plan.seed,
        commit=result.run.commit,
        baseline=baseline,
        ratio=ratio,
        metrics=result.quality.metrics,
        dataset=result.task.dataset,
    )


def lines(evaluation: Evaluation) -> Iterator[str]:
    """What a person wants to know of an evaluation."""
    result, summary = evaluation.result, evaluation.summary
    sides = [summary] if summary.baseline is None else [summary, summary.baseline]
    yield f"{summary.task} ({result.task.split}), seed {summary.seed}, {summary.n} items, model {summary.model}"
    if summary.dataset is not None:
        data, asked = summary.dataset, result.task
        labels = f", labels {data.labels}" if data.labels else ""
        yield (
            f"data {data.id}, revision {data.revision or 'unknown'}{labels}; scorer {asked.scorer}, "
            f"protocol {asked.protocol}"
        )
    yield (
        f"{'recipe':12} {'accuracy [95 %]':22} {'MFLOPs':>9} {'KV kB':>8} {'AR steps':>8} {'prefill ms':>10} "
        f"{'ms/token':>8}  keep vision / text"
    )
    for side in sides:
        low, high = side.ci95
        accuracy = f"{side.accuracy:.3f} [{low:.3f}, {high:.3f}]"
        yield (
            f"{side.recipe:12} {accuracy:22} {side.flops / 1e6:9.1f} {side.kv_bytes / 1e3:8.1f} {side.ar_steps:8.1f} "
            f"{side.prefill_s * 1e3:10.2f} {side.decode_s_per_token * 1e3:8.2f}  "
            f"{side.keep['vision']:.2f} / {side.keep['text']:.2f}"
        )
    for side in sides:
        whole = [f"{name} {value:.3f}" for name, value in side.metrics.items() if "/" not in name]
        if whole:
            yield f"{side.recipe:12} {', '.join(whole)}"
        for key, parts in groupby((k for k in side.metrics if "/" in k), lambda k: k.partition("/")[0]):
            shown = ", ".join(f"{name.partition('/')[2]} {side.metrics[name]:.3f}" for name in parts)
            yield f"{side.recipe:12} by {key}: {shown}"
    if result.task.hop_images != "none":
        grown = " ".join(f"{size / 1e3:.0f}" for size in result.cost.kv_bytes_by_hop)
        shown = f"pictures {result.task.hop_images}, context {result.task.context}"
        yield f"{shown}; {summary.recipe}, KV kB by hop: {grown}"
    if summary.ratio is not None and result.baseline is not None and result.time is not None:
        ratio, paired = summary.ratio, result.baseline
        low, high = paired.ci95
        yield (
            f"ratio to {paired.recipe}: FLOPs {ratio.flops:.3f}, KV {ratio.kv_bytes:.3f}, prefill {ratio.prefill:.3f}, "
            f"decode {ratio.decode:.3f}; accuracy difference {paired.diff:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
