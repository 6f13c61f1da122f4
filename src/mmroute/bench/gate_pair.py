"""Both models of a pair on the same questions: what they answer, what routing makes of it, and what that takes.

Legend: n queries.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np

from mmroute.backbones.load import load
from mmroute.bench import deferral, schema
from mmroute.bench.deferral import curve
from mmroute.bench.gate_judge import evidence_of
from mmroute.bench.items import messages
from mmroute.bench.outcomes.base import Outcomes, pair_up
from mmroute.bench.stats import wilson
from mmroute.engine.attach import attach
from mmroute.errors import ConfigError
from mmroute.gate._policy import policy
from mmroute.gate.base import Evidence, Question, Ratings, charge
from mmroute.gate.prp import Prp
from mmroute.recipe import Recipe
from mmroute.tasks._mixture import draw_mixture
from mmroute.train.prp import GateConfig, chats_of, sections
from mmroute.train.rollouts import ask, collect, roll_out

__all__ = ["GateSummary", "Gathered", "evaluate", "gather", "open_pair"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Gathered:
    """Both models' answers to the same questions."""

    outcomes: Outcomes
    evidence: list[Evidence]
    rated: Ratings | None
    """Of the rater, taken from the draft's own prefill."""


def gather(
    recipe: Recipe,
    draft: Any,
    target: Any,
    n: int,
    seed: int,
    split: Literal["val", "test"],
    rater: Prp | None = None,
    samples: int = 0,
    questions: Sequence[Question] = (),
) -> Gathered:
    """Asks both models.

    Args:
        recipe: with a `gate` section.
        draft: a loaded model.
        target: likewise.
        n: questions.
        seed: which.
        split: `val` or `test`.
        rater: a `Prp` on this draft.
        samples: sampled draft answers besides.
        questions: what gates ask the draft besides; those its vocabulary cannot write are left out.
    """
    (gated, _), think = sections(recipe), recipe.build("think")
    items = draw_mixture(gated.mix, n, split, seed)
    with attach(draft) as routed:
        first = collect(routed, "draft", gated.draft, items, think=think, rater=rater, progress=_told("draft"))
        more = None
        if samples:
            drawn: dict[str, Any] = {"samples": samples, "temperature": 1.0, "progress": _told("samples")}
            more = collect(routed, "draft", gated.draft, items, think=think, **drawn)
        replies: dict[str, dict[str, float]] = {item.sample.id: {} for item in items}
        for question in questions:
            chats = [messages(routed, item.task, item.sample, think) for item in items]
            said = ask(routed, question, chats, [first.texts[item.sample.id] for item in items])
            if said is None:
                log.info("%s is not asked: the draft's vocabulary cannot write it", question.name)
                continue
            for item, (reply, flops) in zip(items, said, strict=True):
                replies[item.sample.id] |= {question.name: reply, f"{question.name}.flops": flops}
    with attach(target) as routed:
        second = collect(routed, "target", gated.target, items, think=think, progress=_told("target"))
    outcomes = pair_up([*first.rows, *second.rows])
    outcomes.stats["tokens"] = np.array([row.tokens_out for row in first.rows], float)
    sampled: dict[str, list[str]] = {}
    for row in more.rows if more is not None else []:
        sampled.setdefault(row.query_id, []).append(row.prediction)
    evidence = evidence_of(outcomes, first.prefill, first.last, sampled, replies)
    return Gathered(outcomes, evidence, _joined(first.ratings, outcomes.ids))


def _told(role: str) -> Callable[[int, int], None]:
    return lambda done, total: log.info("%s: %d of %d answers", role, done, total)


def _joined(parts: list[tuple[list[str], Ratings]], ids: list[str]) -> Ratings | None:
    """Ratings of batches in the order of the ids."""
    if not parts:
        return None
    at = {name: i for i, name in enumerate(name for names, _ in parts for name in names)}
    index = np.array([at[name] for name in ids])

    def column(name: str) -> Any:
        values = [getattr(ratings, name) for _, ratings in parts]
        return None if values[0] is None else np.concatenate(values)[index]

    names = ("score", "draft", "target", "draft_probs", "target_probs")
    return Ratings(**{name: column(name) for name in names}, overhead=parts[0][1].overhead)


