"""An answer begun: attempts, waits and the circuit breaker, all before the client has seen a byte."""

import asyncio
import random
from typing import TYPE_CHECKING, Any

from mmroute.gate.base import Route
from mmroute.serve.running import Running
from mmroute.serve.turn import Turn
from mmroute.serve.upstreams import Fault, SessionUpstream, Upstream

if TYPE_CHECKING:
    from mmroute.serve.gateway import Gateway

__all__ = ["Opener"]


class Opener:
    """Opens answers for one request."""

    def __init__(self, gateway: "Gateway", turn: Turn) -> None:
        self.gateway, self.turn, self.settings = gateway, turn, gateway.settings

    async def open(self, role: Route, body: dict[str, Any], stream: bool, trace: bool = False) -> Running:
        """An answer with its first event in hand, after as many attempts as are allowed.

        Raises:
            Fault: of the last attempt.
        """
        upstream, retries = self.gateway.upstreams[role], self.settings.retries
        self.gateway.retry_budget.request()
        backoff = retries.backoff_s
        for attempt in range(1, retries.attempts + 1):
            if not upstream.breaker.enter():
                raise Fault(
                    "circuit_open", f"{role} is left alone for now", status=503, retry_after=upstream.breaker.wait
                )
            self.turn.attempts += 1
            try:
                running = await self._first(upstream, body, stream, trace)
            except Fault as fault:
                self.blame(upstream, fault)
                self.gateway.book.attempt(role, fault.reason)
                wait = fault.retry_after if fault.retry_after is not None else random.uniform(0, backoff)
                last = attempt == retries.attempts or not fault.retryable or wait > retries.retry_after_cap_s
                if last or not self.gateway.retry_budget.take():
                    raise
            except BaseException:
                upstream.breaker.leave()
                raise
            else:
                upstream.breaker.good()
                self.gateway.book.attempt(role, "200")
                return running
            backoff = min(2 * backoff, retries.backoff_cap_s)
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _first(self, upstream: Upstream, body: dict[str, Any], stream: bool, trace: bool) -> Running:
        seconds = self.settings.timeouts.first_byte_s
        running: Running | None = None
        try:
            async with asyncio.timeout(seconds):
                if isinstance(upstream, SessionUpstream):
                    reply: Any = upstream.begin(body, self.turn.request_id, park=False, trace=trace)
                else:
                    reply = await upstream.open(body, stream, self.turn.request_id)
                running = Running(upstream, reply)
                await running.begin(stream)
        except BaseException as error:
            if running is not None:
                await running.aclose()
            if isinstance(error, TimeoutError):
                raise Fault("timeout", f"{upstream.role}: nothing came in {seconds:g} s", status=504) from None
            raise
        return running

    def blame(self, upstream: Upstream, fault: Fault) -> None:
        if fault.ours:
            upstream.breaker.leave()
        elif fault.status == 429:
            upstream.breaker.hold(fault.retry_after or 0.0)
            upstream.breaker.leave()
        else:
            upstream.breaker.bad()
