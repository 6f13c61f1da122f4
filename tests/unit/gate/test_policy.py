"""Policies: shares hold, forced requests move nothing, and the fast window equals a slow one."""

import subprocess
import sys

import numpy as np
import pytest

from mmroute.errors import ConfigError
from mmroute.gate._policy import Batch, Budget, MicroBatch, Shadow, hash01, policy
from mmroute.gate.base import Cost, Rating, charge, score_of


def ratings(scores: np.ndarray) -> list[Rating]:
    return [Rating(float(u)) for u in scores]


def shares(decisions: list, width: int = 1000) -> np.ndarray:
    sent = np.array([d.route == "target" for d in decisions])
    return np.array([sent[i : i + width].mean() for i in range(0, len(sent) - width + 1, 100)])


class SlowBudget:
    """The rule of the specification, with numpy on plain lists."""

    def __init__(self, b: float, window: int, gain: float, warmup: int, start: float) -> None:
        self.b, self.window, self.gain, self.warmup, self.start = b, window, gain, warmup, start
        self.scores: list[float] = []
        self.sent: list[bool] = []

    def decide(self, u: float, key: str) -> bool:
        w, z = self.scores[-self.window :], self.sent[-self.window :]
        if len(self.scores) < self.warmup:
            sent = u > self.start
        else:
            b = min(1.0, max(0.0, self.b + self.gain * (self.b - np.mean(z))))
            tau = np.quantile(w, 1 - b)
            above, tied = np.mean(np.array(w) > tau), np.mean(np.array(w) == tau)
            sent = u > tau or (u == tau and hash01(key) < (b - above) / tied)
        self.scores.append(u)
        self.sent.append(bool(sent))
        return bool(sent)


@pytest.mark.parametrize("ties", [None, 2])
def test_the_window_decides_as_a_slow_one_does(ties: int | None) -> None:
    rng = np.random.default_rng(3)
    scores = rng.normal(size=600)
    if ties:
        scores = np.round(scores * ties) / ties
    fast = Budget(budget=0.3, window=64, start=0.5)
    slow = SlowBudget(0.3, 64, 2.0, 32, 0.5)
    got = [fast.decide(Rating(float(u)), key=str(i)).route == "target" for i, u in enumerate(scores)]
    assert got == [slow.decide(float(u), str(i)) for i, u in enumerate(scores)]


def test_the_asked_share_is_kept_on_steady_traffic() -> None:
    decisions = Budget(budget=0.3).decide_many(ratings(np.random.default_rng(0).normal(size=6000)), keys(6000))
    assert abs(shares(decisions) - 0.3).max() < np.sqrt(np.log(2 / 0.05) / 2 / 1000)  # the DKW band of a window


def test_the_share_returns_within_two_windows_after_a_shift() -> None:
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(size=3000), rng.normal(1.0, size=4000)])
    found = Budget(budget=0.3).decide_many(ratings(scores), keys(7000))
    after = np.mean([d.route == "target" for d in found[3000 + 2 * 512 :]])
    assert abs(after - 0.3) < 0.02


def test_a_score_full_of_ties_still_keeps_the_share() -> None:
    scores = np.round(np.random.default_rng(2).normal(size=6000))
    found = shares(Budget(budget=0.3).decide_many(ratings(scores), keys(6000)))
    assert abs(found[5:] - 0.3).max() < 0.05


@pytest.mark.parametrize(("budget", "route"), [(0.0, "draft"), (1.0, "target")])
def test_all_and_nothing_are_exact(budget: float, route: str) -> None:
    scores = np.random.default_rng(0).normal(size=200)
    assert {d.route for d in Budget(budget=budget).decide_many(ratings(scores), keys(200))} == {route}
    assert {d.route for d in MicroBatch(budget=budget).decide_many(ratings(scores), keys(200))} == {route}


def test_forced_and_unrated_requests_do_not_enter_the_window() -> None:
    plain, disturbed = Budget(budget=0.4), Budget(budget=0.4)
    scores = np.random.default_rng(5).normal(size=300)
    for i, u in enumerate(scores):
        disturbed.decide(Rating(99.0), key="x", force="target")
        assert disturbed.decide(None).reason == "unrated"
        disturbed.decide_at(Rating(99.0), 0.9)
        assert plain.decide(Rating(u), key=str(i)) == disturbed.decide(Rating(u), key=str(i))


def test_another_budget_uses_the_live_window() -> None:
    made = Budget(budget=0.4)
    made.decide_many(ratings(np.linspace(0, 1, 200)), keys(200))
    assert made.decide_at(Rating(0.85), 0.2).route == "target"
    assert made.decide_at(Rating(0.75), 0.2).route == "draft"


def test_at_most_spends_nothing_where_the_target_gains_nothing() -> None:
    made = Budget(budget=0.5, spend="at_most")
    found = made.decide_many(ratings(np.linspace(-2, -1, 100)), keys(100))
    assert {d.route for d in found[32:]} == {"draft"}


