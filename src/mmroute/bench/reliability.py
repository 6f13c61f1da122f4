"""Whether a rating means what it says: calibration, discrimination, ties and collapse.

Source: ECE and MCE over equal-mass bins (Naeini et al., 2015); Brier's decomposition (Murphy, 1973).

Legend: n queries, K rating levels.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from jaxtyping import Float

from mmroute.errors import ConfigError

__all__ = ["Collapse", "Reliability", "auprc", "auroc", "brier", "collapse", "ece", "ranks", "reliability", "spearman"]

Array = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Reliability:
    """One rating against what happened."""

    brier: float
    reliability: float
    """Brier's part for miscalibration, over the bins of `ece`; 0 is calibrated."""
    resolution: float
    """Its part for telling queries apart; more is better."""
    uncertainty: float
    """What a constant rating at the base rate would score."""
    ece: float
    mce: float
    nll: float
    auroc: float
    auprc_of_errors: float
    tie_rate: float
    """Share of pairs of queries with equal ratings."""

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Collapse:
    """Whether a rater says the same of everything."""

    levels: int
    """Distinct most likely levels."""
    largest_share: float
    """Share of queries at the most frequent one."""
    entropy: float
    """Mean entropy of the levels' distribution, in nats."""


def reliability(rating: Array, success: Array, bins: int = 15) -> Reliability:
    """Everything about one rating.

    Args:
        rating: predicted probability of success.
        success: what happened, 0 or 1, or a mean of samples in between.
        bins: of equal mass, for `ece`, `mce` and Brier's parts.

    Raises:
        ConfigError: nothing to judge, or a rating outside [0, 1].
    """
    if len(rating) != len(success) or len(rating) == 0 or not np.all((rating >= 0) & (rating <= 1)):
        raise ConfigError(f"ratings are numbers in [0, 1], as many as outcomes; given {len(rating)} and {len(success)}")
    count, mean_rating, mean_success = _bins(rating, success, bins)
    share, base = count / len(rating), success.mean()
    p = np.clip(rating, 1e-6, 1 - 1e-6)
    return Reliability(
        brier=brier(rating, success),
        reliability=float((share * (mean_rating - mean_success) ** 2).sum()),
        resolution=float((share * (mean_success - base) ** 2).sum()),
        uncertainty=float(base * (1 - base)),
        ece=ece(rating, success, bins),
        mce=float(abs(mean_rating - mean_success).max()),
        nll=float(-(success * np.log(p) + (1 - success) * np.log(1 - p)).mean()),
        auroc=auroc(rating, success),
        auprc_of_errors=auprc(-rating, 1 - success),
        tie_rate=tie_rate(rating),
    )


def brier(rating: Array, success: Array) -> float:
    """Mean squared distance of the rating to what happened."""
    return float(((rating - success) ** 2).mean())


def ece(rating: Array, success: Array, bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass."""
    count, mean_rating, mean_success = _bins(rating, success, bins)
    return float((count / count.sum() * abs(mean_rating - mean_success)).sum())


def _bins(rating: Array, success: Array, bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Queries, mean rating and mean success of each bin of equal mass; equal ratings share a bin."""
    edges = np.unique(np.quantile(rating, np.arange(1, bins) / bins, method="inverted_cdf"))
    where = np.searchsorted(edges, rating, side="left")
    count = np.bincount(where, minlength=len(edges) + 1).astype(float)
    used = count > 0
    sums = (np.bincount(where, values, minlength=len(edges) + 1)[used] for values in (rating, success))
    mean_rating, mean_success = (total / count[used] for total in sums)
    return count[used], mean_rating, mean_success


def ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def auroc(score: Array, success: Array) -> float:
    """Chance that a success scores above a failure, ties counting half; NaN where one kind is missing.

    A success between 0 and 1 counts as that share of a success and the rest of a failure.
    """
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(score[order]) > 0]))
    hit, miss = (np.add.reduceat(part[order], starts) for part in (success, 1 - success))
    below = np.cumsum(miss) - miss
    pairs = hit.sum() * miss.sum()
    return float((hit * (below + miss / 2)).sum() / pairs) if pairs > 0 else float("nan")


def auprc(score: Array, positive: Array) -> float:
    """Average precision: mean precision at each positive, from the largest score on; equal scores count as one step."""
    order = np.argsort(-score, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(score[order]) < 0]))
    hit = np.add.reduceat(positive[order], starts)
    seen = np.append(starts[1:], len(score))
    total = positive.sum()
    return float((hit * np.cumsum(hit) / seen).sum() / total) if total > 0 else float("nan")


def spearman(a: Array, b: Array) -> float:
    """Rank correlation; NaN where one side is constant."""
    x, y = ranks(a) - (len(a) + 1) / 2, ranks(b) - (len(b) + 1) / 2
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale > 0 else float("nan")


def tie_rate(values: Sequence[float] | Array) -> float:
    """Share of pairs that are equal."""
    n = len(values)
    _, counts = np.unique(values, return_counts=True)
    return float((counts * (counts - 1)).sum() / (n * (n - 1))) if n > 1 else 0.0


def collapse(probs: Float[np.ndarray, "n K"]) -> Collapse:
    """Whether the levels are used."""
    best = probs.argmax(1)
    counts = np.bincount(best)
    logs = np.log(np.clip(probs, 1e-12, None))
    return Collapse(int((counts > 0).sum()), float(counts.max() / len(best)), float(-(probs * logs).sum(1).mean()))
