"""One recipe on one task: accuracy, FLOPs, KV bytes and seconds from one run, against another recipe on the same items.

Legend: B batch, N positions of a prompt, P vision positions of it.
"""

import hashlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from statistics import fmean as mean
from typing import Any

import torch
from torch import Tensor

from mmroute import cost, hub
from mmroute.backbones.images import prepare
from mmroute.bench import schema, stats
from mmroute.bench.measure import WALL, Timings, clock_of, interleave, measure_generation, realised_saving
from mmroute.config import resolved
from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError, InputError
from mmroute.reason import Answer
from mmroute.recipe import Recipe, equip
from mmroute.tasks.base import Sample, Score, Task, relevant_tokens
from mmroute.think.base import Thinker

__all__ = [
    "Evaluation",
    "Outcome",
    "Plan",
    "answer_items",
    "draw",
    "evaluate",
    "lines",
    "load_task",
    "measure_recipes",
]

log = logging.getLogger(__name__)

SEED_STRIDE = 10_000
"""Items between the first ones of two seeds: runs of up to this many items share none."""


@dataclass(frozen=True)
class Plan:
    """What is measured besides the recipe."""

    task: str
    """`name` or `name:preset`."""
    n: int
    seed: int = 0
    """Which items: different seeds, different items."""
    split: str = "test"
    batch: int = 16
    rounds: int = 9
    warmup: int = 2
    forced_tokens: int = 64
    """Generated tokens of a timed run, whatever the answer's own length."""
    timed_items: int = 8
    """Prompts that timing goes through in turn."""


@dataclass(frozen=True)
class Outcome:
    """What a recipe did with the items, in their order."""

    recipe: Recipe
    samples: list[Sample]
    answers: list[Answer]
    scores: list[Score]
    flops_tower: float | None

    @property
    def correct(self) -> list[int]:
        return [int(score.correct or 0) for score in self.scores]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: the one-line summary, and a result file's content for each side."""

    summary: schema.Summary
    result: schema.Result
    baseline: schema.Result | None


def load_task(name: str) -> Task:
    """A task by `name` or `name:preset`.

    Raises:
        ConfigError: no such task or preset.
    """
    task, _, preset = name.partition(":")
    return hub.load("tasks", task, **({"preset": preset} if preset else {}))


def draw(task: Task, plan: Plan) -> list[Sample]:
    """The items of a plan, the same for every recipe.

    Raises:
        ConfigError: no items asked for, or more than seeds are apart.
        InputError: the split has fewer.
    """
    if not 1 <= plan.n <= SEED_STRIDE or plan.seed < 0 or plan.batch < 1:
        raise ConfigError(
            f"n in 1 .. {SEED_STRIDE}, seed >= 0 and batch >= 1 are needed, given {plan.n}, {plan.seed}, {plan.batch}"
        )
    samples = list(task.samples(plan.split, plan.n, offset=plan.seed * SEED_STRIDE))
    if len(samples) < plan.n:
        raise InputError(
            f"{plan.task}: split {plan.split!r} has {len(samples)} items from seed {plan.seed} on, {plan.n} were asked "
            "for; lower --n or --seed"
        )
    return samples


