"""One chat request, from its body to its last byte: check, rate, decide, call, pass on; whatever goes wrong on the way.

One rule for leaving: the request is one task. When its client goes, the task is cancelled, and every `finally` on the
way out closes what it has open upstream.
"""

import asyncio
import hashlib
import json
import logging
import random
from typing import TYPE_CHECKING, Any

from mmroute.gate.base import Decision, Rating, Route
from mmroute.serve import raters, schema
from mmroute.serve.client import Client, Gone, Receive, Scope, Send, header, race, read_body
from mmroute.serve.decide import capped
from mmroute.serve.limits import check_data_image
from mmroute.serve.peek import Peek
from mmroute.serve.running import Running
from mmroute.serve.schema import ApiError, Asked
from mmroute.serve.turn import Turn
from mmroute.serve.upstreams import Fault, SessionReply, SessionUpstream, Upstream

if TYPE_CHECKING:
    from mmroute.serve.gateway import Gateway

__all__ = ["Chat"]

log = logging.getLogger(__name__)

_OTHER: dict[Route, Route] = {"draft": "target", "target": "draft"}


class Chat:
    """The ASGI endpoint of `/v1/chat/completions`; with `decides_only`, of `/v1/route`."""

    def __init__(self, gateway: "Gateway", decides_only: bool = False) -> None:
        self.gateway, self.decides_only = gateway, decides_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway = self.gateway
        turn = Turn(request_id=gateway.request_id(header(scope, "x-request-id")))
        client = Client(send, gateway.settings.timeouts.keep_alive_s)
        try:
            gateway.check_key(header(scope, "authorization"))
            body = await read_body(scope, receive, gateway.settings.limits.body_bytes)
        except Gone:
            return
        except ApiError as error:
            await _refuse(client, turn, error)
            return
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"] if k.startswith(b"x-mmroute-")}
        exchange = _Exchange(gateway, turn, client, self.decides_only)
        work = asyncio.create_task(exchange.run(body, headers))
        gateway.tasks.add(work)
        try:
            await race(work, receive)
        finally:
            gateway.tasks.discard(work)
            client.stop()
            if not self.decides_only:
                gateway.book.close(turn)


async def _refuse(client: Client, turn: Turn, error: ApiError) -> None:
    """An error as the client must see it: a status before the first byte, an event after it."""
    turn.status = error.status
    if client.started:
        await client.end(error.payload)
        return
    headers = turn.headers()
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, round(error.retry_after)))
    await client.whole(error.status, error.payload, headers)


def _as_error(fault: Fault) -> ApiError:
    return ApiError(fault.status, str(fault), code=fault.reason, retry_after=fault.retry_after, body=fault.body)


