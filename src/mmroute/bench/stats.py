"""What a comparison may claim: intervals of one proportion, and of differences on the same items.

Two methods are compared on the same ids, always by their paired difference; intervals of each alone are never compared
by overlap. "Better" is a paired interval that excludes 0; "not worse" is one whose lower end is above -margin.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from mmroute.errors import ConfigError

__all__ = ["Difference", "holm", "mcnemar", "paired_bootstrap", "paired_width", "wilson"]

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Difference:
    """Mean of `ours - theirs` on the same items, with its 95 % interval."""

    diff: float
    low: float
    high: float

    @property
    def is_better(self) -> bool:
        return self.low > 0

    @property
    def is_worse(self) -> bool:
        return self.high < 0

    def is_not_worse(self, margin: float) -> bool:
        """Whether accuracy is kept: the lower end is at least -margin (in shares: 0.01 is one point)."""
        if not margin > 0:
            raise ConfigError(f"margin is a positive share, given {margin}; write 0.01 for one point")
        return self.low >= -margin


def wilson(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Where the true share lies, given `correct` of `n`: the Wilson interval.

    Raises:
        ConfigError: no items, or more correct ones than items.

    Example:
        >>> [round(end, 4) for end in wilson(8, 10)]
        [0.4902, 0.9433]
    """
    if not 0 <= correct <= n or n == 0:
        raise ConfigError(f"an interval needs 0 <= correct <= n and n > 0, given {correct} of {n}")
    p = correct / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    # At 0 and n the formula is 0 and 1 up to rounding; say so exactly.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def mcnemar(only_ours: int, only_theirs: int) -> float:
    """How probable a split at least this uneven is if both were equally good: exact McNemar, two-sided.

    Args:
        only_ours: items that only we have right.
        only_theirs: items that only they have right.
    """
    n = only_ours + only_theirs
    tail = sum(math.comb(n, k) for k in range(min(only_ours, only_theirs) + 1))
    return min(1.0, 2 * tail / 2**n)


def paired_bootstrap(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """How far apart two methods are on the same items: percentile bootstrap of the mean difference.

    Args:
        ours: score per item.
        theirs: score of the same items, in the same order.
        groups: what each item belongs to (layout, quad, image); whole groups are drawn, because items of one group
            succeed and fail together. None draws single items.
        resamples: drawn sets of groups.
        seed: of the draw; the same call always gives the same interval.

    Raises:
        ConfigError: no items, or lists of different length.
    """
    if len(ours) != len(theirs) or len(ours) == 0 or (groups is not None and len(groups) != len(ours)):
        sizes = f"{len(ours)}, {len(theirs)}" + (f" and {len(groups)} groups" if groups is not None else "")
        raise ConfigError(f"paired scores need the same items on both sides and at least one, given {sizes}")
    delta = np.asarray(ours, float) - np.asarray(theirs, float)
    code = {group: i for i, group in enumerate(dict.fromkeys(groups if groups is not None else range(len(delta))))}
    member = np.array([code[group] for group in groups] if groups is not None else range(len(delta)))
    sums, sizes_ = np.bincount(member, delta), np.bincount(member)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, 2_000_000 // len(sums))  # draws held at once: 16 MB
    for start in range(0, resamples, block):
        drawn = generator.integers(0, len(sums), (min(block, resamples - start), len(sums)))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / sizes_[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(delta.mean()), float(low), float(high))


def paired_width(disagree: float, n: int) -> float:
    """Half-width of a paired 95 % interval that n items reach, `disagree` being the share where the two differ.

    Example:
        >>> round(paired_width(0.05, 1921), 4)
        0.01
    """
    return Z95 * math.sqrt(disagree / n)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values of several claims in one table, adjusted so that the chance of any false one stays (Holm)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted
