"""One chat request, from its body to its last byte: check, route, call, pass on; whatever goes wrong on the way.

One rule for leaving: the request is one task. When its client goes, the task is cancelled, and every `finally` on the
way out closes what it has open upstream.
"""

import asyncio
import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any

from mmroute.gate.base import Route
from mmroute.serve import raters, schema
from mmroute.serve.client import Client, Gone, Receive, Scope, Send, header, race, read_body
from mmroute.serve.limits import check_data_image
from mmroute.serve.opening import Opener
from mmroute.serve.routing import Router
from mmroute.serve.running import Running
from mmroute.serve.schema import ApiError, Asked
from mmroute.serve.turn import Turn
from mmroute.serve.upstreams import Fault, SessionReply

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
            gateway.at_target.discard(turn)
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
        self.opener = Opener(gateway, turn)
        self.router = Router(gateway, turn, self.opener)

    async def run(self, raw: bytes, headers: dict[str, str]) -> None:
        turn = self.turn
        turn.policy, turn.artifact = self.router.live.decider.name, self.router.live.artifact
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
        over = asked.over
        self.turn.own = any(each is not None for each in (over.budget, over.threshold, over.weight))

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

    async def _decide_only(self, asked: Asked) -> None:
        _, running = await self.router.route(asked)
        if running is not None:
            await running.aclose()
        self.turn.outcome, self.turn.status = "ok", 200
        await self.client.whole(200, json.dumps(self.turn.facts()).encode(), self.turn.headers())

    # ------------------------------------------------------------------ the answer

    async def _answer(self, asked: Asked) -> None:
        route, running = await self.router.route(asked)
        try:
            if running is None:
                running = await self._open_answer(route, asked)
            if self.router.looks_again:
                await running.read_all(self.settings.timeouts.between_bytes_s)
                if self.router.look_again(running, asked):
                    await running.aclose()
                    route, running = "target", None
                    running = await self._open_answer(route, asked)
            await self._pass(running, asked)
        except Fault as fault:
            if running is not None:
                self.opener.blame(running.upstream, fault)
                await running.aclose()
            if not self._may_fall_back(route, fault, asked):
                raise
            log.info("request %s: %s, so the %s answers", self.turn.request_id, fault, _OTHER[route])
            self.turn.fallback = (route, fault.reason)
            running = await self._open_answer(self.router.chosen(_OTHER[route], "fallback"), asked)
            await self._pass(running, asked)
        finally:
            if running is not None:
                await running.aclose()

    def _may_fall_back(self, failed: Route, fault: Fault, asked: Asked) -> bool:
        """Whether the other model may answer instead: the client has seen nothing, and would not be told the same."""
        if self.client.started or self.router.forced or self.turn.fallback or fault.ours or fault.status == 429:
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
        looks = self.router.looks_again and route == "draft"
        stream = asked.stream or upstream.streams_only or looks
        body = raters.with_usage(asked.body) if stream else asked.body
        running = await self.opener.open(
            route, {**body, "stream": True, "logprobs": True} if looks else body, stream, trace=asked.over.debug
        )
        running.hide_logprobs = looks and not asked.body.get("logprobs")
        return running

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