@dataclass(frozen=True)
class GateSummary:
    """The one line that `mmroute eval --recipe prp-small --json` ends with."""

    recipe: str
    n: int
    seed: int
    budget: float | None
    """Asked share of target calls; None for a policy that has none."""
    accuracy: float
    """Under the policy, in the order of arrival."""
    ci95: tuple[float, float]
    accuracy_draft: float
    accuracy_target: float
    accuracy_random: float
    """The same share of queries, whichever."""
    accuracy_oracle: float
    """The same share, the best ones."""
    target_share: float
    oracle_normalised_gain: float | None
    cost_ratio: float
    """FLOPs over always-target, rating and unused draft prefills included."""
    time_ratio: float
    """Seconds over always-target, batch 1, medians of rounds in turn."""
    rating_overhead: float
    """Seconds of a rating over those of one decode step of the draft."""
    rating_steps: int
    rating_flops_share: float
    """Of the draft's prefill."""
    by_part: dict[str, dict[str, float]]
    artifact: str
    commit: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    recipe: Recipe, draft: Any, target: Any, rater: Prp, n: int, seed: int, budget: float | None = None, timed: int = 12
) -> GateSummary:
    """One rater and one policy on held-out questions, as they would be served.

    Args:
        recipe: with a `gate` section.
        draft: a loaded model.
        target: likewise.
        rater: a `Prp` on this draft.
        n: questions.
        seed: which.
        budget: share of target calls; None is the recipe's policy as it stands.
        timed: questions that are timed one by one.
    """
    gated, _ = sections(recipe)
    found = gather(recipe, draft, target, n, seed, "test", rater)
    outcomes, rated = found.outcomes, found.rated
    assert rated is not None
    chosen = dict(gated.policy)
    if budget is not None:
        chosen = {"name": "budget", "budget": budget}
    if chosen["name"] == "budget":
        chosen.setdefault("start", rater.start(chosen.get("budget", 0.4)))
    decisions = policy(chosen.pop("name"), **chosen).decide_many([rater.one(rated, i) for i in range(n)], outcomes.ids)
    sent = np.array([d.route == "target" for d in decisions])
    share, right = float(sent.mean()), np.where(sent, outcomes.target, outcomes.draft)
    pair, prefill = outcomes.pair, outcomes.prefill_cost
    paid = charge(
        "prefill", sent, draft=outcomes.draft_cost, target=outcomes.target_cost, prefill=prefill,
        overhead=rated.overhead.flops or 0.0,
    )  # fmt: skip
    best = curve(deferral.oracle(pair), pair)
    gain = deferral.oracle_gain(curve(rated.score, pair), best)
    seconds = _timed(recipe, draft, target, rater, sent, timed, seed)
    parts = {}
    for name in dict.fromkeys(outcomes.levels):
        here = np.array([level == name for level in outcomes.levels])
        parts[name] = {
            "share": round(float(here.mean()), 4),
            "draft": round(float(outcomes.draft[here].mean()), 4),
            "target": round(float(outcomes.target[here].mean()), 4),
            "sent": round(float(sent[here].mean()), 4),
        }
    return GateSummary(
        recipe=recipe.name,
        n=n,
        seed=seed,
        budget=budget if budget is not None else gated.policy.get("budget"),
        accuracy=float(right.mean()),
        ci95=wilson(round(float(right.sum())), n),
        accuracy_draft=float(outcomes.draft.mean()),
        accuracy_target=float(outcomes.target.mean()),
        accuracy_random=float(best.accuracy[0] + share * (best.accuracy[-1] - best.accuracy[0])),
        accuracy_oracle=float(best.at(share)),
        target_share=share,
        oracle_normalised_gain=gain if math.isfinite(gain) else None,
        cost_ratio=float(paid.mean() / outcomes.target_cost.mean()),
        time_ratio=seconds["ratio"],
        rating_overhead=seconds["rating_steps"],
        rating_steps=rated.overhead.tokens_out,
        rating_flops_share=float((rated.overhead.flops or 0.0) / prefill.mean()),
        by_part=parts,
        artifact=str(rater.facts.get("artifact", "")),
        commit=schema.commit_of_source()[0],
    )


def _timed(
    recipe: Recipe, draft: Any, target: Any, rater: Prp, sent: np.ndarray, num: int, seed: int, rounds: int = 5
) -> dict[str, float]:
    """Seconds one by one, both models in turn within a round: medians over rounds of each question."""
    num = min(num, len(sent))
    think = recipe.build("think")
    items = draw_mixture(sections(recipe)[0].mix, num, "test", seed)
    asked = {"draft": chats_of(draft, items, think), "target": chats_of(target, items, think)}
    spent: dict[str, list[list[tuple[float, float, float]]]] = {role: [[] for _ in items] for role in asked}
    steps = np.ones(num)
    with attach(draft) as small, attach(target) as large:
        for turn in range(rounds + 1):
            for i in range(num):
                for role, routed, gate in (("draft", small, rater), ("target", large, None)):
                    (wrote,), _ = roll_out(routed, [asked[role][i]], max_new_tokens=think.max_new_tokens, rater=gate)
                    if turn:  # the first round warms up
                        spent[role][i].append(wrote.seconds)
                    if role == "draft":
                        steps[i] = max(len(wrote.ids) - 1, 1)
    mid = {r: np.array([[median(part) for part in zip(*each, strict=True)] for each in spent[r]]) for r in spent}
    prefill, rating, decode = mid["draft"].T
    whole = mid["target"].sum(1)
    z = sent[:num]
    return {
        "ratio": float((prefill + rating + np.where(z, whole, decode)).sum() / whole.sum()),
        "rating_steps": float(np.median(rating) / np.median(decode / steps)),
    }


def open_pair(
    gated: GateConfig, draft: Any = None, target: Any = None, rater: Prp | None = None
) -> tuple[Any, Any, Prp]:
    """The models and the rater that a recipe names, where they are not given.

    Raises:
        ConfigError: the recipe names no rater.
        CheckpointMismatch: one of them is not there, or they do not fit.
    """
    draft = load(gated.draft, dtype=gated.dtype) if draft is None else draft
    target = load(gated.target, dtype=gated.dtype) if target is None else target
    if rater is None:
        if not gated.rater:
            raise ConfigError(
                "gate.rater names no trained rater; train one with `mmroute train prp` and set gate.rater=DIR"
            )
        bundled = Path(__file__).parent.parent / "assets" / gated.rater
        rater = Prp.load(bundled if (bundled / "rater.json").is_file() else Path(gated.rater), draft)
    return draft, target, rater
