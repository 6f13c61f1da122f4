"""What a gate is worth on a pair's outcomes: its scores, its curves by share and by charged cost, its calibration.

Fits never see the queries they are judged on. A gate whose evidence is missing is skipped by name.

Legend: n queries.
"""

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from mmroute import hub
from mmroute.bench import deferral, reliability
from mmroute.bench.deferral import Curve, Pair, curve
from mmroute.bench.outcomes.base import Outcomes, split_of_group
from mmroute.config import options
from mmroute.errors import ConfigError, InputError
from mmroute.gate._policy import policy
from mmroute.gate.base import Continuation, Evidence, Gate, Known, Prefill, Query, Rating, Ratings, charge

__all__ = ["Case", "Judged", "Scored", "evidence_of", "judge", "judge_table", "score_gates"]

log = logging.getLogger(__name__)

BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ON_DRAFT = 0.4
"""Share of target calls at "60 % on the draft"."""
Array = Float[np.ndarray, " n"]


@options
class Case:
    """One gate of a comparison."""

    name: str
    """Of the gate."""
    label: str = ""
    """What tables call it; the name if not given."""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return self.label or self.name


# ---------------------------------------------------------------------- scores


@dataclass(frozen=True)
class Scored:
    """One gate's scores of the judged queries."""

    title: str
    needs: str
    score: Array
    ratings: Ratings | None = None
    samples: int = 1
    asked: float = 0.0
    """Mean cost of questions besides, per query."""
    skipped: str = ""
    """Why there is no score."""


def evidence_of(
    outcomes: Outcomes,
    prefill: dict[str, Prefill] | None = None,
    last: dict[str, np.ndarray] | None = None,
    sampled: dict[str, list[str]] | None = None,
    replies: dict[str, dict[str, float]] | None = None,
) -> list[Evidence]:
    """What gates may look at, from a table and from what was kept beside it.

    Args:
        outcomes: the pair.
        prefill: the draft's states after the prompt, by query id.
        last: its state after the answer.
        sampled: labels of its sampled answers.
        replies: to questions besides, by query id; `NAME.flops` is what the reply to NAME took.
    """
    out = []
    for i, name in enumerate(outcomes.ids):
        stats = {key: float(values[i]) for key, values in outcomes.stats.items() if not math.isnan(values[i])}
        answer = Continuation(label=outcomes.labels[i][0], stats=stats, last=(last or {}).get(name)) if stats else None
        labels = (sampled or {}).get(name) or (outcomes.labels[i] if len(outcomes.labels[i]) > 1 else [])
        query = Query(
            name,
            task=outcomes.tasks[i],
            level=outcomes.levels[i],
            group=outcomes.groups[i],
            prompt_tokens=int(outcomes.prompt_tokens[i]),
            image_tokens=int(outcomes.image_tokens[i]),
            text=outcomes.texts[i],
            pixels=outcomes.pixels[i],
        )
        out.append(
            Evidence(
                query,
                session=(prefill or {}).get(name),
                early=answer,
                answer=answer,
                samples=[Continuation(label=label) for label in labels],
                replies=(replies or {}).get(name, {}),
                outcome=Known(float(outcomes.draft[i]), float(outcomes.target[i])),
            )
        )
    return out


def score_gates(cases: Iterable[Case], train: Sequence[Evidence], test: Sequence[Evidence]) -> list[Scored]:
    """Every gate's scores; trained ones are fitted on `train`."""
    out = []
    for case in cases:
        gate: Gate = hub.load("gate", case.name, **case.options)
        samples = len(test[0].samples) if gate.needs == "samples" else 1
        try:
            if gate.trained:
                gate.fit(train)
            rated = gate.rate(test)
        except (InputError, ConfigError) as error:
            log.info("%s is skipped: %s", case.title, error)
            out.append(Scored(case.title, gate.needs, np.zeros(0), skipped=str(error)))
            continue
        asked = sum(float(np.mean([e.replies.get(f"{q.name}.flops", 0.0) for e in test])) for q in gate.questions)
        out.append(Scored(case.title, gate.needs, rated.score, rated, max(samples, 1), asked))
    return out


