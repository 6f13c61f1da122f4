"""What a gate is worth on a pair's outcomes: its scores, its curves by share and by charged cost, its calibration.

Fits never see the queries they are judged on. A gate whose evidence is missing is skipped by name.

Legend: n queries.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from mmroute import hub
from mmroute.bench import deferral, reliability
from mmroute.bench.deferral import Curve, Pair, curve
from mmroute.bench.gate_schema import Intervals, Judged
from mmroute.bench.outcomes.base import Outcomes, split_of_group
from mmroute.config import options
from mmroute.errors import ConfigError, InputError
from mmroute.gate._policy import Budget
from mmroute.gate._verify import TwoLooks, entered
from mmroute.gate.base import Continuation, Evidence, Gate, Known, Prefill, Query, Rating, Ratings, charge

__all__ = ["BUDGETS", "ON_DRAFT", "Case", "Scored", "costs_of", "evidence_of", "judge", "judge_table", "score_gates"]

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
    steps: int = 0
    """First steps of the draft that were looked at, of `early`."""
    asked: float = 0.0
    """Mean cost of questions besides, per query."""
    second: Array | None = None
    """Score of a second look at the draft's finished answers, which some of the queries that are sent get."""
    verify_share: float = 0.0
    """Part of every budget that the second look has."""
    skipped: str = ""
    """Why there is no score."""

    def take(self, index: np.ndarray) -> "Scored":
        """These queries only, by mask."""
        if self.skipped:
            return self
        part: dict[str, Any] = {
            name: None if (v := getattr(self.ratings, name, None)) is None else v[index] for name in _COLUMNS
        }
        ratings = None if self.ratings is None else replace(self.ratings, **part)
        second = None if self.second is None else self.second[index]
        return replace(self, score=self.score[index], ratings=ratings, second=second)


_COLUMNS = ("score", "draft", "target", "draft_probs", "target_probs")


def evidence_of(
    outcomes: Outcomes,
    prefill: dict[str, Prefill] | None = None,
    last: dict[str, np.ndarray] | None = None,
    sampled: dict[str, list[str]] | None = None,
    replies: dict[str, dict[str, float]] | None = None,
    answers: dict[str, str] | None = None,
) -> list[Evidence]:
    """What gates may look at, from a table and from what was kept beside it.

    Args:
        outcomes: the pair.
        prefill: the draft's states after the prompt, by query id.
        last: its state after the answer.
        sampled: labels of its sampled answers.
        replies: to questions besides, by query id; `NAME.flops` is what the reply to NAME took.
        answers: what the draft wrote.
    """
    out = []
    for i, name in enumerate(outcomes.ids):
        stats = {key: float(values[i]) for key, values in outcomes.stats.items() if not math.isnan(values[i])}
        answer = None
        if stats:
            text = (answers or {}).get(name, "")
            answer = Continuation(text, outcomes.labels[i][0], stats, last=(last or {}).get(name))
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
        out.append(Scored(case.title, gate.needs, rated.score, rated, max(samples, 1), gate.steps, asked))
    return out


# ---------------------------------------------------------------------- metrics


def judge(
    scored: Scored,
    outcomes: Outcomes,
    rival: Array | None = None,
    resamples: int = 500,
    start: Mapping[float, float | None] | None = None,
) -> Judged:
    """All figures of one ranking.

    Args:
        scored: the ranking.
        outcomes: the pair.
        rival: another ranking of the same queries, for paired intervals of what that one gains on this.
        resamples: drawn sets of groups; 0 gives no intervals.
        start: by share of target calls, the threshold of a budget policy's first decisions.
    """
    if scored.skipped:
        return Judged(
            title=scored.title, needs=scored.needs, figures={}, at={}, realised={}, ratings={}, intervals={}, curve={},
            skipped=scored.skipped,
        )  # fmt: skip
    pair = outcomes.pair
    score, made = _ranked(scored, outcomes)
    best = curve(deferral.oracle(pair), pair, kept_cost=outcomes.draft_cost, sent_cost=outcomes.target_cost)
    target = float(outcomes.target_cost.mean())
    a, c = float(made.at(ON_DRAFT)), float(made.cost_at(ON_DRAFT))
    bounds = (float(outcomes.draft_cost.mean()), target)
    realised = {f"{b:.1f}": _realised(scored, score, outcomes.ids, b, (start or {}).get(b)) for b in BUDGETS}
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
        "realised_off": max(abs(share - float(b)) for b, share in realised.items()),
        "tie_rate": reliability.tie_rate(score),
        "spearman_advantage": reliability.spearman(score, pair.advantage),
        "auroc_only_target": reliability.auroc(score, pair.target * (1 - pair.draft)),
    }
    return Judged(
        title=scored.title,
        needs=scored.needs,
        figures={name: _finite(value) for name, value in figures.items()},
        at={f"{b:.1f}": float(made.at(b)) for b in BUDGETS},
        realised=realised,
        ratings=_reliability(scored.ratings, pair),
        intervals=_intervals(score, rival, pair, resamples) if resamples else {},
        curve=_points(made),
    )


