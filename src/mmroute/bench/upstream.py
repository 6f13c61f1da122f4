"""A scripted OpenAI-compatible server for load and fault runs: the request says what it does, it counts what it did.

A request may carry `script: {"draft": {...}, "target": {...}}`; gateways pass unknown fields on. The answer is made of
the last user text, so that a lost, doubled or mixed-up one is seen.

    python -m mmroute.bench.upstream --role draft --port 9101
"""

import asyncio
import json
import math
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import typer

__all__ = ["Script", "ScriptedUpstream", "expected_answer"]

Message = MutableMapping[str, Any]


@dataclass(frozen=True)
class Script:
    """What one role does with one request."""

    first_s: float = 0.0
    """Before the headers."""
    gap_s: float = 0.0
    """Between events."""
    tokens: int = 8
    """Of the answer, the rating not counted."""
    fail: int = 0
    """Status of the first `times` calls of a request, instead of an answer."""
    times: int = 1_000_000
    retry_after: float | None = None
    hang: bool = False
    """Never answers."""
    cut_after: int | None = None
    """Drops the connection behind so many events."""
    malformed_after: int | None = None
    """Sends an event that is not JSON."""
    error_after: int | None = None
    """Sends an error event."""
    no_done: bool = False
    rating: str | None = None
    """What stands at the head when a rating is asked for; None: two digits by the text's hash and a newline."""
    field: str = "content"
    """Field of the delta that holds the rating."""
    split: int = 0
    """Cuts the bytes of the stream into pieces of this size; 0 sends whole events."""
    rating_split: bool = True
    """One event a character of the rating, else one for all of it and the first word."""
    no_logprobs: bool = False
    word_logprob: float = 0.0
    """Log-probability of every token of the answer."""


@dataclass
class Counts:
    """Calls by how they ended; `running` is what has not."""

    started: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    running: int = 0


def _question(body: dict[str, Any]) -> str:
    content = next(m["content"] for m in reversed(body["messages"]) if m["role"] == "user")
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


def expected_answer(role: str, question: str, tokens: int = 8) -> str:
    """What a client must get, to the letter."""
    return "".join(_words(role, question, tokens))


def _words(role: str, question: str, tokens: int) -> list[str]:
    return [role, *(f" {question}/{i}" for i in range(1, tokens))]