def test_micro_batches_send_their_best_and_keep_the_share_to_one_request() -> None:
    rng, made, sent, seen = np.random.default_rng(0), MicroBatch(budget=0.3), 0, 0
    for size in rng.integers(1, 17, size=200):
        scores = rng.normal(size=size)
        found = made.decide_many(ratings(scores), keys(int(size)))
        to_target = np.array([d.route == "target" for d in found])
        if to_target.any() and not to_target.all():
            assert scores[to_target].min() >= scores[~to_target].max()
        sent, seen = sent + int(to_target.sum()), seen + int(size)
        assert abs(sent - 0.3 * seen) <= 1


def test_no_request_waits_longer_than_the_limit() -> None:
    rng, waiting = np.random.default_rng(0), Batch(max_n=4, max_wait_s=0.02)
    arrivals = np.cumsum(rng.exponential(0.01, size=500))
    longest, done = 0.0, 0
    for now in arrivals:
        if waiting.deadline is not None and waiting.deadline <= now:
            at = waiting.deadline
            batch = waiting.due(at) or []
            longest, done = max([longest, *(at - t for t in batch)]), done + len(batch)
        batch = waiting.add(now, now) or []
        longest, done = max([longest, *(now - t for t in batch)]), done + len(batch)
    assert longest <= 0.02 + 1e-12
    assert done + len(waiting.due(1e9) or []) == 500


def test_a_shadow_decides_and_acts_as_told() -> None:
    made = policy("threshold", threshold=0.0, shadow=True, shadow_acts="draft")
    assert isinstance(made, Shadow)
    found = made.decide(Rating(1.0))
    assert (found.route, found.shadow, found.threshold) == ("draft", "target", 0.0)
    assert made.decide(Rating(1.0), force="target").route == "target"
    assert [d.shadow for d in made.decide_many(ratings(np.array([1.0, -1.0])))] == ["target", "draft"]


@pytest.mark.parametrize(
    ("draft", "target", "route"),
    [(0.9, 0.95, "draft"), (0.5, 0.85, "target"), (0.3, 0.4, "target"), (0.4, 0.3, "draft"), (0.8, 0.1, "draft")],
)
def test_a_promise_takes_the_cheaper_model_that_keeps_it(draft: float, target: float, route: str) -> None:
    assert policy("sla", min_success=0.8).decide(Rating(0.0, draft, target, 0.1, 1.0)).route == route


def test_utility_buys_what_is_worth_its_price() -> None:
    made = policy("utility", weight=0.5)
    assert made.decide(Rating(0.4, draft_cost=0.5, target_cost=1.0)).route == "target"
    assert made.decide(Rating(0.4, draft_cost=0.1, target_cost=1.0)).route == "draft"


def test_wrong_policies_are_refused_with_what_is_allowed() -> None:
    with pytest.raises(ConfigError, match="one of always, budget"):
        policy("bugdet")
    with pytest.raises(ConfigError, match="less than or equal to 1"):
        policy("budget", budget=1.3)
    with pytest.raises(ConfigError, match="needs both ratings"):
        policy("sla").decide(Rating(0.5))


def test_scores_rank_as_their_names_say() -> None:
    draft, target = np.array([0.9, 0.2, 0.1, 0.8]), np.array([0.95, 0.85, 0.15, 0.6])
    assert score_of("draft", draft, None).argmax() == 2
    assert score_of("target", draft, target).argmax() == 0
    assert score_of("advantage", draft, target).argmax() == score_of("joint", draft, target).argmax() == 1
    assert score_of("advantage", draft, target, cost_weight=2.0, cost_gap=np.array([0, 1, 0.1, 0])).argmax() == 0
    with pytest.raises(ConfigError, match="needs a rating of the target"):
        score_of("advantage", draft, None)


def test_every_kind_of_gate_pays_for_what_it_looked_at() -> None:
    sent = np.array([False, True])
    three, ten, one = np.full(2, 3.0), np.full(2, 10.0), np.ones(2)
    paid = {
        needs: charge(needs, sent, draft=three, target=ten, prefill=one, overhead=0.5, early=0.25, samples=4).tolist()
        for needs in COSTS
    }
    assert paid == COSTS


COSTS = {
    "nothing": [3.5, 10.5],
    "prefill": [3.5, 11.5],
    "early": [3.5, 11.75],
    "answer": [3.5, 13.5],
    "samples": [9.5, 19.5],
}


def keys(n: int) -> list[str]:
    return [f"request-{i}" for i in range(n)]


def test_ids_are_spread_evenly() -> None:
    values = sorted(hash01(k) for k in keys(2000))
    gaps = [abs(v - (i + 0.5) / 2000) for i, v in enumerate(values)]
    assert max(gaps) < 0.04  # the DKW band of 2000 draws at 99.8 %


def test_a_gateway_can_decide_without_torch() -> None:
    code = "import sys, mmroute.gate._policy; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_unknown_stays_unknown_in_sums() -> None:
    total = Cost(calls=1, tokens_out=2, flops=3.0, seconds=None) + Cost(calls=1, tokens_in=5, flops=1.0)
    assert total == Cost(calls=2, tokens_in=5, tokens_out=2, flops=4.0, seconds=None)
