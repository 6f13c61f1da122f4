"""Maps from ratings to probabilities: order kept, values right, bad ratings refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmroute.bench.reliability import ece
from mmroute.errors import ConfigError
from mmroute.gate._calibrate import Calibration, calibration


def skewed(n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    rating = rng.random(n)
    return rating, (rng.random(n) < rating**2).astype(float)


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_a_map_calibrates_and_keeps_the_order(kind: str) -> None:
    rating, success = skewed()
    made = calibration(kind, rating[:2000], success[:2000])
    assert ece(made(rating[2000:]), success[2000:]) < 0.5 * ece(rating[2000:], success[2000:])
    grid = np.linspace(0.001, 0.999, 500)
    assert (np.diff(made(grid)) > 0).all()
    assert ((made(grid) >= 0) & (made(grid) <= 1)).all()
    assert Calibration.from_dict(made.to_dict()) == made


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_isotonic_is_the_best_increasing_fit(pairs: list[tuple[int, bool]]) -> None:
    rating = np.array([r for r, _ in pairs]) / 9 + 1e-4 * np.arange(len(pairs)) / len(pairs)
    success = np.array([y for _, y in pairs], float)
    order = np.argsort(rating)
    y = success[order]
    # min-max formula of the increasing least-squares fit
    slow = [max(min(np.mean(y[i : k + 1]) for k in range(j, len(y))) for i in range(j + 1)) for j in range(len(y))]
    blocks = calibration("isotonic", rating, success).knots
    values = np.array([v for _, v in blocks])
    at = np.searchsorted(values, np.array(slow) - 1e-9)
    np.testing.assert_allclose(values[np.minimum(at, len(values) - 1)], slow, atol=1e-9)


def test_a_rating_that_falls_where_success_rises_is_refused() -> None:
    rating, success = skewed(500)
    with pytest.raises(ConfigError, match="anti-correlated"):
        calibration("platt", 1 - rating, success)
    assert (calibration("none", rating, success)(rating) == rating).all()
