"""How good a ranking of queries is: accuracy over the share, and over the cost, of what the target answers.

A curve has a knot where a block of equal scores ends; inside a block any order is as good as another, so the curve is
the straight line of their expectation. That is what averaging over random orders tends to, without drawing any.

Source: PGR, APGR and CPT from RouteLLM (arXiv 2406.18665); AIQ from RouterBench (2403.12031); nAUC, Ps and QNC from
MMR-Bench (2601.17814); rank score from VL-RouterBench and RouterArena; lift from AutoMix (2310.12963). The
oracle-normalised gain is ours.

Legend: n queries, J blocks of equal scores, R resamples, G groups.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mmroute.bench.stats import Difference
from mmroute.errors import ConfigError

__all__ = [
    "Curve",
    "Pair",
    "aiq",
    "apgr",
    "area",
    "attainable",
    "cpt",
    "curve",
    "gain_area",
    "kappa",
    "lift",
    "nauc",
    "oracle",
    "oracle_gain",
    "pgr",
    "qnc",
    "rank_score",
    "resampled",
    "speed_up",
]

Array = Float[np.ndarray, " n"]


@dataclass(frozen=True)
class Pair:
    """What draft and target did with the same queries."""

    draft: Array
    """Success of the draft, in [0, 1]."""
    target: Array
    groups: Sequence[Hashable] | None = None
    """What succeeds and fails together; None is every query for itself."""

    def __post_init__(self) -> None:
        n = len(self.draft)
        if n == 0 or len(self.target) != n or (self.groups is not None and len(self.groups) != n):
            sizes = [n, len(self.target), *([] if self.groups is None else [len(self.groups)])]
            raise ConfigError(f"a pair needs the same queries on both sides and at least one, given {sizes}")
        if not all(np.all((side >= 0) & (side <= 1)) for side in (self.draft, self.target)):
            raise ConfigError("success is a number in [0, 1]; a draft or target value is outside, or is no number")

    @property
    def advantage(self) -> Array:
        return self.target - self.draft


@dataclass(frozen=True)
class Curve:
    """Accuracy and mean cost when the top share by score goes to the target; straight between the knots."""

    share: Float[np.ndarray, " J"]
    """0 .. 1."""
    accuracy: Float[np.ndarray, " J"]
    cost: Float[np.ndarray, " J"] | None = None

    def at(self, share: float | Float[np.ndarray, " b"]) -> np.ndarray:
        """Accuracy where that share of queries goes to the target."""
        return np.interp(share, self.share, self.accuracy)

    def cost_at(self, share: float | Float[np.ndarray, " b"]) -> np.ndarray:
        """Mean cost there.

        Raises:
            ConfigError: the curve was made without costs.
        """
        if self.cost is None:
            raise ConfigError("this curve has no costs; give kept_cost and sent_cost")
        return np.interp(share, self.share, self.cost)


def curve(
    score: Array,
    pair: Pair,
    *,
    weights: Array | None = None,
    kept_cost: Array | None = None,
    sent_cost: Array | None = None,
) -> Curve:
    """The curve of one ranking.

    Args:
        score: larger goes to the target first.
        pair: the outcomes.
        weights: how often each query counts; None is once.
        kept_cost: what each query costs if the draft answers it, all that the gate looked at included.
        sent_cost: the same if the target does.

    Raises:
        ConfigError: another number of scores than queries, or a score that is no number.
    """
    if len(score) != len(pair.draft) or np.isnan(score).any():
        raise ConfigError(f"{len(pair.draft)} queries need as many scores, none of them NaN; given {len(score)}")
    order, starts = _blocks(score)
    w = np.ones(len(order)) if weights is None else weights
    total = w.sum()

    def walk(at_start: Array, step: Array) -> Float[np.ndarray, " J"]:
        sums = np.add.reduceat((w * step)[order], starts)
        return np.concatenate([[0.0], np.cumsum(sums)]) / total + (w * at_start).sum() / total

    share = np.concatenate([[0.0], np.cumsum(np.add.reduceat(w[order], starts))]) / total
    cost = None
    if kept_cost is not None and sent_cost is not None:
        cost = walk(kept_cost, sent_cost - kept_cost)
    return Curve(share, walk(pair.draft, pair.advantage), cost)


def _blocks(score: Array) -> tuple[np.ndarray, np.ndarray]:
    """Indices from the largest score on, and where in them each block of equal scores begins."""
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    return order, np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))


def oracle(pair: Pair, kind: str = "advantage", cost: Array | None = None) -> Array:
    """A perfect score: `advantage` p_t - p_d is above every ranking at every share; `difficulty` is 1 - p_d.

    Args:
        cost: of sending each query; among equals the cheaper ones go first, which moves the cost curve alone.
    """
    if kind not in ("advantage", "difficulty"):
        raise ConfigError(f"an oracle ranks by advantage or difficulty (given {kind!r})")
    score = pair.advantage if kind == "advantage" else 1 - pair.draft
    if cost is None:
        return score
    rank = np.empty(len(score))
    rank[np.lexsort((-cost, score))] = np.arange(len(score))
    return rank


def attainable(pair: Pair, kinds: Sequence[Hashable]) -> Array:
    """What one can know before an answer who knows each kind of question by heart, and nothing of the single one.

    The mean advantage of a query's kind over the other groups, drawn by one pseudo-count towards that of all of them.
    No query's own outcome is in its score, so luck is in it as little as in a rating; the oracle has all of it.
    """
    groups = range(len(pair.draft)) if pair.groups is None else pair.groups
    kind, own = (_codes(names) for names in (list(kinds), list(zip(kinds, groups, strict=True))))
    gain, all_group = pair.advantage, _codes(list(groups))
    less = lambda code: (np.bincount(code)[code], np.bincount(code, gain)[code])  # noqa: E731
    (many, total), (own_many, own_total), (group_many, group_total) = less(kind), less(own), less(all_group)
    rest = (gain.sum() - group_total) / np.maximum(len(gain) - group_many, 1)
    return (total - own_total + rest) / (many - own_many + 1)


def _codes(names: Sequence[Hashable]) -> np.ndarray:
    code = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([code[name] for name in names])


# ---------------------------------------------------------------------- over the share


def area(c: Curve) -> float:
    """Integral of accuracy over the share."""
    return float(np.trapezoid(c.accuracy, c.share))


def gain_area(c: Curve) -> float:
    """What a ranking gains on random, as area: 0 for random, which is the straight line between both models."""
    return area(c) - float(c.accuracy[0] + c.accuracy[-1]) / 2


def oracle_gain(c: Curve, best: Curve) -> float:
    """ONG: the share of the oracle's gain over random that the ranking has; 0 random, 1 oracle, negative is worse.

    It is defined even where the target is no better than the draft. NaN where no ranking can gain anything.
    """
    possible = gain_area(best)
    return gain_area(c) / possible if possible > 1e-12 else float("nan")


def pgr(c: Curve, share: float | np.ndarray) -> np.ndarray:
    """Performance gap recovered at a share: (A(b) - A_d) / (A_t - A_d); explodes where both are equally good."""
    low, high = c.accuracy[0], c.accuracy[-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return (c.at(share) - low) / (high - low)


def apgr(c: Curve) -> float:
    """Mean PGR at shares .05, .15 .. .95."""
    return float(np.mean(pgr(c, np.arange(0.05, 1, 0.1))))


def cpt(c: Curve, recovered: float) -> float:
    """Call-performance threshold: the least share whose PGR reaches `recovered`; infinite if none does."""
    values = pgr(c, c.share)
    reached = np.flatnonzero(values >= recovered - 1e-12)
    if not len(reached):
        return float("inf")
    j = int(reached[0])
    if j == 0:
        return 0.0
    part = (recovered - values[j - 1]) / (values[j] - values[j - 1])
    return float(c.share[j - 1] + np.clip(part, 0, 1) * (c.share[j] - c.share[j - 1]))


def kappa(score: Array, target_cost: Array, share: float) -> float:
    """How dear the queries are that go to the target: their mean target cost over that of all. NaN at share 0.

    Hardest-first sends hopeless queries, which think longest: above 1. Routing by advantage stays below.
    """
    order, starts = _blocks(score)
    mean = np.add.reduceat(target_cost[order], starts) / np.diff([*starts, len(order)])
    expected = np.repeat(mean, np.diff([*starts, len(order)]))  # inside a block of equals any query may be the one sent
    k = share * len(order)
    whole = int(k)
    spent = expected[:whole].sum() + (k - whole) * (expected[whole] if whole < len(order) else 0.0)
    return float(spent / k / target_cost.mean()) if k else float("nan")


# ---------------------------------------------------------------------- over the cost


def speed_up(c: Curve, target_cost: float, tolerance: float = 0.0) -> float:
    """The largest cost ratio always-target / routed at accuracy A_t - tolerance or better; below 1 is a loss.

    Args:
        target_cost: mean cost of sending everything without a gate.
        tolerance: accuracy that may be lost, as a share.
    """
    cost = c.cost_at(c.share)
    floor = c.accuracy[-1] - tolerance
    costs = [float(cost[-1])]
    for j in range(len(cost) - 1):
        a, b = c.accuracy[j], c.accuracy[j + 1]
        if a >= floor - 1e-12:
            costs.append(float(cost[j]))
        if a < floor <= b:
            costs.append(float(cost[j] + (floor - a) / (b - a) * (cost[j + 1] - cost[j])))
    return target_cost / min(costs)


def _hull(cost: np.ndarray, accuracy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The non-decreasing concave hull of points: what mixing them at random reaches."""
    order = np.lexsort((-accuracy, cost))
    x, y = cost[order], np.maximum.accumulate(accuracy[order])
    keep: list[int] = []
    for i in range(len(x)):
        if keep and x[i] == x[keep[-1]]:
            continue
        while len(keep) > 1:
            a, b = keep[-2], keep[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) > (y[i] - y[a]) * (x[b] - x[a]):
                break
            keep.pop()
        keep.append(i)
    return x[keep], y[keep]