def _ranked(scored: Scored, outcomes: Outcomes) -> tuple[Array, Curve]:
    """By what queries are sent, and the curve of that."""
    # Who is unrated is on the safe side: the target.
    score = np.clip(np.nan_to_num(scored.score, nan=np.inf), -1e9, 1e9)
    if scored.second is None:
        return score, curve(score, outcomes.pair, **costs_of(scored, outcomes))
    order, counts = entered(score, scored.second, scored.verify_share)
    by_first = np.argsort(-score, kind="stable")
    early, late = (costs_of(replace(scored, needs=needs), outcomes) for needs in (scored.needs, "answer"))
    # Sent by the second look, a query has cost its draft's answer; sent by the first, it has not.
    spared = np.concatenate([[0.0], np.cumsum((early["sent_cost"] - late["sent_cost"])[by_first])])
    sent = np.concatenate([[0.0], np.cumsum((late["sent_cost"] - late["kept_cost"])[order])])
    rank = np.empty(len(score))
    rank[order] = -np.arange(len(score))
    cost = (late["kept_cost"].sum() + sent + spared[counts]) / len(score)
    return rank, replace(curve(rank, outcomes.pair), cost=cost)


def _realised(scored: Scored, score: Array, ids: Sequence[str], budget: float, start: float | None) -> float:
    """Share that the live policy sends, in the order of arrival."""
    given: dict[str, Any] = {"budget": budget} if start is None else {"budget": budget, "start": start}
    made = Budget(**given)
    if scored.second is None:
        decisions = made.decide_many([Rating(float(u)) for u in score], ids)
        return float(np.mean([decision.route == "target" for decision in decisions]))
    looks, sent = TwoLooks(made, scored.verify_share), 0
    for u, again, key in zip(scored.score, scored.second, ids, strict=True):
        first = looks.first.decide(Rating(float(u)), key=key)
        sent += (first if first.route == "target" else looks.decide_again(float(again), key)).route == "target"
    return sent / len(ids)


def _intervals(score: Array, rival: Array | None, pair: Pair, resamples: int) -> Intervals:
    """Of the figures that claims rest on; every one from the same drawn groups."""

    def measure(curves: Sequence[Curve]) -> dict[str, float]:
        own, best = curves[:2]
        found = {
            "ong": deferral.oracle_gain(own, best),
            "gain_on_target_at_40": float(own.at(ON_DRAFT) - own.accuracy[-1]),
        }
        if rival is not None:
            found["rival_area_lead"] = deferral.area(curves[2]) - deferral.area(own)
            found |= {f"rival_lead_at_{b:.1f}": float(curves[2].at(b) - own.at(b)) for b in BUDGETS}
        return found

    scores = [score, deferral.oracle(pair), *([] if rival is None else [rival])]
    made = deferral.resampled(scores, pair, measure, resamples=resamples)
    return {name: (_finite(each.low), _finite(each.high)) for name, each in made.items()}


def costs_of(scored: Scored, outcomes: Outcomes) -> dict[str, Array]:
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
    written = np.maximum(outcomes.stats.get("tokens", np.full(n, 32.0)), 1)
    per_step = (outcomes.draft_cost - prefill) / written
    given = {
        "draft": outcomes.draft_cost,
        "target": outcomes.target_cost,
        "prefill": prefill,
        "overhead": overhead,
        "early": np.minimum(scored.steps, written) * per_step,
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
