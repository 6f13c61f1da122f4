"""Intervals cover what they say, and claims follow from them."""

import math

import numpy as np
import pytest

from mmroute.bench import stats
from mmroute.errors import ConfigError


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # Tabulated in Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_tabulated_values(correct, n, low, high):
    assert stats.wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_mirrors_and_stays_inside_the_unit_interval():
    low, high = stats.wilson(3, 40)
    assert stats.wilson(37, 40) == pytest.approx((1 - high, 1 - low))
    assert stats.wilson(40, 40)[1] == 1.0
    assert stats.wilson(0, 40)[0] == 0.0


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (5, 4), (-1, 4)])
def test_wilson_refuses_impossible_counts(correct, n):
    with pytest.raises(ConfigError, match="correct"):
        stats.wilson(correct, n)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (5, 0), (12, 9), (30, 11)])
def test_mcnemar_equals_the_two_sided_binomial(b, c):
    n = b + c
    probability = [math.comb(n, k) / 2**n for k in range(n + 1)]
    as_uneven = sum(p for p in probability if p <= probability[b] * (1 + 1e-12))
    assert stats.mcnemar(b, c) == pytest.approx(as_uneven)
    assert stats.mcnemar(b, c) == stats.mcnemar(c, b)


def test_bootstrap_intervals_cover_the_true_difference():
    generator = np.random.default_rng(1)
    hits, runs = 0, 400
    for _ in range(runs):
        draw = generator.random(300)
        ours, theirs = draw < 0.80, (draw > 0.05) & (draw < 0.80)  # ours is 5 points better, paired
        found = stats.paired_bootstrap(ours, theirs, resamples=600)
        hits += found.low <= 0.05 <= found.high
    assert 0.93 <= hits / runs <= 0.97


def test_groups_that_fail_together_widen_the_interval():
    generator = np.random.default_rng(2)
    ours = np.repeat(generator.random(100) < 0.8, 4)
    theirs = np.repeat(generator.random(100) < 0.7, 4)
    groups = [i // 4 for i in range(400)]
    alone = stats.paired_bootstrap(ours, theirs, resamples=2000)
    together = stats.paired_bootstrap(ours, theirs, groups=groups, resamples=2000)
    assert together.diff == alone.diff
    assert 1.7 < (together.high - together.low) / (alone.high - alone.low) < 2.3  # sqrt(4) in theory


def test_bootstrap_weighs_unequal_groups_by_their_items():
    found = stats.paired_bootstrap([1, 1, 1, 0], [0, 0, 0, 0], groups=["a", "a", "a", "b"], resamples=200)
    assert found.diff == 0.75


def test_the_same_call_gives_the_same_interval():
    ours, theirs = [1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 1, 0]
    assert stats.paired_bootstrap(ours, theirs, resamples=500) == stats.paired_bootstrap(ours, theirs, resamples=500)


def test_pairs_of_different_length_are_refused():
    with pytest.raises(ConfigError, match="3, 2"):
        stats.paired_bootstrap([1, 0, 1], [1, 0])
    with pytest.raises(ConfigError, match="at least one"):
        stats.paired_bootstrap([], [])


@pytest.mark.parametrize(
    ("low", "high", "better", "worse", "kept"),
    [
        (0.001, 0.02, True, False, True),
        (-0.009, 0.02, False, False, True),
        (-0.02, 0.03, False, False, False),  # wide: neither better nor shown to be kept
        (-0.008, -0.001, False, True, True),  # worse, but by less than the margin
        (-0.05, -0.02, False, True, False),
    ],
)
def test_claims_follow_from_the_paired_interval(low, high, better, worse, kept):
    found = stats.Difference((low + high) / 2, low, high)
    assert (found.is_better, found.is_worse, found.is_not_worse(0.01)) == (better, worse, kept)


def test_a_margin_of_zero_is_refused():
    with pytest.raises(ConfigError, match="one point"):
        stats.Difference(0, 0, 0).is_not_worse(0)


def test_sample_sizes_of_the_protocol_reach_their_width():
    assert stats.paired_width(0.05, 1921) == pytest.approx(0.01, abs=1e-4)
    assert stats.paired_width(0.02, 768) == pytest.approx(0.01, abs=1e-4)


def test_holm_adjusts_more_the_smaller_the_p_value():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.9, 0.8]) == [1.0, 1.0]
