"""From a rating to a route, with what one request asks for itself; the policies are `gate._policy`'s."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

from mmroute.errors import ConfigError
from mmroute.gate._policy import Always, Batch, Budget, MicroBatch, Shadow, Utility, policy
from mmroute.gate._verify import TwoLooks
from mmroute.gate.base import Decision, Policy, Rating, Route
from mmroute.serve.schema import Overrides
from mmroute.serve.settings import Settings

__all__ = ["Decider", "capped"]

Waiting = tuple[Rating, str, "asyncio.Future[Decision]"]


class Decider:
    """The live policy of one process. Replaced whole where a reload changes it: its window then starts anew."""

    def __init__(self, settings: Settings, first_threshold: Callable[[float], float | None] | None = None) -> None:
        """Raises ConfigError: no such policy, or an option it does not have.

        Args:
            first_threshold: of a budget, where calibration knows it; used until the window has filled.
        """
        self._made_of = _parts(settings)
        options = dict(settings.policy)
        if "name" not in options:
            raise ConfigError("serve.policy: no name given; e.g. {name: budget, budget: 0.4}")
        self.looks: TwoLooks | None = None
        """A second look at finished answers, where the settings ask for one."""
        if settings.verify != "none":
            del options["name"]
            self.looks = TwoLooks(Budget(**options), settings.verify_share, first_threshold)
            self.policy: Policy = self.looks.first
        else:
            if options["name"] == "budget" and first_threshold is not None:
                options.setdefault("start", first_threshold(options.get("budget", Budget.Config().budget)))
            self.policy = policy(**options)
        self.budget: float | None = None
        """Share that the policy is asked to keep, if it keeps one."""
        if not self.is_constant:
            self.policy.on_unrated = settings.on_unrated
        inner = self.policy.inner if isinstance(self.policy, Shadow) else self.policy
        if isinstance(inner, Budget | MicroBatch):
            self.budget = inner.config.budget if self.looks is None else self.looks.budget
        self._batch: Batch | None = None
        if isinstance(inner, MicroBatch):
            self._batch = Batch(inner.config.max_n, inner.config.max_wait_ms / 1000)
        self._timer: asyncio.TimerHandle | None = None
        # Requests may ask for a budget of their own, whatever the policy is: it is read off these scores.
        self.window = inner if isinstance(inner, Budget) else Budget(budget=0.5)
        self._watches = self.window is not inner

    @property
    def name(self) -> str:
        return self.policy.name

    def made_of(self, settings: Settings) -> bool:
        """Whether these settings would make the same policy."""
        return self._made_of == _parts(settings)

    @property
    def is_constant(self) -> bool:
        """Whether the answer is the same whatever the rating, so that none is asked for."""
        return isinstance(self.policy, Always)

    async def decide(self, rating: Rating | None, key: str, over: Overrides) -> Decision:
        """Who answers. Only a request that asks for nothing itself moves the policy."""
        if rating is None or math.isnan(rating.score):
            return Decision(self.policy.on_unrated, "unrated")
        if over.threshold is not None:
            route: Route = "target" if rating.score > over.threshold else "draft"
            return Decision(route, "rating", rating.score, over.threshold)
        if over.weight is not None:
            return Utility(weight=over.weight).decide(rating, key=key)
        if over.budget is not None:
            first = over.budget if self.looks is None else self.looks.first_share(over.budget)
            return self.window.decide_at(rating, first, key)
        if self._watches:
            self.window.decide(rating, key=key)
        if self._batch is None:
            return self.policy.decide(rating, key=key)
        return await self._with_others(rating, key)

    def decide_again(self, score: float, key: str, over: Overrides) -> Decision:
        """Who answers a query whose draft has answered.

        Args:
            score: of `Verifier.score`.
        """
        assert self.looks is not None
        if over.threshold is not None:
            return Decision("target" if score > over.threshold else "draft", "verify", score, over.threshold)
        return replace(self.looks.decide_again(score, key, over.budget), reason="verify")

    async def _with_others(self, rating: Rating, key: str) -> Decision:
        assert self._batch is not None
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Decision] = loop.create_future()
        full = self._batch.add(loop.time(), (rating, key, told))
        if full is not None:
            self._settle(full)
        elif self._timer is None:
            self._timer = loop.call_at(self._batch.deadline or 0, self._due)
        return await told

    def _due(self) -> None:
        assert self._batch is not None
        self._timer = None
        self._settle(self._batch.due(math.inf) or [])

    def _settle(self, waiting: list[Waiting]) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        here = [w for w in waiting if not w[2].done()]  # the others' clients have left
        decisions = self.policy.decide_many([r for r, _, _ in here], [k for _, k, _ in here])
        for (_, _, told), decision in zip(here, decisions, strict=True):
            told.set_result(decision)


def _parts(settings: Settings) -> tuple[object, ...]:
    """What a decider is made of."""
    return settings.policy, settings.on_unrated, settings.verify, settings.verify_share


def capped(decision: Decision) -> Decision:
    """The same decision where the target has no place left."""
    return replace(decision, route="draft", reason="budget_cap")