@dataclass
class ScriptedUpstream:
    """The ASGI application of one role."""

    role: str
    default: Script = Script()
    counts: Counts = field(default_factory=Counts)
    seen: Counter[str] = field(default_factory=Counter)
    """Whole answers by question."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """The last requests, as they came."""
    _calls: Counter[str] = field(default_factory=Counter)

    async def __call__(self, scope: Message, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
        if scope["path"].endswith("/models"):
            await _whole(send, 200, {"object": "list", "data": []})
        elif scope["path"] == "/counts":
            await _whole(send, 200, {**asdict(self.counts), "seen": dict(self.seen)})
        else:
            await self._chat(scope, receive, send)

    async def _chat(self, scope: Message, receive: Any, send: Any) -> None:
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(raw)
        self.bodies = [*self.bodies[-99:], body]
        script = Script(**{**asdict(self.default), **(body.get("script") or {}).get(self.role, {})})
        self.counts.started += 1
        self.counts.running += 1
        work = asyncio.ensure_future(self._answer(body, script, scope, send))
        gone = asyncio.ensure_future(receive())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.counts.cancelled += 1
            elif work.exception() is not None:
                self.counts.failed += 1
            else:
                self.counts.finished += 1
        finally:
            self.counts.running -= 1
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        if work.done() and not work.cancelled() and isinstance(work.exception(), ConnectionAbortedError):
            raise ConnectionAbortedError  # the server then drops the connection, as a dying process does

    async def _answer(self, body: dict[str, Any], script: Script, scope: Message, send: Any) -> None:
        if script.hang:
            await asyncio.Event().wait()
        await asyncio.sleep(script.first_s)
        name = dict(scope["headers"]).get(b"x-request-id", b"").decode() or _question(body)
        self._calls[name] += 1
        if script.fail and self._calls[name] <= script.times:
            headers = [] if script.retry_after is None else [(b"retry-after", str(script.retry_after).encode())]
            await _whole(send, script.fail, {"error": {"message": "scripted", "type": "server_error"}}, headers)
            raise RuntimeError("scripted")
        events = list(self._events(body, script))
        if not body.get("stream"):
            await asyncio.sleep(script.gap_s * len(events))
            if script.cut_after is not None:
                raise ConnectionAbortedError
            if script.malformed_after is not None or script.error_after is not None:
                await _whole(send, 200, {"error": "scripted"} if script.malformed_after is None else "half a body")
                return
            await self._json(body, events, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number, event in enumerate(events):
            if number == script.cut_after:
                raise ConnectionAbortedError
            if number == script.malformed_after:
                event = b'{"id": "half'
            if number == script.error_after:
                event = json.dumps({"error": {"message": "scripted", "type": "server_error"}}).encode()
            await self._send(send, b"data: " + event + b"\n\n", script.split)
            if script.gap_s:
                await asyncio.sleep(script.gap_s)
        self.seen[_question(body)] += 1
        await send({"type": "http.response.body", "body": b"" if script.no_done else b"data: [DONE]\n\n"})

    async def _send(self, send: Callable[[Message], Awaitable[None]], data: bytes, size: int) -> None:
        for at in range(0, len(data), size or len(data)):
            piece = data[at : at + (size or len(data))]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            if size:
                await asyncio.sleep(0)

    async def _json(self, body: dict[str, Any], events: list[bytes], send: Any) -> None:
        chunks = [json.loads(e) for e in events]
        pieces = [c["choices"][0] for c in chunks if c["choices"]]
        message = {"role": "assistant", "content": "".join(p["delta"].get("content") or "" for p in pieces)}
        entries = [e for p in pieces for e in (p.get("logprobs") or {}).get("content") or ()]
        choice = {"index": 0, "message": message, "finish_reason": pieces[-1]["finish_reason"]}
        choice["logprobs"] = {"content": entries} if body.get("logprobs") else None
        whole = {k: chunks[0][k] for k in ("id", "created", "model")} | {"object": "chat.completion"}
        usage = next((c["usage"] for c in chunks if c.get("usage")), self._usage(len(pieces) - 2))
        self.seen[_question(body)] += 1
        await _whole(send, 200, {**whole, "choices": [choice], "usage": usage})

    def _usage(self, written: int) -> dict[str, int]:
        return {"prompt_tokens": 10, "completion_tokens": written, "total_tokens": 10 + written}

    def _events(self, body: dict[str, Any], script: Script) -> Iterator[bytes]:
        """Payloads of the stream."""
        question = _question(body)
        head = {
            "id": f"chatcmpl-{question[:40]}",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": body["model"],
        }
        tokens = [("content", t) for t in _words(self.role, question, script.tokens)]
        if (body.get("chat_template_kwargs") or {}).get("mmroute_rating"):
            rating = script.rating
            if rating is None:
                rating = f"{zlib.crc32(question.encode()) % 100:02d}\n"
            if script.rating_split:
                tokens = [(script.field, c) for c in rating] + tokens
            else:
                tokens = [("content", rating + tokens[0][1]), *tokens[1:]]
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(tokens)
        cut = len(tokens) > limit
        tokens = tokens[:limit]
        yield self._event(head, {"role": "assistant", "content": ""})
        for name, text in tokens:
            logprobs = None
            if body.get("logprobs") and not script.no_logprobs:
                logprobs = {"content": [_entry(text, body.get("top_logprobs") or 0, script.word_logprob)]}
            yield self._event(head, {name: text}, logprobs=logprobs)
        yield self._event(head, {}, finish="length" if cut else "stop")
        if (body.get("stream_options") or {}).get("include_usage"):
            yield json.dumps({**head, "choices": [], "usage": self._usage(len(tokens))}).encode()

    def _event(
        self, head: dict[str, Any], delta: dict[str, Any], finish: str | None = None, logprobs: Any = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return json.dumps({**head, "choices": [choice]}).encode()


def _entry(text: str, top: int, word_logprob: float) -> dict[str, Any]:
    """A token's log-probabilities: .7 on itself, .3 on the next digit up where it is one."""
    own = {"token": text, "logprob": math.log(0.7) if text.isdigit() else word_logprob, "bytes": None}
    other = {"token": str(min(9, int(text) + 1)), "logprob": math.log(0.3), "bytes": None} if text.isdigit() else None
    return {**own, "top_logprobs": [own, *([other] if other else [])][:top]}


async def _whole(send: Any, status: int, body: Any, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    raw = json.dumps(body).encode()
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": fixed + (headers or [])})
    await send({"type": "http.response.body", "body": raw})


def main(
    role: Annotated[str, typer.Option(help="draft or target; first word of its answers.")] = "draft",
    port: Annotated[int, typer.Option(help="On loopback.")] = 9101,
    gap_s: Annotated[float, typer.Option(help="Seconds between events.")] = 0.0,
) -> None:
    """Serves until interrupted."""
    import uvicorn

    app = ScriptedUpstream(role, Script(gap_s=gap_s))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical", access_log=False)  # type: ignore[arg-type]


if __name__ == "__main__":
    typer.run(main)