class _Exchange:
    """The life of one admitted request."""

    def __init__(self, gateway: "Gateway", turn: Turn, client: Client, decides_only: bool) -> None:
        self.gateway, self.turn, self.client, self.decides_only = gateway, turn, client, decides_only
        self.settings = gateway.settings
        self.live = gateway.live  # one policy from end to end, whatever is reloaded meanwhile
        self.forced = False

    async def run(self, raw: bytes, headers: dict[str, str]) -> None:
        turn = self.turn
        turn.policy, turn.artifact = self.live.decider.name, self.live.artifact
        try:
            async with self.gateway.admission(), asyncio.timeout(self.settings.timeouts.total_s):
                asked = schema.parse(raw, self.settings.limits, self.gateway.served, headers)
                self._remember(asked)
                await self._admit_images(asked)
                await (self._decide_only(asked) if self.decides_only else self._answer(asked))
        except asyncio.CancelledError:
            if not self.gateway.expired:
                turn.outcome, turn.status = "gone", 499
                raise
            await self._fail(ApiError(503, "the gateway is shutting down", code="draining"))
        except ApiError as error:
            await self._fail(error)
        except Fault as fault:
            await self._fail(_as_error(fault))
        except TimeoutError:
            seconds = self.settings.timeouts.total_s
            await self._fail(ApiError(504, f"no whole answer in {seconds:g} s", code="timeout"))
        except Exception:  # the process' boundary: one request's fault is not the others'
            log.exception("request %s failed", turn.request_id)
            await self._fail(ApiError(500, "the gateway failed; its log says why", code="internal"))

    async def _fail(self, error: ApiError) -> None:
        """Written down, then sent: who has seen the error finds it in the log."""
        self.turn.status = error.status
        if not self.decides_only:
            self.gateway.book.close(self.turn)
        await _refuse(self.client, self.turn, error)

    def _remember(self, asked: Asked) -> None:
        kept = self.settings.replay_content
        if self.settings.replay_log is not None and kept != "none":
            text = json.dumps(asked.body["messages"], sort_keys=True).encode()
            self.turn.prompt_hash = hashlib.sha256(text).hexdigest()
            if kept == "full":
                self.turn.prompt = asked.body["messages"]
        self.turn.own = asked.over.budget is not None or asked.over.threshold is not None

    async def _admit_images(self, asked: Asked) -> None:
        for image in asked.images:
            url = image["url"]
            if url.startswith("data:"):
                if len(url) > 2**18:  # decoding megabytes would hold up every other request
                    await asyncio.to_thread(check_data_image, url, self.settings.limits)
                else:
                    check_data_image(url, self.settings.limits)
            elif not url.startswith(("http://", "https://")):
                raise ApiError(
                    400, "an image is a data: or an http(s) address", param="image_url", code="invalid_image"
                )
            elif self.gateway.image_urls == "refuse":
                raise ApiError(400, "image addresses are not taken here; send a data: address", param="image_url")
            elif self.gateway.image_urls == "fetch":
                image["url"] = await self.gateway.fetcher.fetch(url)
            else:
                await self.gateway.fetcher.allowed(url)

    # ------------------------------------------------------------------ who answers

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

    async def _route(self, asked: Asked) -> tuple[Route, Running | None]:
        """The model that answers, and its stream if that is open already."""
        named = self._named(asked)
        if named is not None:
            missing = self.gateway.upstreams[named].lacks(asked)
            if missing is not None:
                raise ApiError(400, f"model {named} does not do this: {missing}", code="capability")
            self.forced = True
            return self._chosen(named, "forced"), None
        open_ = self._open_routes(asked)
        if len(open_) == 1:
            return self._chosen(open_[0], self.turn.reason), None
        decider = self.live.decider
        if decider.is_constant:
            return self._chosen(decider.policy.on_unrated, "always"), None
        rated, running, reason = await self._rate(asked)
        try:
            self.turn.rated, self.turn.rating_s = rated, self.turn.elapsed
            decision = await decider.decide(rated, self.turn.request_id, asked.over)
            if reason is not None:
                decision = Decision("target" if reason == "fallback" else decision.route, reason)
            target = self.gateway.upstreams["target"]
            full = self.settings.target_in_flight
            if decision.route == "target" and full is not None and target.in_flight >= full:
                decision = capped(decision)
            self.turn.decision = decision
            self._chosen(decision.route, decision.reason)
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

    def _chosen(self, route: Route, reason: str) -> Route:
        self.turn.route, self.turn.reason = route, reason
        self.turn.model = self.gateway.upstreams[route].name
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
        reply = draft.begin(asked.body, self.turn.request_id, park=True, trace=asked.over.debug)
        running = Running(draft, reply)
        draft.in_flight += 1
        opened.append(running)
        return await reply.rated(), running

    async def _rate_call(self, asked: Asked) -> Rating | None:
        running = await self._open("draft", raters.call_body(asked, self.settings), stream=False)
        try:
            rated = raters.read_call(running.whole or {}, self.settings.num_ratings)
            return raters.rating(rated, self.settings)
        finally:
            await running.aclose()

    async def _rate_head(self, asked: Asked, opened: list[Running]) -> tuple[Rating | None, Running]:
        running = await self._open("draft", raters.peek_body(asked, self.settings), stream=True)
        opened.append(running)
        running.hide_logprobs = not asked.body.get("logprobs")
        peek = Peek(self.settings.num_ratings)
        while peek.state == "open":
            try:
                chunk = await running.chunk()
            except Fault as fault:
                self._blame(running.upstream, fault)
                raise
            if chunk is None:
                break
            peek.feed(chunk)
        rated = raters.rating(peek.rated if peek.state == "rated" else None, self.settings)
        running.put_back(peek.held())
        running.rating_tokens = peek.tokens
        return rated, running

    async def _decide_only(self, asked: Asked) -> None:
        _, running = await self._route(asked)
        if running is not None:
            await running.aclose()
        self.turn.outcome, self.turn.status = "ok", 200
        await self.client.whole(200, json.dumps(self.turn.facts()).encode(), self.turn.headers())

    # ------------------------------------------------------------------ the answer

    async def _answer(self, asked: Asked) -> None:
        route, running = await self._route(asked)
        try:
            if running is None:
                running = await self._open_answer(route, asked)
            await self._pass(running, asked)
        except Fault as fault:
            if running is not None:
                self._blame(running.upstream, fault)
                await running.aclose()
            if not self._may_fall_back(route, fault, asked):
                raise
            log.info("request %s: %s, so the %s answers", self.turn.request_id, fault, _OTHER[route])
            self.turn.fallback = (route, fault.reason)
            running = await self._open_answer(self._chosen(_OTHER[route], "fallback"), asked)
            await self._pass(running, asked)
        finally:
            if running is not None:
                await running.aclose()

    def _may_fall_back(self, failed: Route, fault: Fault, asked: Asked) -> bool:
        """Whether the other model may answer instead: the client has seen nothing, and would not be told the same."""
        if self.client.started or self.forced or self.turn.fallback or fault.ours or fault.status == 429:
            return False
        spare = self.gateway.upstreams[_OTHER[failed]]
        return spare.lacks(asked) is None and spare.breaker.available

    async def _pass(self, running: Running, asked: Asked) -> None:
        if running.whole is not None:
            await self._pass_whole(running.whole, asked)
        elif asked.stream:
            await self._pass_events(running, asked)
        else:
            await self._pass_assembled(running, asked)

    async def _open_answer(self, route: Route, asked: Asked) -> Running:
        upstream = self.gateway.upstreams[route]
        stream = asked.stream or upstream.streams_only
        body = raters.with_usage(asked.body) if stream else asked.body
        return await self._open(route, body, stream, trace=asked.over.debug)

    async def _open(self, role: Route, body: dict[str, Any], stream: bool, trace: bool = False) -> Running:
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
                self._blame(upstream, fault)
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
        upstream.in_flight += 1
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
            else:
                upstream.in_flight -= 1
            if isinstance(error, TimeoutError):
                raise Fault("timeout", f"{upstream.role}: nothing came in {seconds:g} s", status=504) from None
            raise
        return running

    def _blame(self, upstream: Upstream, fault: Fault) -> None:
        if fault.ours:
            upstream.breaker.leave()
        elif fault.status == 429:
            upstream.breaker.hold(fault.retry_after or 0.0)
            upstream.breaker.leave()
        else:
            upstream.breaker.bad()

    async def _pass_whole(self, answer: dict[str, Any], asked: Asked) -> None:
        self._mark_first()
        self._count(answer.get("usage"))
        await self._last_whole(answer, asked)

    async def _pass_assembled(self, running: Running, asked: Asked) -> None:
        chunks = []
        async for chunk in running.chunks(self.settings.timeouts.between_bytes_s):
            self._mark_first()
            chunks.append(chunk)
        self._count(running.usage)
        if isinstance(running.reply, SessionReply):
            self.turn.report = running.reply.report
        await self._last_whole(schema.assemble(chunks), asked)

    async def _last_whole(self, answer: dict[str, Any], asked: Asked) -> None:
        if asked.over.debug:
            answer["mmroute"] = self._told()
        self._done()
        await self.client.whole(200, json.dumps(answer).encode(), self.turn.headers())

    async def _pass_events(self, running: Running, asked: Asked) -> None:
        head: dict[str, Any] = {}
        async for chunk in running.chunks(self.settings.timeouts.between_bytes_s):
            if not self.client.started:
                self._mark_first()
                await self.client.start_events(self.turn.headers())
                head = {k: chunk.get(k) for k in ("id", "created", "model")}
            if not asked.wants_usage:
                chunk.pop("usage", None)
                if not chunk["choices"]:
                    continue
            await self.client.event(json.dumps(chunk).encode())
        self._count(running.usage)
        if isinstance(running.reply, SessionReply):
            self.turn.report = running.reply.report
        told = []
        if asked.over.debug:
            told.append({**head, "object": "chat.completion.chunk", "choices": [], "mmroute": self._told()})
        if not self.client.started:
            raise Fault("malformed", f"{running.upstream.role}: the stream held no event")
        self._done()
        await self.client.end(*(json.dumps(each).encode() for each in told), schema.DONE)

    def _told(self) -> dict[str, Any]:
        return {**self.turn.facts(), "wasted_draft_tokens": self.turn.wasted_tokens, "run": self.turn.report}

    def _mark_first(self) -> None:
        if self.turn.first_byte_s is None:
            self.turn.first_byte_s = self.turn.elapsed
            self.gateway.book.ttft.labels(self.turn.route).observe(self.turn.first_byte_s)

    def _count(self, usage: Any) -> None:
        if isinstance(usage, dict):
            self.turn.tokens_in, self.turn.tokens_out = usage.get("prompt_tokens"), usage.get("completion_tokens")

    def _done(self) -> None:
        """Written down before the last byte goes out: who has the whole answer finds it in the log."""
        self.turn.outcome, self.turn.status = "ok", 200
        self.gateway.book.close(self.turn)
