"""Calibration figures against slow loops and values worked out by hand."""

import numpy as np
import pytest

from mmroute.bench import reliability as rel
from mmroute.errors import ConfigError


def slow_auroc(score: np.ndarray, success: np.ndarray) -> float:
    won = total = 0.0
    for s, y in zip(score, success, strict=True):
        for t, z in zip(score, success, strict=True):
            weight = y * (1 - z)
            total += weight
            won += weight * (1.0 if s > t else 0.5 if s == t else 0.0)
    return won / total


def test_auroc_counts_pairs_and_halves_ties() -> None:
    rng = np.random.default_rng(0)
    for success in (rng.integers(0, 2, 40).astype(float), rng.integers(0, 5, 40) / 4):
        score = rng.integers(0, 6, 40).astype(float)
        # a query with success in between makes no pair with itself that the slow loop would skip: it counts a tie there
        assert rel.auroc(score, success) == pytest.approx(slow_auroc(score, success))
    assert rel.auroc(np.arange(4.0), np.array([0, 0, 1.0, 1])) == 1
    assert np.isnan(rel.auroc(np.arange(3.0), np.ones(3)))


def test_ece_is_the_gap_between_rating_and_success_of_equal_bins() -> None:
    rating = np.array([0.1, 0.1, 0.2, 0.8, 0.9, 0.9])
    success = np.array([0, 0, 1, 1, 1, 0.0])
    assert rel.ece(rating, success, bins=2) == pytest.approx(abs(0.4 / 3 - 1 / 3) / 2 + abs(2.6 / 3 - 2 / 3) / 2)
    assert rel.ece(np.full(5, 0.6), np.array([1, 1, 1, 0, 0.0])) == pytest.approx(0)


def test_equal_ratings_are_never_torn_apart_by_bins() -> None:
    rating = np.repeat([0.25, 0.75], 50)
    success = np.concatenate([np.arange(50) % 4 == 0, np.arange(50) % 4 != 0]).astype(float)
    assert rel.ece(rating, success) < 0.011  # 13 of 50 instead of 12.5


def test_brier_splits_into_its_parts_where_ratings_are_few() -> None:
    rng = np.random.default_rng(1)
    rating = rng.choice([0.1, 0.5, 0.8], size=300)
    success = (rng.random(300) < rating**2).astype(float)
    found = rel.reliability(rating, success)
    assert found.brier == pytest.approx(found.reliability - found.resolution + found.uncertainty)
    assert found.mce >= found.ece > 0
    assert set(found.to_dict()) >= {"brier", "ece", "auroc", "tie_rate"}


def test_precision_recall_area_by_hand() -> None:
    assert rel.auprc(np.array([4.0, 3, 2, 1]), np.array([1.0, 0, 1, 0])) == pytest.approx((1 + 2 / 3) / 2)
    assert rel.auprc(np.zeros(4), np.array([1.0, 0, 1, 0])) == pytest.approx(0.5)  # one step: the base rate


def test_rank_correlation_shares_ranks_among_equals() -> None:
    np.testing.assert_array_equal(rel.ranks(np.array([3.0, 1, 3, 2])), [3.5, 1, 3.5, 2])
    assert rel.spearman(np.array([1.0, 2, 3]), np.array([10.0, 20, 30])) == pytest.approx(1)
    assert rel.spearman(np.array([1.0, 2, 2, 4]), np.array([4.0, 3, 2, 1])) == pytest.approx(-4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(rel.spearman(np.ones(3), np.arange(3.0)))


def test_ties_and_collapse() -> None:
    assert rel.tie_rate([1, 1, 2, 3]) == pytest.approx(1 / 6)
    probs = np.array([[0.9, 0.1, 0], [0.8, 0.2, 0], [0, 0, 1.0]])
    found = rel.collapse(probs)
    assert (found.levels, round(found.largest_share, 4)) == (2, 0.6667)
    assert found.entropy == pytest.approx(
        -(0.9 * np.log(0.9) + 0.1 * np.log(0.1) + 0.8 * np.log(0.8) + 0.2 * np.log(0.2)) / 3
    )


def test_ratings_outside_their_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"numbers in \[0, 1\]"):
        rel.reliability(np.array([1.2]), np.array([1.0]))