# ---------------------------------------------------------------------- metrics


@dataclass(frozen=True)
class Judged:
    """What one gate is worth."""

    title: str
    needs: str
    figures: dict[str, float | None]
    at: dict[str, float]
    """Accuracy by share of target calls."""
    ratings: dict[str, dict[str, float | None]]
    """Calibration of each rating."""
    curve: dict[str, list[float]]
    intervals: dict[str, tuple[float | None, float | None]]
    skipped: str = ""


def judge(scored: Scored, outcomes: Outcomes, rival: Array | None = None, resamples: int = 500) -> Judged:
    """All figures of one ranking.

    Args:
        scored: the ranking.
        outcomes: the pair.
        rival: another ranking of the same queries, for paired intervals of what this one gains on it.
        resamples: drawn sets of groups.
    """
    if scored.skipped:
        return Judged(scored.title, scored.needs, {}, {}, {}, {}, {}, scored.skipped)
    pair = outcomes.pair
    score = np.clip(scored.score, -1e9, 1e9)
    costs = _costs(scored, outcomes)
    made = curve(score, pair, **costs)
    best = curve(deferral.oracle(pair), pair, kept_cost=outcomes.draft_cost, sent_cost=outcomes.target_cost)
    target = float(outcomes.target_cost.mean())
    policy_share = [
        d.route == "target"
        for d in policy("budget", budget=ON_DRAFT).decide_many([Rating(float(u)) for u in score], outcomes.ids)
    ]
    a, c = float(made.at(ON_DRAFT)), float(made.cost_at(ON_DRAFT))
    bounds = (float(outcomes.draft_cost.mean()), target)
    figures: dict[str, float] = {
        "ong": deferral.oracle_gain(made, best),
        "area": deferral.area(made),
        "apgr": deferral.apgr(made),
        "cpt50": deferral.cpt(made, 0.5),
        "cpt80": deferral.cpt(made, 0.8),
        "accuracy_at_40": a,
        "gain_on_target_at_40": a - float(made.accuracy[-1]),
        "best_gain_on_target": float(made.accuracy.max() - made.accuracy[-1]),
        "kappa_at_40": deferral.kappa(score, outcomes.target_cost, ON_DRAFT),
        "cost_ratio_at_40": c / target,
        "speed_up_lossless": deferral.speed_up(made, target),
        "speed_up_half_point": deferral.speed_up(made, target, 0.005),
        "aiq": deferral.aiq(made, top=float(best.cost_at(1.0))),
        "nauc": deferral.nauc(made),
        "qnc": deferral.qnc(made, max(float(made.accuracy[0]), float(made.accuracy[-1])), target),
        "rank_score_at_40": deferral.rank_score(a, c, *bounds) if 0 < bounds[0] < bounds[1] else math.nan,
        "realised_share": float(np.mean(policy_share)),
        "tie_rate": reliability.tie_rate(score),
        "spearman_advantage": reliability.spearman(score, pair.advantage),
        "auroc_only_target": reliability.auroc(score, pair.target * (1 - pair.draft)),
    }
    intervals: dict[str, tuple[float | None, float | None]] = {}
    if resamples:
        ong = lambda curves: deferral.oracle_gain(curves[0], curves[1])  # noqa: E731
        found = deferral.resampled([score, deferral.oracle(pair)], pair, ong, resamples=resamples)
        intervals["ong"] = (_finite(found.low), _finite(found.high))
        over = lambda curves: float(curves[0].at(ON_DRAFT) - curves[0].accuracy[-1])  # noqa: E731
        found = deferral.resampled([score], pair, over, resamples=resamples)
        intervals["gain_on_target_at_40"] = (_finite(found.low), _finite(found.high))
        if rival is not None:
            lead = lambda curves: deferral.area(curves[0]) - deferral.area(curves[1])  # noqa: E731
            found = deferral.resampled([rival, score], pair, lead, resamples=resamples)
            intervals["rival_area_lead"] = (_finite(found.low), _finite(found.high))
    return Judged(
        scored.title,
        scored.needs,
        {name: _finite(value) for name, value in figures.items()},
        {f"{b:.1f}": float(made.at(b)) for b in BUDGETS},
        _reliability(scored.ratings, pair),
        _points(made),
        intervals,
    )


