"""A pair under one rater and one policy: what routing makes of its answers, and what that takes.

Legend: n queries.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmroute.backbones.load import bundled, load
from mmroute.bench import deferral, schema
from mmroute.bench.deferral import curve
from mmroute.bench.gate_gather import gather, rate_chats
from mmroute.bench.gate_judge import Scored, costs_of
from mmroute.bench.gate_schema import GateSummary
from mmroute.bench.gate_time import timed
from mmroute.bench.outcomes.base import Outcomes
from mmroute.bench.stats import wilson
from mmroute.errors import ConfigError
from mmroute.gate._manifest import MANIFEST, shipped
from mmroute.gate._policy import Budget, policy
from mmroute.gate._verify import TwoLooks
from mmroute.gate.base import Policy, Ratings
from mmroute.gate.prp import Prp
from mmroute.recipe import Recipe
from mmroute.train.prompts import chats_of
from mmroute.train.prp_config import GateConfig, sections

__all__ = ["absent", "by_part", "evaluate", "open_pair"]


def evaluate(
    recipe: Recipe,
    draft: Any,
    target: Any,
    rater: Prp,
    n: int,
    seed: int,
    budget: float | None = None,
    num_timed: int = 12,
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
        num_timed: questions that are timed one by one.
    """
    gated, _ = sections(recipe)
    found = gather(recipe, draft, target, n, seed, "test")
    outcomes, rated = found.outcomes, rate_chats(rater, chats_of(draft, found.items, recipe.build("think")))
    chosen = dict(gated.policy)
    if budget is not None:
        chosen = {"name": "budget", "budget": budget}
    if chosen["name"] == "budget":
        chosen.setdefault("start", rater.start(chosen.get("budget", 0.4)))
    made = policy(chosen.pop("name"), **chosen)
    ratings, looks = [rater.one(rated, i) for i in range(n)], None
    if gated.verify != "none":
        looks, again = _second_look(gated, rater, made, rated, outcomes.stats["lp_mean"])
        made = looks.first
    sent = np.array([d.route == "target" for d in made.decide_many(ratings, outcomes.ids)])
    late = np.zeros(n, dtype=bool)
    if looks is not None:
        for i in np.flatnonzero(~sent):
            late[i] = looks.decide_again(float(again[i]), outcomes.ids[i]).route == "target"
    scored = Scored("prp", rater.needs, rated.score, rated, steps=rater.steps)
    early, after = (costs_of(replace(scored, needs=needs), outcomes) for needs in (rater.needs, "answer"))
    paid = np.where(sent, early["sent_cost"], np.where(late, after["sent_cost"], early["kept_cost"]))
    sent |= late
    share, right = float(sent.mean()), np.where(sent, outcomes.target, outcomes.draft)
    pair, prefill = outcomes.pair, outcomes.prefill_cost
    best = curve(deferral.oracle(pair), pair)
    gain = deferral.oracle_gain(curve(rated.score, pair), best)
    seconds = timed(recipe, draft, target, rater, sent, num_timed, seed)
    parts = by_part(outcomes)
    for name, part in parts.items():
        part["sent"] = round(float(sent[np.array(outcomes.levels) == name].mean()), 4)
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
        second_look_share=float(late.mean()),
        oracle_normalised_gain=gain if math.isfinite(gain) else None,
        cost_ratio=float(paid.mean() / outcomes.target_cost.mean()),
        cost_ratio_draft=float(outcomes.draft_cost.mean() / outcomes.target_cost.mean()),
        time_ratio=seconds["ratio"],
        rating_overhead=seconds["rating_steps"],
        rating_steps=rated.overhead.tokens_out,
        rating_flops_share=float((rated.overhead.flops or 0.0) / prefill.mean()),
        by_part=parts,
        artifact=str(rater.facts.get("artifact", "")),
        commit=schema.commit_of_source()[0],
    )


def _second_look(
    gated: GateConfig, rater: Prp, made: Policy, rated: Ratings, lp_mean: np.ndarray
) -> tuple[TwoLooks, np.ndarray]:
    """Both looks of the recipe, and the score of the second one.

    Raises:
        ConfigError: another policy than a budget, or a rater without a fit of the second look.
    """
    verifier = rater.verifier
    if not isinstance(made, Budget):
        raise ConfigError(f"gate.verify shares a budget, and policy {made.name} keeps none; take policy budget")
    if verifier is None or rated.draft is None:
        raise ConfigError("gate.verify needs a rater with a fit of finished answers; train it with this version")
    looks = TwoLooks(made, gated.verify_share, rater.start)
    return looks, verifier.score(rated.draft, rated.target, lp_mean)


def by_part(outcomes: Outcomes) -> dict[str, dict[str, float]]:
    """Share of each part of the mixture, and what both models make of it."""
    out = {}
    for name in dict.fromkeys(outcomes.levels):
        here = np.array(outcomes.levels) == name
        columns = {"share": here, "draft": outcomes.draft[here], "target": outcomes.target[here]}
        out[name] = {column: round(float(values.mean()), 4) for column, values in columns.items()}
    return out


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
                "gate.rater names no trained rater; train one with `mmroute train prp` and set gate.rater to its "
                "folder, or to a Hub id"
            )
        rater = Prp.from_pretrained(gated.rater, draft)
    return draft, target, rater


def absent(gated: GateConfig) -> list[str]:
    """Which of draft, target and rater are neither bundled nor a folder."""
    models = [name for name in (gated.draft, gated.target) if name not in bundled() and not Path(name).is_dir()]
    is_here = shipped(gated.rater) is not None or (Path(gated.rater) / MANIFEST).is_file()
    return [*models, *([] if is_here else [gated.rater])]
