"""Deferral metrics: hand-made values, slow references, and what must hold of any outcome table."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmroute.bench import deferral
from mmroute.bench.deferral import Pair, curve
from mmroute.errors import ConfigError

SHARES = np.linspace(0, 1, 41)

outcome_tables = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        *(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=n, max_size=n) for _ in range(2)),
        st.lists(st.integers(-3, 3), min_size=n, max_size=n),
    )
)


def brute(score: np.ndarray, pair: Pair, weights: np.ndarray | None = None) -> np.ndarray:
    """Accuracy at each number of sent queries, averaged over every order of equals; weights by repeating queries."""
    times = np.ones(len(score), int) if weights is None else weights.astype(int)
    index = np.repeat(np.arange(len(score)), times)
    score, draft, gain = score[index], pair.draft[index], pair.advantage[index]
    curves = [
        np.concatenate([[0.0], np.cumsum(gain[list(order)])]) + draft.sum()
        for order in itertools.permutations(range(len(score)))
        if all(score[a] >= score[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean(curves, axis=0) / len(score)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_curve_is_the_mean_over_all_orders_of_equal_scores(weighted: bool) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        pair = Pair(*rng.integers(0, 2, size=(2, 4)).astype(float))
        score = rng.integers(0, 3, size=4).astype(float)
        weights = rng.integers(1, 3, size=4).astype(float) if weighted else None
        want = brute(score, pair, weights)
        got = curve(score, pair, weights=weights).at(np.linspace(0, 1, len(want)))
        np.testing.assert_allclose(got, want, atol=1e-12)


@given(outcome_tables)
@settings(max_examples=200, deadline=None)
def test_no_ranking_beats_the_oracle_of_advantage_at_any_share(table: tuple) -> None:
    draft, target, score = (np.array(column, float) for column in table)
    pair = Pair(draft, target)
    best = curve(deferral.oracle(pair), pair).at(SHARES)
    for other in (score, deferral.oracle(pair, "difficulty"), target, -score):
        assert (curve(other, pair).at(SHARES) <= best + 1e-12).all()


@given(outcome_tables)
@settings(max_examples=50, deadline=None)
def test_every_curve_starts_at_the_draft_ends_at_the_target_and_random_is_their_line(table: tuple) -> None:
    draft, target, score = (np.array(column, float) for column in table)
    pair = Pair(draft, target)
    made = curve(score, pair)
    assert made.at(0.0) == pytest.approx(draft.mean(), abs=1e-12)
    assert made.at(1.0) == pytest.approx(target.mean(), abs=1e-12)
    line = draft.mean() + SHARES * (target.mean() - draft.mean())
    np.testing.assert_allclose(curve(np.zeros(len(score)), pair).at(SHARES), line, atol=1e-12)


def test_the_normalised_gain_is_0_for_random_and_1_for_the_oracle() -> None:
    pair = Pair(*np.random.default_rng(1).integers(0, 2, size=(2, 200)).astype(float))
    best = curve(deferral.oracle(pair), pair)
    assert deferral.oracle_gain(best, best) == 1
    assert deferral.oracle_gain(curve(np.zeros(200), pair), best) == pytest.approx(0, abs=1e-12)
    assert deferral.oracle_gain(curve(-deferral.oracle(pair), pair), best) < 0


PAIR = Pair(np.array([1.0, 0, 0, 1]), np.array([1.0, 1, 0, 0]))
SCORE = np.array([2.0, 4, 3, 1])
"""Order: the target's win, the hopeless one, the tie, the target's loss; A = .5 .75 .75 .75 .5."""
COST = {"kept_cost": np.ones(4), "sent_cost": np.array([5.0, 5, 9, 5])}


def test_metrics_of_a_table_worked_out_by_hand() -> None:
    made = curve(SCORE, PAIR, **COST)
    np.testing.assert_allclose(made.accuracy, [0.5, 0.75, 0.75, 0.75, 0.5])
    np.testing.assert_allclose(made.cost, [1, 2, 4, 5, 6])
    assert deferral.area(made) == pytest.approx((0.625 + 0.75 + 0.75 + 0.625) / 4)
    assert deferral.gain_area(made) == pytest.approx(0.6875 - 0.5)
    assert deferral.oracle_gain(made, curve(deferral.oracle(PAIR), PAIR)) == pytest.approx(1.0)
    assert deferral.kappa(SCORE, COST["sent_cost"], 0.5) == pytest.approx(7 / 6)
    assert deferral.speed_up(made, target_cost=6.0) == pytest.approx(6.0)  # the draft alone is as good
    assert deferral.speed_up(made, target_cost=6.0, tolerance=-0.125) == pytest.approx(6 / 1.5)
    assert deferral.aiq(made) == pytest.approx((0.625 * 1 + 0.75 * 4) / 5)
    assert deferral.aiq(made, compat=True) == pytest.approx((0.625 * 1 + 0.75 * 4) / 6)
    assert deferral.aiq(made, top=11.0) == pytest.approx((0.625 * 1 + 0.75 * 9) / 10)
    assert deferral.nauc(made) == pytest.approx((0.625 * 1 + 0.75 * 4) / 5)
    assert deferral.qnc(made, 0.75, 6.0) == pytest.approx(2 / 6)
    assert deferral.qnc(made, 0.8, 6.0) == np.inf


def test_recovered_gap_and_the_calls_it_takes() -> None:
    pair = Pair(np.array([0.0, 0, 1, 0]), np.array([1.0, 1, 1, 0]))
    made = curve(np.array([4.0, 3, 2, 1]), pair)
    np.testing.assert_allclose(deferral.pgr(made, np.array([0, 0.25, 0.5, 1])), [0, 0.5, 1, 1])
    assert deferral.cpt(made, 0.75) == pytest.approx(0.375)
    assert deferral.cpt(made, 1.0) == pytest.approx(0.5)
    assert deferral.cpt(made, 1.1) == np.inf
    assert deferral.apgr(made) == pytest.approx(np.mean([0.1, 0.3, 0.5, 0.7, 0.9, 1, 1, 1, 1, 1]))


def test_rank_score_is_accuracy_times_cheapness_and_bounded() -> None:
    assert deferral.rank_score(0.8, 1.0, 1.0, 16.0) == pytest.approx(1.1 * 0.8 / 1.08)
    assert deferral.rank_score(0.8, 4.0, 1.0, 16.0) == pytest.approx(1.1 * 0.8 * 0.5 / (0.08 + 0.5))
    assert deferral.rank_score(0.8, 99.0, 1.0, 16.0) == 0
    with pytest.raises(ConfigError, match="bounds"):
        deferral.rank_score(0.8, 1.0, 2.0, 2.0)


def test_lift_is_0_where_cost_buys_as_much_as_mixing() -> None:
    made = curve(np.zeros(4), PAIR, kept_cost=np.ones(4), sent_cost=np.full(4, 3.0))
    pair = Pair(np.zeros(4), np.ones(4))
    made = curve(np.zeros(4), pair, kept_cost=np.ones(4), sent_cost=np.full(4, 3.0))
    assert deferral.lift(made, 0.5) == pytest.approx(0)
    dear = curve(np.array([2.0, 2, 1, 1]), pair, kept_cost=np.ones(4), sent_cost=np.array([5.0, 5, 1, 1]))
    assert deferral.lift(dear, 0.5) == pytest.approx(-0.5)


def test_intervals_cover_and_grouped_queries_widen_them() -> None:
    rng = np.random.default_rng(0)
    draft = np.repeat(rng.integers(0, 2, 50), 4).astype(float)
    pair = Pair(draft, np.repeat(rng.integers(0, 2, 50), 4).astype(float), np.repeat(np.arange(50), 4).tolist())
    measure = lambda curves: {"at": float(curves[0].at(0.4))}
    score = np.repeat(rng.normal(size=50), 4)
    grouped = deferral.resampled([score], pair, measure, resamples=300)["at"]
    single = deferral.resampled([score], Pair(pair.draft, pair.target), measure, resamples=300)["at"]
    assert grouped.diff == single.diff == pytest.approx(measure([curve(score, pair)])["at"])
    assert grouped.low <= grouped.diff <= grouped.high
    assert grouped.high - grouped.low > 1.5 * (single.high - single.low)  # 4 alike: twice as wide


def test_resampling_by_weights_is_drawing_whole_groups() -> None:
    rng = np.random.default_rng(3)
    pair = Pair(*rng.integers(0, 2, size=(2, 12)).astype(float), np.repeat(np.arange(4), 3).tolist())
    score = rng.normal(size=12)
    measure = lambda curves: {"area": deferral.area(curves[0])}
    got = deferral.resampled([score], pair, measure, resamples=50, seed=7)["area"]
    drawn, draws = [], np.random.default_rng(7)
    for _ in range(50):
        index = np.concatenate([np.arange(3 * g, 3 * g + 3) for g in draws.integers(0, 4, 4)])
        drawn.append(deferral.area(curve(score[index], Pair(pair.draft[index], pair.target[index]))))
    np.testing.assert_allclose([got.low, got.high], np.quantile(drawn, [0.025, 0.975]), atol=1e-12)


def test_four_kinds_of_queries_tell_the_rankings_apart() -> None:
    """Perfect difficulty loses to random, the target's rating alone wastes calls, the advantage does neither."""
    kinds = [(50, 0.90, 0.95, 1.0), (20, 0.20, 0.85, 1.0), (20, 0.10, 0.15, 2.0), (10, 0.80, 0.60, 1.0)]
    draft, target, cost = (np.concatenate([np.full(k[0], k[i]) for k in kinds]) for i in (1, 2, 3))
    pair = Pair(draft, target)
    assert (draft.mean(), target.mean()) == pytest.approx((0.590, 0.735))
    costs = {"kept_cost": np.full(100, 0.05 + 0.003), "sent_cost": cost + 0.003}
    scores = {"random": np.zeros(100), "hardest": 1 - draft, "target": target, "advantage": target - draft}
    made = {name: curve(score, pair, **costs) for name, score in scores.items()}
    at = {name: [round(float(c.at(b)), 3) for b in (0.2, 0.4)] for name, c in made.items()}
    assert at == {
        "random": [0.619, 0.648],
        "hardest": [0.6, 0.73],
        "target": [0.6, 0.61],
        "advantage": [0.72, 0.73],
    }
    assert deferral.kappa(scores["hardest"], cost, 0.2) == pytest.approx(2 / 1.2)
    assert deferral.kappa(scores["advantage"], cost, 0.2) == pytest.approx(1 / 1.2)
    assert made["hardest"].cost_at(0.2) > made["advantage"].cost_at(0.2)


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ConfigError, match="same queries"):
        Pair(np.ones(3), np.ones(2))
    with pytest.raises(ConfigError, match=r"number in \[0, 1\]"):
        Pair(np.array([np.nan]), np.ones(1))
    with pytest.raises(ConfigError, match="as many scores"):
        curve(np.array([np.nan, 1]), Pair(np.ones(2), np.ones(2)))
    with pytest.raises(ConfigError, match="no costs"):
        curve(np.ones(1), Pair(np.ones(1), np.ones(1))).cost_at(0.5)


def test_who_knows_the_kinds_is_below_the_oracle_and_sees_no_querys_own_outcome() -> None:
    rng = np.random.default_rng(5)
    kinds = rng.integers(0, 3, 400)
    pair = Pair(
        (rng.random(400) < np.array([0.9, 0.2, 0.5])[kinds]).astype(float),
        (rng.random(400) < np.array([0.9, 0.9, 0.1])[kinds]).astype(float),
        np.repeat(np.arange(100), 4).tolist(),
    )
    names = [str(kind) for kind in kinds]
    score = deferral.attainable(pair, names)
    best = curve(deferral.oracle(pair), pair)
    assert 0.4 < deferral.oracle_gain(curve(score, pair), best) < 0.95
    other = pair.draft.copy()
    other[:4] = 1 - other[:4]  # the first group's own outcomes move no score of that group
    again = deferral.attainable(Pair(other, pair.target, pair.groups), names)
    np.testing.assert_array_equal(again[:4], score[:4])
    assert (again[4:] != score[4:]).any()
    # a kind that only one group has says what all others say
    alone = deferral.attainable(pair, ["x"] * 4 + ["y"] * 396)
    assert alone[0] == pytest.approx(pair.advantage[4:].mean())