def _costs(scored: Scored, outcomes: Outcomes) -> dict[str, Array]:
    """What each query costs if it is kept and if it is sent."""
    n = len(outcomes)
    overhead = 0.0
    if scored.ratings is not None and outcomes.unit == "flops":
        overhead = (scored.ratings.overhead.flops or 0.0) + scored.asked
    if scored.needs in ("prefill", "early", "samples") and np.isnan(outcomes.prefill_cost).any():
        raise InputError(
            f"{scored.title} is charged the draft's prefill, whose {outcomes.unit} the table does not know"
        )
    prefill = np.nan_to_num(outcomes.prefill_cost)
    per_step = (outcomes.draft_cost - prefill) / np.maximum(outcomes.stats.get("tokens", np.full(n, 32.0)), 1)
    given = {
        "draft": outcomes.draft_cost,
        "target": outcomes.target_cost,
        "prefill": prefill,
        "overhead": overhead,
        "early": 8 * per_step,
        "samples": scored.samples,
    }
    kept, sent = (charge(scored.needs, np.full(n, route), **given) for route in (False, True))  # type: ignore[arg-type]
    return {"kept_cost": kept, "sent_cost": sent}


def _reliability(ratings: Ratings | None, pair: Pair) -> dict[str, dict[str, float | None]]:
    out: dict[str, dict[str, float | None]] = {}
    if ratings is None:
        return out
    for name, rating, success in (("draft", ratings.draft, pair.draft), ("target", ratings.target, pair.target)):
        if rating is not None:
            found = reliability.reliability(np.clip(rating, 0, 1), success).to_dict()
            out[name] = {key: _finite(value) for key, value in found.items()}
    for name, probs in (("draft", ratings.draft_probs), ("target", ratings.target_probs)):
        if probs is not None:
            out[name] |= asdict(reliability.collapse(probs))
    return out


def _points(made: Curve, num: int = 41) -> dict[str, list[float]]:
    """The curve at even shares: what is drawn and stored."""
    share = np.linspace(0, 1, num)
    columns = {"share": share, "accuracy": made.at(share), "cost": made.cost_at(share)}
    return {name: [round(float(v), 6) for v in values] for name, values in columns.items()}


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


# ---------------------------------------------------------------------- somebody's table

OFFLINE = (
    Case(name="random"),
    Case(name="length", label="length of the text"),
    Case(name="difficulty"),
    Case(name="hybrid"),
    Case(name="knn"),
    Case(name="oracle", label="oracle difficulty", options={"by": "difficulty"}),
    Case(name="oracle", label="oracle advantage"),
)


def judge_table(outcomes: Outcomes, resamples: int = 500) -> list[Judged]:
    """Every gate that a bare table has evidence for, and the routers whose scores it holds.

    Fitted is on rows of the split `train` where the table names one, else on half of the groups; judged is the rest.

    Raises:
        InputError: no rows are left to judge.
    """
    named = np.array([split == "train" for split in outcomes.splits])
    half = np.array([split_of_group(g, (("train", 0.5), ("test", 0.5))) == "train" for g in outcomes.groups])
    train = named if named.any() and not named.all() else half
    if train.all() or not train.any():
        raise InputError(f"the table's {len(outcomes)} queries are of one group, so none is left to judge")
    everything = evidence_of(outcomes)
    cases = list(OFFLINE)
    if outcomes.stats:
        cases[2:2] = [
            Case(name="logprob", label=f"log-probability {s}", options={"stat": s}) for s in ("mean", "quantile")
        ]
    test = outcomes.take(~train)
    scored = score_gates(
        cases,
        [e for e, is_train in zip(everything, train, strict=True) if is_train],
        [e for e, is_train in zip(everything, train, strict=True) if not is_train],
    )
    scored += [Scored(name, "nothing", values) for name, values in test.scores.items()]
    return [judge(each, test, resamples=resamples) for each in scored]
