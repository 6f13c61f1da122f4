"""Who answers one request: named by its client, the only one that can, or chosen by a rating."""

import asyncio
from typing import TYPE_CHECKING

import numpy as np

from mmroute.gate.base import Decision, Rating, Route
from mmroute.serve import raters
from mmroute.serve.decide import capped
from mmroute.serve.opening import Opener
from mmroute.serve.peek import Peek
from mmroute.serve.running import Running
from mmroute.serve.schema import ApiError, Asked
from mmroute.serve.turn import Turn
from mmroute.serve.upstreams import Fault, SessionReply, SessionUpstream

if TYPE_CHECKING:
    from mmroute.serve.gateway import Gateway

__all__ = ["Router"]


class Router:
    """Routes one request; a draft that was rated on its own stream goes on with it."""

    def __init__(self, gateway: "Gateway", turn: Turn, opener: Opener) -> None:
        self.gateway, self.turn, self.opener = gateway, turn, opener
        self.settings = gateway.settings
        self.live = gateway.live  # one policy from end to end, whatever is reloaded meanwhile
        self.forced = False
        """Whether the client named the model."""
        self.looks_again = False
        """Whether the draft's answer is to be read to its end before the client sees any of it."""

    def _open_routes(self, asked: Asked) -> list[Route]:
        """Models that could take the request now; says why if that leaves no choice.

        Raises:
            ApiError: none can.
        """
        lacks = {role: up.lacks(asked) for role, up in self.gateway.upstreams.items()}
        able: list[Route] = [role for role in ("draft", "target") if lacks[role] is None]  # type: ignore[misc]
        if not able:
            raise ApiError(400, f"no model here can serve this: {lacks['target']} is missing", code="capability")
        awake = [role for role in able if self.gateway.upstreams[role].breaker.available]
        if not awake:
            waits = [self.gateway.upstreams[role].breaker.wait for role in able]
            raise ApiError(503, "no model can be reached at the moment", code="circuit_open", retry_after=min(waits))
        if len(able) == 1:
            self.turn.reason = "capability"
        elif len(awake) == 1:
            self.turn.reason = "circuit_open"
        return awake

    def _named(self, asked: Asked) -> Route | None:
        """The model that the client itself chose."""
        if asked.model in ("draft", "target"):
            return asked.model  # type: ignore[return-value]
        by_name = {up.name: role for role, up in self.gateway.upstreams.items()}
        return by_name.get(asked.model, asked.over.force)  # type: ignore[return-value]

    async def route(self, asked: Asked) -> tuple[Route, Running | None]:
        """The model that answers, and its stream if that is open already."""
        named = self._named(asked)
        if named is not None:
            missing = self.gateway.upstreams[named].lacks(asked)
            if missing is not None:
                raise ApiError(400, f"model {named} does not do this: {missing}", code="capability")
            self.forced = True
            return self.chosen(named, "forced"), None
        open_ = self._open_routes(asked)
        if len(open_) == 1:
            return self.chosen(open_[0], self.turn.reason), None
        decider = self.live.decider
        if decider.is_constant and not self.turn.own:
            route = decider.policy.on_unrated
            if route == "target" and self._is_full():
                return self.chosen("draft", "budget_cap"), None
            return self.chosen(route, "always"), None
        rated, running, reason = await self._rate(asked)
        try:
            self.turn.rated, self.turn.rating_s = rated, self.turn.elapsed
            decision = await decider.decide(rated, self.turn.request_id, asked.over)
            if reason is not None:
                decision = Decision("target" if reason == "fallback" else decision.route, reason)
            if decision.route == "target" and decision.reason != "fallback" and self._is_full():
                decision = capped(decision)
            self.turn.decision = decision
            self.chosen(decision.route, decision.reason)
            self.looks_again = decision.route == "draft" and self._can_look_again(rated, decision, asked)
            if decision.route == "draft":
                if running is not None and isinstance(running.reply, SessionReply):
                    running.reply.resume()
                return "draft", running
            if running is not None:
                self._count_waste(running)
                await running.aclose()
            return "target", None
        except BaseException:
            if running is not None:
                await running.aclose()
            raise

    def _can_look_again(self, rated: Rating | None, decision: Decision, asked: Asked) -> bool:
        if rated is None or decision.reason != "rating" or asked.over.weight is not None:
            return False  # a request with a price of its own keeps no budget that a second look could share
        return self.live.decider.looks is not None

    def look_again(self, running: Running, asked: Asked) -> bool:
        """Whether the target answers after all; the draft's answer has been read to its end."""
        rated, verifier, lp = self.turn.rated, self.live.verifier, running.logprobs
        if rated is None or rated.draft is None or verifier is None or not lp:
            return False  # a server that sends no log-probabilities leaves nothing to look at
        target = None if rated.target is None else np.array([rated.target])
        score = float(verifier.score(np.array([rated.draft]), target, np.array([sum(lp) / len(lp)]))[0])
        decision = self.live.decider.decide_again(score, self.turn.request_id, asked.over)
        if decision.route == "target" and self._is_full():
            return False
        if decision.route == "draft":
            return False
        self.turn.decision = decision
        self.chosen("target", "verify")
        self.turn.wasted_tokens = running.written
        if isinstance(running.reply, SessionReply) and running.reply.report is not None:
            self.turn.rating_flops = running.reply.report["flops"]
        return True

    def _is_full(self) -> bool:
        """Whether the target has as many requests, or has cost as much, as this replica may give it."""
        most, usd = self.settings.own_target_in_flight, self.settings.own_target_usd_per_hour
        if most is not None and len(self.gateway.at_target) >= most:
            return True
        return usd is not None and self.gateway.book.on_target.last_hour >= usd

    def chosen(self, route: Route, reason: str) -> Route:
        self.turn.route, self.turn.reason = route, reason
        self.turn.model = self.gateway.upstreams[route].name
        (self.gateway.at_target.add if route == "target" else self.gateway.at_target.discard)(self.turn)
        self.gateway.book.decided(self.turn)
        return route

    def _count_waste(self, running: Running) -> None:
        self.turn.wasted_tokens = running.rating_tokens
        if isinstance(running.reply, SessionReply):
            self.turn.rating_flops = running.reply.prefill_flops

    async def _rate(self, asked: Asked) -> tuple[Rating | None, Running | None, str | None]:
        """The draft's rating, its stream if that can go on as the answer, and why there is no rating."""
        opened: list[Running] = []
        mode = self.settings.rates_by
        try:
            async with asyncio.timeout(self.settings.timeouts.rating_s):
                if mode == "inprocess":
                    return *await self._rate_session(asked, opened), None
                if mode == "rate_call" or raters.must_call(asked):
                    return await self._rate_call(asked), None, None
                return *await self._rate_head(asked, opened), None
        except TimeoutError:
            self.gateway.upstreams["draft"].breaker.bad()
            reason = "rater_timeout"
        except Fault as fault:
            if fault.ours or fault.status == 429:
                raise
            reason = "fallback"
            self.turn.fallback = ("draft", fault.reason)
        except BaseException:
            for running in opened:
                await running.aclose()
            raise
        for running in opened:
            await running.aclose()
        return None, None, reason

    async def _rate_session(self, asked: Asked, opened: list[Running]) -> tuple[Rating | None, Running]:
        draft = self.gateway.upstreams["draft"]
        assert isinstance(draft, SessionUpstream)
        self.turn.attempts += 1
        body = asked.body if self.live.decider.looks is None else {**asked.body, "logprobs": True}
        reply = draft.begin(body, self.turn.request_id, park=True, trace=asked.over.debug)
        running = Running(draft, reply)
        running.hide_logprobs = not asked.body.get("logprobs")
        opened.append(running)
        return await reply.rated(), running

    async def _rate_call(self, asked: Asked) -> Rating | None:
        running = await self.opener.open("draft", raters.call_body(asked, self.settings), stream=False)
        try:
            rated = raters.read_call(running.whole or {}, self.settings.num_ratings)
            return raters.rating(rated, self.settings, self.live.known)
        finally:
            await running.aclose()

    async def _rate_head(self, asked: Asked, opened: list[Running]) -> tuple[Rating | None, Running]:
        running = await self.opener.open("draft", raters.peek_body(asked, self.settings), stream=True)
        opened.append(running)
        running.hide_logprobs = not asked.body.get("logprobs")
        peek = Peek(self.settings.num_ratings)
        while peek.state == "open":
            try:
                chunk = await running.chunk()
            except Fault as fault:
                self.opener.blame(running.upstream, fault)
                raise
            if chunk is None:
                break
            peek.feed(chunk)
        rated = raters.rating(peek.rated if peek.state == "rated" else None, self.settings, self.live.known)
        running.put_back(peek.held())
        running.rating_tokens = peek.tokens
        return rated, running
