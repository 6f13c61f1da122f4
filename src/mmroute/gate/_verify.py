"""A second look: a part of the budget is kept for finished answers of the draft, which say more than its prompt did.

First the queries with the largest score go to the target, before anything is written; among those that the draft has
answered, the ones whose answer is worth least go there too. Both answers are paid for then.

Source: section 3 of this project's specification; cascades by sequence probability (Gupta et al., arXiv 2404.10136).

Legend: n queries.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mmroute.errors import ConfigError
from mmroute.gate._calibrate import logit
from mmroute.gate._features import Logistic
from mmroute.gate._policy import Budget
from mmroute.gate.base import Decision, Rating

__all__ = ["TwoLooks", "Verifier", "entered", "shares"]

Array = Float[np.ndarray, " n"]
_RIDGE = 1e-3


def shares(budget: float, verify_share: float) -> tuple[float, float]:
    """Share of all queries that the first look sends, and of the rest that the second one does.

    Example:
        >>> first, second = shares(0.4, 0.25)
        >>> round(first, 3), round(second, 3), round(first + (1 - first) * second, 3)
        (0.3, 0.143, 0.4)
    """
    first = (1 - verify_share) * budget
    return first, min(1.0, verify_share * budget / (1 - first)) if first < 1 else 0.0


@dataclass(frozen=True)
class Verifier:
    """The chance that a finished answer is right, from its rating and its log-probability."""

    weights: tuple[float, float, float]
    """Of 1, of the rating's log-odds, and of the mean log-probability of the answer's tokens."""

    @classmethod
    def fit(cls, draft: Array, lp_mean: Array, success: Array) -> "Verifier":
        """Fits it on a calibration split.

        Args:
            draft: calibrated ratings of the draft.
            lp_mean: of its answers.
            success: what became of them.
        """
        model = Logistic(_RIDGE).fit(np.stack([logit(draft), lp_mean], 1), success)
        constant, rating, lp = map(float, model.weight)
        return cls((constant, rating, lp))

    def __call__(self, draft: Array, lp_mean: Array) -> Array:
        constant, rating, lp = self.weights
        return 1 / (1 + np.exp(-(constant + rating * logit(draft) + lp * lp_mean)))

    def score(self, draft: Array, target: Array | None, lp_mean: Array) -> Array:
        """How much an answered query should still go to the target: r_t - P(right), or with one rating 1 - P(right)."""
        return (1.0 if target is None else target) - self(draft, lp_mean)


class TwoLooks:
    """Two live budgets, the second over what the first one keeps."""

    def __init__(
        self, budget: Budget, verify_share: float, start: Callable[[float], float | None] | None = None
    ) -> None:
        """
        Args:
            budget: of both looks together, with the options of each.
            verify_share: part of it that finished answers get.
            start: the first look's first threshold, by its share.

        Raises:
            ConfigError: the share is none.
        """
        if not 0 <= verify_share <= 1:
            raise ConfigError(f"verify_share is a share of the budget in [0, 1], given {verify_share}")
        self.verify_share, self.budget = verify_share, budget.config.budget
        options = {**vars(budget.config)}
        first, second = shares(budget.config.budget, verify_share)
        begin = options["start"] if start is None else start(first)
        self.first = Budget(**{**options, "budget": first, "start": begin})
        self.second = Budget(**{**options, "budget": second, "start": None})

    def first_share(self, budget: float) -> float:
        """What the first look sends of another budget."""
        return shares(budget, self.verify_share)[0]

    def decide_again(self, score: float, key: str = "", budget: float | None = None) -> Decision:
        """Who answers a query that the draft has answered.

        Args:
            score: of `Verifier.score`.
            key: the request's id.
            budget: of this query alone; it then moves nothing.
        """
        if budget is None:
            return self.second.decide(Rating(score), key=key)
        return self.second.decide_at(Rating(score), shares(budget, self.verify_share)[1], key)


def entered(first: Array, second: Array, verify_share: float) -> tuple[Sequence[int], Sequence[int]]:
    """In which order queries go to the target as the budget grows, and how many of them by the first look.

    Whoever is sent at one budget is sent at every larger one, by the same look or by an earlier one.

    Args:
        first: score of the first look.
        second: of the second one.
        verify_share: part of the budget that the second one gets.

    Returns:
        The queries in their order, and for 0 to n of them the number that the first look has sent.
    """
    n = len(first)
    by_first, by_second = (np.argsort(-score, kind="stable").tolist() for score in (first, second))
    is_sent, order, counts = [False] * n, [], [0]
    ahead, behind = 0, 0
    for sent in range(1, n + 1):
        entering = -1
        if ahead < np.ceil((1 - verify_share) * sent - 1e-9):
            entering = by_first[ahead]
            ahead += 1
        if entering < 0 or is_sent[entering]:  # the second look has a place, or gets back that of one it had sent
            while is_sent[by_second[behind]]:
                behind += 1
            entering = by_second[behind]
        is_sent[entering] = True
        order.append(entering)
        counts.append(ahead)
    return order, counts