def aiq(c: Curve, *, top: float | None = None, compat: bool = False) -> float:
    """Average improvement in quality: mean height of the non-decreasing hull over the cost range.

    Args:
        top: cost up to which every hull is continued, so that routers can be compared; None is the curve's own.
        compat: divide by `top` instead of the range, as RouterBench's code does.
    """
    x, y = _hull(c.cost_at(c.share), c.accuracy)
    end = float(x[-1]) if top is None else top
    if end > x[-1]:
        x, y = np.append(x, end), np.append(y, y[-1])
    width = end if compat else end - x[0]
    return float(np.trapezoid(y, x) / width) if width > 0 else float(y[-1])


def nauc(c: Curve) -> float:
    """MMR-Bench's area under the Pareto points over the cost range."""
    cost = c.cost_at(c.share)
    order = np.lexsort((-c.accuracy, cost))
    x, y = cost[order], c.accuracy[order]
    best = np.concatenate([[True], y[1:] > np.maximum.accumulate(y)[:-1]])
    x, y = np.append(x[best], x[-1]), np.append(y[best], y[best][-1])
    return float(np.trapezoid(y, x) / (x[-1] - x[0])) if x[-1] > x[0] else float(y[-1])


def qnc(c: Curve, best_accuracy: float, best_cost: float) -> float:
    """The least cost that reaches the best single model, over that model's own; infinite if the curve never does."""
    cost = c.cost_at(c.share)
    reached = np.flatnonzero(c.accuracy >= best_accuracy - 1e-12)
    return float(cost[reached].min() / best_cost) if len(reached) else float("inf")


