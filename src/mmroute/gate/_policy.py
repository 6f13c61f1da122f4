"""From scores to routes: a threshold, a live share of target calls, a batch's best, the best value, a promised success.

Source: PRP (arXiv 2606.30217), "batch dynamic threshold": ratings of the live batch are ranked, no validation sweep.
Deviates: the batch is a sliding window of past scores (`budget`), so a request never waits; `microbatch` is the literal
reading with a bounded wait. The window's share is corrected towards what was asked, which the paper does not state.
"""

import hashlib
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from mmroute.config import options, parse
from mmroute.errors import ConfigError
from mmroute.gate.base import Decision, Policy, Rating, Route

__all__ = ["POLICIES", "Always", "Batch", "Budget", "MicroBatch", "Shadow", "Sla", "Threshold", "Utility", "policy"]

Share = Annotated[float, Field(ge=0, le=1)]


def hash01(key: str) -> float:
    """A number in [0, 1) that depends on the request's id alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


class Always(Policy):
    """One model answers everything."""

    name = "always"

    @options
    class Config:
        route: Literal["draft", "target"] = "target"
        """Who."""

    def __init__(self, **given: Any) -> None:
        self.config = parse(self.Config, given, "gate.policy")
        self.on_unrated = self.config.route

    def _decide(self, rating: Rating, key: str) -> Decision:
        return Decision(self.config.route, "always", rating.score)


class Threshold(Policy):
    """The target answers where the score is above a fixed threshold."""

    name = "threshold"

    @options
    class Config:
        threshold: float
        """tau; `mmroute calibrate gate` finds the one of a share."""

    def __init__(self, **given: Any) -> None:
        self.config = parse(self.Config, given, "gate.policy")

    def _decide(self, rating: Rating, key: str) -> Decision:
        tau = self.config.threshold
        return Decision("target" if rating.score > tau else "draft", "rating", rating.score, tau)


class Utility(Policy):
    """The target answers where what it gains is worth what it costs: r_t - r_d > lambda (C_t - C_d)."""

    name = "utility"

    @options
    class Config:
        weight: Annotated[float, Field(ge=0)] = 0.0
        """lambda: success that one unit of cost must buy."""

    def __init__(self, **given: Any) -> None:
        self.config = parse(self.Config, given, "gate.policy")

    def _decide(self, rating: Rating, key: str) -> Decision:
        price = self.config.weight * (rating.target_cost - rating.draft_cost)
        return Decision("target" if rating.score > price else "draft", "rating", rating.score, price)


class Sla(Policy):
    """The cheaper model that keeps a promise of success; if neither does, the one that is likelier to be right."""

    name = "sla"

    @options
    class Config:
        min_success: Share = 0.8
        """q: calibrated probability of success that is promised."""

    def __init__(self, **given: Any) -> None:
        self.config = parse(self.Config, given, "gate.policy")

    def _decide(self, rating: Rating, key: str) -> Decision:
        if rating.draft is None or rating.target is None:
            raise ConfigError("policy sla needs both ratings; this gate gives a score only, take budget or threshold")
        q = self.config.min_success
        costs: list[tuple[Route, float, float]] = [
            ("draft", rating.draft, rating.draft_cost),
            ("target", rating.target, rating.target_cost),
        ]
        enough = [model for model in costs if model[1] >= q]
        best = min(enough, key=lambda model: model[2]) if enough else max(costs, key=lambda model: model[1])
        return Decision(best[0], "rating", rating.score, q)


class Budget(Policy):
    """A share of queries goes to the target: those above a quantile of the last scores, corrected towards the share."""

    name = "budget"

    @options
    class Config:
        budget: Share = 0.4
        """b: share of queries that the target answers; 0 and 1 are exact."""
        window: Annotated[int, Field(ge=1)] = 512
        """Last scores and decisions that are looked at."""
        gain: Annotated[float, Field(ge=0)] = 2.0
        """How strongly a share that is off is corrected."""
        warmup: Annotated[int, Field(ge=0)] = 32
        """Decisions taken with `start` before the window is trusted."""
        start: float | None = None
        """Threshold of the first decisions, from calibration; None draws them at random in the asked share."""
        spend: Literal["exactly", "at_most"] = "exactly"
        """`at_most` also asks for a score above 0."""

    def __init__(self, **given: Any) -> None:
        self.config = parse(self.Config, given, "gate.policy")
        self._scores: deque[float] = deque()
        self._sorted: list[float] = []
        self._sent: deque[bool] = deque()
        self._num_sent = 0

    @property
    def share(self) -> float | None:
        """Realised share over the window; None before the first decision."""
        return self._num_sent / len(self._sent) if self._sent else None

    def decide_at(self, rating: Rating, budget: float, key: str = "") -> Decision:
        """One query under another budget, by the live window, which it does not enter.

        Raises:
            ConfigError: the budget is no share.
        """
        if not 0 <= budget <= 1:
            raise ConfigError(f"budget is a share in [0, 1], given {budget}")
        return self._choose(rating.score, budget, budget, key)

    def _decide(self, rating: Rating, key: str) -> Decision:
        b = self.config.budget
        error = b - self.share if self.share is not None and len(self._scores) >= self.config.warmup else 0.0
        decision = self._choose(rating.score, b, min(1.0, max(0.0, b + self.config.gain * error)), key)
        self._enter(rating.score, decision.route == "target")
        return decision

    def _choose(self, u: float, asked: float, corrected: float, key: str) -> Decision:
        if asked in (0, 1):  # a promise of all or nothing is kept exactly
            return Decision("target" if asked else "draft", "rating", u)
        if len(self._scores) < max(self.config.warmup, 1):
            if self.config.start is None:
                return Decision("target" if hash01(key) < asked else "draft", "rating", u)
            tau, chance = self.config.start, 0.0
        else:
            tau = self._quantile(1 - corrected)
            chance = self._tie_chance(tau, corrected)
        sent = u > tau or (u == tau and hash01(key) < chance)
        if self.config.spend == "at_most":
            sent = sent and u > 0
        return Decision("target" if sent else "draft", "rating", u, tau)

    def _quantile(self, q: float) -> float:
        """Linear between order statistics, as `numpy.quantile`."""
        at = q * (len(self._sorted) - 1)
        low = int(at)
        high = min(low + 1, len(self._sorted) - 1)
        a, b = self._sorted[low], self._sorted[high]
        return a if a == b else a + (at - low) * (b - a)  # exact on a plateau, where ties are looked for

    def _tie_chance(self, tau: float, corrected: float) -> float:
        n = len(self._sorted)
        above, tied = (
            n - bisect_right(self._sorted, tau),
            bisect_right(self._sorted, tau) - bisect_left(self._sorted, tau),
        )
        return (corrected - above / n) / (tied / n) if tied else 0.0

    def _enter(self, score: float, sent: bool) -> None:
        insort(self._sorted, score)
        self._scores.append(score)
        self._sent.append(sent)
        self._num_sent += sent
        if len(self._scores) > self.config.window:
            del self._sorted[bisect_left(self._sorted, self._scores.popleft())]
            self._num_sent -= self._sent.popleft()


class MicroBatch(Policy):
    """Requests that wait together are ranked; the top share goes to the target, and rounding is carried over."""

    name = "microbatch"

    @options
    class Config:
        budget: Share = 0.4
        """b: share of queries that the target answers."""
        max_n: Annotated[int, Field(ge=1)] = 16
        """Requests that are ranked together at most."""
        max_wait_ms: Annotated[float, Field(ge=0)] = 20.0
        """Longest time a request waits for others."""

    def __init__(self, **given: Any) -> None:
        self.config = parse(self.Config, given, "gate.policy")
        self._carry = 0.0

    def _decide(self, rating: Rating, key: str) -> Decision:
        return self.decide_many([rating], [key])[0]

    def decide_many(self, ratings: Sequence[Rating], keys: Sequence[str] | None = None) -> list[Decision]:
        """One batch: the top floor(b n + carry) by score."""
        keys = keys if keys is not None else [""] * len(ratings)
        due = self.config.budget * len(ratings) + self._carry
        m = min(max(int(due + 1e-9), 0), len(ratings))
        self._carry = min(max(due - m, -1.0), 1.0)
        order = sorted(range(len(ratings)), key=lambda i: (-ratings[i].score, hash01(keys[i])))
        sent = set(order[:m])
        tau = ratings[order[m]].score if m < len(order) else None
        return [
            Decision("target" if i in sent else "draft", "rating", rating.score, tau)
            for i, rating in enumerate(ratings)
        ]


@dataclass
class Batch:
    """Requests that wait for a micro-batch; the caller owns the clock.

    Example:
        >>> waiting = Batch(max_n=2, max_wait_s=0.02)
        >>> waiting.add(0.0, "a"), waiting.due(0.01), waiting.due(0.02)
        (None, None, ['a'])
    """

    max_n: int
    max_wait_s: float
    _items: list[tuple[float, Any]] = field(default_factory=list)

    @property
    def deadline(self) -> float | None:
        """When the oldest request has waited long enough; None while nothing waits."""
        return self._items[0][0] + self.max_wait_s if self._items else None

    def add(self, now: float, item: Any) -> list[Any] | None:
        """Adds a request; the whole batch if that fills it."""
        self._items.append((now, item))
        return self._take() if len(self._items) >= self.max_n else None

    def due(self, now: float) -> list[Any] | None:
        """The batch if its time has come."""
        return self._take() if self.deadline is not None and now >= self.deadline else None

    def _take(self) -> list[Any]:
        items, self._items = [item for _, item in self._items], []
        return items


class Shadow(Policy):
    """Watches another policy decide and acts as told: what routing would do, at no risk."""

    name = "shadow"

    def __init__(self, inner: Policy, acts: Route = "target") -> None:
        self.inner, self.acts = inner, acts

    def decide(self, rating: Rating | None, *, key: str = "", force: Route | None = None) -> Decision:
        """The inner policy's decision under `shadow`; a forced route is forced all the same."""
        found = self.inner.decide(rating, key=key, force=force)
        return found if force is not None else replace(found, route=self.acts, shadow=found.route)

    def decide_many(self, ratings: Sequence[Rating], keys: Sequence[str] | None = None) -> list[Decision]:
        """The inner policy's decisions under `shadow`."""
        return [replace(d, route=self.acts, shadow=d.route) for d in self.inner.decide_many(ratings, keys)]

    def _decide(self, rating: Rating, key: str) -> Decision:
        return replace(self.inner._decide(rating, key), route=self.acts)


POLICIES: dict[str, type[Policy]] = {p.name: p for p in (Always, Budget, MicroBatch, Sla, Threshold, Utility)}


def policy(name: str, *, shadow: bool = False, shadow_acts: Route = "target", **given: Any) -> Policy:
    """A policy by name with its options.

    Args:
        name: one of `POLICIES`.
        shadow: decide and log, but act as `shadow_acts`.
        shadow_acts: who answers under `shadow`.
        given: options of the policy.

    Raises:
        ConfigError: no such policy, or an option it does not have.
    """
    if name not in POLICIES:
        raise ConfigError(f"gate.policy is one of {', '.join(POLICIES)} (given {name!r})")
    made = POLICIES[name](**given)
    return Shadow(made, shadow_acts) if shadow else made
