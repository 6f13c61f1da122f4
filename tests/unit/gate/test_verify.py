"""Two looks at a budget: who is sent by which, counted by hand, and shares that hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmroute.errors import ConfigError
from mmroute.gate._policy import Budget
from mmroute.gate._verify import TwoLooks, Verifier, entered, shares
from mmroute.gate.base import Rating

SCORES = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=25)


@given(SCORES, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_queries_enter_one_by_one_and_are_those_of_both_looks_at_every_budget(scores: list, share: float) -> None:
    first, second = (np.array(column) for column in zip(*scores, strict=True))
    order, counts = entered(first, second, share)
    by_first = np.argsort(-first, kind="stable").tolist()
    by_second = np.argsort(-second, kind="stable").tolist()
    assert sorted(order) == list(range(len(first)))
    for sent, early in enumerate(counts):
        assert early == int(np.ceil((1 - share) * sent - 1e-9))
        ahead = by_first[:early]
        late = [i for i in by_second if i not in ahead][: sent - early]
        assert set(order[:sent]) == {*ahead, *late}


def test_both_shares_make_the_budget_and_its_ends_are_exact() -> None:
    for budget in (0.0, 0.2, 0.5, 0.9, 1.0):
        for part in (0.0, 0.25, 1.0):
            first, second = shares(budget, part)
            assert first + (1 - first) * second == pytest.approx(budget)
    assert shares(0.4, 0.0) == (0.4, 0.0)
    assert shares(0.4, 1.0) == (0.0, 0.4)


def test_the_chance_of_a_finished_answer_is_fitted_on_its_rating_and_its_log_probability() -> None:
    rng = np.random.default_rng(0)
    rating, lp = rng.uniform(0.05, 0.95, 40_000), -rng.exponential(0.3, 40_000)
    log_odds = 0.5 + 0.8 * np.log(rating / (1 - rating)) + 2.0 * lp
    right = (rng.random(40_000) < 1 / (1 + np.exp(-log_odds))).astype(float)
    found = Verifier.fit(rating, lp, right)
    np.testing.assert_allclose(found.weights, (0.5, 0.8, 2.0), atol=0.08)
    sure, unsure = found(np.array([0.5, 0.5]), np.array([-0.01, -2.0]))
    assert sure > unsure
    np.testing.assert_allclose(found.score(np.array([0.5]), np.array([0.9]), np.array([-2.0])), 0.9 - unsure)
    np.testing.assert_allclose(found.score(np.array([0.5]), None, np.array([-2.0])), 1 - unsure)


def test_two_live_budgets_come_to_the_asked_share() -> None:
    rng = np.random.default_rng(0)
    looks, routes = TwoLooks(Budget(budget=0.4), 0.25, lambda share: 1 - share), []
    for i, (u, v) in enumerate(rng.random((4000, 2))):
        route = looks.first.decide(Rating(u), key=str(i)).route
        routes.append("first" if route == "target" else looks.decide_again(v, str(i)).route)
    assert routes.count("first") / 4000 == pytest.approx(0.3, abs=0.01)
    assert routes.count("target") / 4000 == pytest.approx(0.1, abs=0.01)
    assert looks.first.config.start == pytest.approx(0.7)
    assert (looks.budget, looks.first_share(0.8)) == (0.4, pytest.approx(0.6))
    ends = [looks.decide_again(v, "x", budget=b).route for b in (0.0, 1.0) for v in (0.01, 0.99)]
    assert ends == ["draft", "draft", "target", "target"]  # of one request alone, exactly
    with pytest.raises(ConfigError, match="share of the budget"):
        TwoLooks(Budget(), 1.5)