def rank_score(accuracy: float, cost: float, low: float, high: float, beta: float = 0.1) -> float:
    """(1 + B) A C / (B A + C), C being how cheap it is on a log scale between two bounds.

    Args:
        accuracy: in [0, 1].
        cost: mean cost.
        low: cost that counts as 1.
        high: cost that counts as 0.
        beta: weight of cheapness.

    Raises:
        ConfigError: bounds that leave no range.
    """
    if not 0 < low < high:
        raise ConfigError(f"rank score needs bounds 0 < low < high, given {low}, {high}")
    cheap = float(np.clip((np.log2(high) - np.log2(cost)) / (np.log2(high) - np.log2(low)), 0, 1))
    below = beta * accuracy + cheap
    return (1 + beta) * accuracy * cheap / below if below else 0.0


def lift(c: Curve, share: float) -> float:
    """AutoMix's lift at a share: what an extra unit of cost buys, against what it buys by random mixing."""
    low, high = c.accuracy[0], c.accuracy[-1]
    start, end = c.cost_at(0.0), c.cost_at(1.0)
    slope = (c.at(share) - low) / (c.cost_at(share) - start)
    return float(slope / ((high - low) / (end - start)) - 1)


# ---------------------------------------------------------------------- intervals


def resampled(
    scores: Sequence[Array],
    pair: Pair,
    measure: Callable[[Sequence[Curve]], Mapping[str, float]],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Difference]:
    """Measures of one or more rankings on the same queries, with 95 % intervals: groups are drawn, not queries.

    Args:
        scores: the rankings; `measure` gets their curves in this order.
        pair: the outcomes and their groups.
        measure: figures by name, for example `lambda curves: {"lead": area(curves[0]) - area(curves[1])}`.
        resamples: drawn sets of groups.
        seed: of the draw.

    Returns:
        Each measure on the queries as they are, and its percentile interval over resamples.
    """
    member = _codes(list(range(len(pair.draft)) if pair.groups is None else pair.groups))
    num = int(member.max()) + 1
    rng = np.random.default_rng(seed)
    value = measure([curve(s, pair) for s in scores])
    found = np.empty((resamples, len(value)))
    for r in range(resamples):
        times = np.bincount(rng.integers(0, num, num), minlength=num).astype(float)
        found[r] = list(measure([curve(s, pair, weights=times[member]) for s in scores]).values())
    out = {}
    for name, column in zip(value, found.T, strict=True):
        known = column[~np.isnan(column)]  # a drawn set may hold no query on which the models differ
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        out[name] = Difference(value[name], float(low), float(high))
    return out