def evaluate(
    model: Any,
    recipe: Recipe,
    plan: Plan,
    *,
    against: Recipe | None = None,
    command: str = "",
    name: str = "",
    progress: Callable[[str, int, int], None] | None = None,
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
    """
    commit, dirty = schema.commit_of_source()
    began, start = datetime.now(UTC).isoformat(timespec="seconds"), WALL.read()
    task = load_task(plan.task)
    samples = draw(task, plan)
    sides = [recipe] if against is None else [recipe, against]
    outcomes = [answer_items(model, side, task, samples, plan.batch, progress) for side in sides]
    timings = measure_recipes(model, sides, task, samples[: plan.timed_items], plan)
    origin = schema.run_here(command, commit, dirty, began, WALL.read() - start)
    results = [
        _result(model, name, task, plan, outcome, timings, side, origin) for side, outcome in enumerate(outcomes)
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


# ---------------------------------------------------------------------- answering


def answer_items(
    model: Any,
    recipe: Recipe,
    task: Task,
    samples: Sequence[Sample],
    batch: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> Outcome:
    """Every item's answer and score, in batches; a batch changes no answer."""
    answers: list[Answer] = []
    tower: list[int] | None = []
    with equip(model, recipe) as (routed, think):
        for start in range(0, len(samples), batch):
            chats = [_messages(routed, task, sample, think) for sample in samples[start : start + batch]]
            relevance = None
            if _asks_relevance(routed):
                relevance = [_relevance(routed, s, c) for s, c in zip(samples[start:], chats, strict=False)]
            answers += routed.answer_many(chats, think=think, relevance=relevance)
            if tower is not None:
                spent = _tower_flops(routed, chats)
                tower = None if spent is None else [*tower, spent]
            if progress is not None:
                progress(recipe.name, len(answers), len(samples))
    scores = [task.score(sample, answer.text) for sample, answer in zip(samples, answers, strict=True)]
    if any(score.correct is None for score in scores):
        raise InputError(f"{task.name}: an item has no gold answer, so accuracy is undefined; use another split")
    return Outcome(recipe, list(samples), answers, scores, sum(tower) / len(samples) if tower is not None else None)


def _messages(routed: Routed, task: Task, sample: Sample, think: Thinker) -> list[dict[str, Any]]:
    """The item as a chat: in the short words of the small models, or in plain English with the thinker's instruction.

    A vocabulary that cannot write the plain question is one of the small models' closed ones.
    """
    tokenizer = routed.processor.tokenizer
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in tokenizer(sample.question, add_special_tokens=False)["input_ids"]:
        return task.messages(sample, think.style)
    messages = task.messages(sample, "sentence")
    messages[-1]["content"].append({"type": "text", "text": f"\n{think.cues[0]}"})
    return messages


def _asks_relevance(routed: Routed) -> bool:
    pruner = routed.controller.pruner
    return pruner is not None and "relevance" in pruner.needs


def _relevance(routed: Routed, sample: Sample, chat: list[dict[str, Any]]) -> list[float]:
    """One number per vision position: 2 needed by some hop, 1 part of the board, 0 background."""
    batch = prepare(routed.model, routed.processor, [chat])
    ((rows, columns),) = routed.family.image_grid(routed.model, batch)
    known = relevant_tokens(sample, (1, rows, columns), 1)
    return [float(2 * needed or board) for needed, board in zip(known.needed, known.board, strict=True)]


def _tower_flops(routed: Routed, chats: list[Any]) -> int | None:
    config = routed.model.config
    vision = getattr(config, "vision_config", None)  # Chameleon has none: its images are words
    if vision is None:
        return None
    batch = prepare(routed.model, routed.processor, chats)
    if "image_grid_thw" in batch:
        return cost.estimate_tower_flops(vision, [(t, h, w) for t, h, w in batch["image_grid_thw"].tolist()])
    return cost.estimate_tower_flops(vision, [(1, h, w) for h, w in routed.family.image_grid(routed.model, batch)])


# ---------------------------------------------------------------------- timing


def measure_recipes(
    model: Any, recipes: Sequence[Recipe], task: Task, samples: Sequence[Sample], plan: Plan
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
    chat = _messages(routed, task, sample, think)
    batch = dict(prepare(routed.model, routed.processor, [chat]))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    batch["position_ids"] = routed.family.positions(routed.model, ids, mask, batch.get("image_grid_thw"))
    if _asks_relevance(routed):
        relevance = torch.zeros(ids.shape, device=ids.device)
        vision = torch.isin(ids, torch.tensor(routed.family.vision_ids(routed.model), device=ids.device))
        relevance[vision] = torch.tensor(_relevance(routed, sample, chat), device=ids.device)
        batch["relevance"] = relevance
    return batch


# ---------------------------------------------------------------------- results


def _result(
    model: Any,
    name: str,
    task: Task,
    plan: Plan,
    outcome: Outcome,
    timings: Timings,
    side: int,
    origin: schema.Run,
) -> schema.Result:
    text = model.config.get_text_config(decoder=True)
    return schema.Result(
        run=origin,
        machine=schema.machine_here(
            model.device.type, str(model.dtype).removeprefix("torch."), text._attn_implementation
        ),
        model=schema.Model(id=name, family=model.config.model_type, layers=text.num_hidden_layers),
        method=_method(outcome.recipe),
        task=schema.Task(
            name=f"{task.name}-v{task.version}",
            preset=plan.task.partition(":")[2],
            split=plan.split,
            n=plan.n,
            seed=plan.seed,
            ids_sha256=hashlib.sha256("\n".join(s.id for s in outcome.samples).encode()).hexdigest(),
            scorer=outcome.scores[0].scorer,
        ),
        quality=_quality(outcome),
        cost=_cost(outcome),
        time=schema.Time(
            prefill_s=asdict(timings.spread(str(side), "prefill")),
            decode_s_per_token=asdict(timings.spread(str(side), "decode")),
            tower_s=asdict(timings.spread(str(side), "tower")),
            forced_tokens=plan.forced_tokens,
            batch=1,
            items=min(plan.timed_items, plan.n),
            clock=timings.clock,  # type: ignore[arg-type]
        ),
    )


def _method(recipe: Recipe) -> schema.Method:
    parts = {kind: recipe.build(kind) for kind in ("prune", "deepen", "think")}
    chosen = {kind: (getattr(recipe, kind) or {}).get("name", "none") for kind in parts}
    if recipe.think is None:
        chosen["think"] = "text"
    pruner = parts["prune"]
    return schema.Method(
        recipe=recipe.name,
        **chosen,
        config={kind: resolved(part.config) for kind, part in parts.items() if part is not None},
        needs=sorted(pruner.needs) if pruner is not None else [],
        checked=hub.describe("prune", chosen["prune"]).checked,
    )


def _quality(outcome: Outcome) -> schema.Quality:
    by_level: dict[str, list[int]] = defaultdict(list)
    for sample, right in zip(outcome.samples, outcome.correct, strict=True):
        by_level[str(sample.difficulty.get("level", ""))].append(right)
    correct = outcome.correct
    return schema.Quality(
        accuracy=mean(correct),
        wilson95=stats.wilson(sum(correct), len(correct)),
        correct="".join(map(str, correct)),
        parsed=mean(score.parsed for score in outcome.scores),
        by_level={level: mean(values) for level, values in sorted(by_level.items()) if level},
    )


def _cost(outcome: Outcome) -> schema.Cost:
    traces = [answer.trace for answer in outcome.answers]
    flops = [cost.estimate_flops(trace) for trace in traces]
    tokens = [cost.effective_tokens(trace) for trace in traces]
    shares = [cost.keep_shares(trace) for trace in traces]
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
    )


def lines(evaluation: Evaluation) -> Iterator[str]:
    """What a person wants to know of an evaluation."""
    result, summary = evaluation.result, evaluation.summary
    sides = [summary] if summary.baseline is None else [summary, summary.baseline]
    yield f"{summary.task} ({result.task.split}), seed {summary.seed}, {summary.n} items, model {summary.model}"
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
    if summary.ratio is not None and result.baseline is not None and result.time is not None:
        ratio, paired = summary.ratio, result.baseline
        low, high = paired.ci95
        yield (
            f"ratio to {paired.recipe}: FLOPs {ratio.flops:.3f}, KV {ratio.kv_bytes:.3f}, prefill {ratio.prefill:.3f}, "
            f"decode {ratio.decode:.3f}; accuracy difference {paired.diff:+.3f} [{low:+.3f}, {high:+.3f}]"
        )
