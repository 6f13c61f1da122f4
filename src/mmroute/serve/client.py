"""The client's side of one request: its body in, headers and bytes out, and whether it is still there."""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from mmroute.serve.schema import ApiError
from mmroute.serve.sse import KEEP_ALIVE, encode

__all__ = ["Client", "Gone", "Receive", "Scope", "Send", "header", "race", "read_body", "respond"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_DRAIN_BYTES, _DRAIN_S = 512 * 2**20, 10


class Gone(Exception):
    """The client has left."""


def header(scope: Scope, name: str) -> str:
    wanted = name.encode()
    return next((v.decode("latin-1") for k, v in scope["headers"] if k == wanted), "")


async def read_body(scope: Scope, receive: Receive, most: int, seconds: float = 60) -> bytes:
    """The whole body.

    Raises:
        ApiError: 413; what is left of it is read and forgotten first, or the client would see a reset and no answer.
        Gone: it left while sending.
    """
    declared = header(scope, "content-length")
    too_large = declared.isdigit() and int(declared) > most
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(_DRAIN_S if too_large else seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                piece = message.get("body", b"")
                size += len(piece)
                too_large = too_large or size > most
                if too_large:
                    pieces.clear()
                else:
                    pieces.append(piece)
                if not message.get("more_body") or size > _DRAIN_BYTES:
                    break
    except TimeoutError:
        if not too_large:
            raise ApiError(408, "the body did not come in time") from None
    if too_large:
        raise ApiError(413, f"the body is larger than {most} bytes", code="body_too_large")
    return b"".join(pieces)


async def left(receive: Receive) -> None:
    """Returns when the client has left; the body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def respond(send: Send, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
    """A whole response."""
    await send({"type": "http.response.start", "status": status, "headers": _raw(kind, headers or {}, len(body))})
    await send({"type": "http.response.body", "body": body})


def _raw(kind: str, headers: Mapping[str, str], length: int | None = None) -> list[tuple[bytes, bytes]]:
    out = [(b"content-type", kind.encode())]
    if length is not None:
        out.append((b"content-length", str(length).encode()))
    # A model's name may hold what a header may not.
    return out + [(k.encode(), v.encode("ascii", "replace").replace(b"\n", b" ")) for k, v in headers.items()]


class Client:
    """Sends one answer, whole or as events; nothing is queued: each send waits until the client has taken it."""

    def __init__(self, send: Send, keep_alive_s: float) -> None:
        self._send, self._keep_alive_s = send, keep_alive_s
        self.started = False
        self._last = 0.0
        self._timer: asyncio.Task[None] | None = None

    async def whole(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.started = True
        await respond(self._send, status, body, "application/json", headers)

    async def start_events(self, headers: Mapping[str, str]) -> None:
        self.started = True
        raw = _raw("text/event-stream", {"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})
        self._last = time.monotonic()
        self._timer = asyncio.create_task(self._keep_alive())

    async def event(self, payload: bytes) -> None:
        self._last = time.monotonic()
        await self._send({"type": "http.response.body", "body": encode(payload), "more_body": True})

    async def end(self, *payloads: bytes) -> None:
        """The last events, in one piece with the end."""
        self.stop()
        await self._send({"type": "http.response.body", "body": b"".join(map(encode, payloads))})

    async def _keep_alive(self) -> None:
        while True:
            await asyncio.sleep(max(0.01, self._last + self._keep_alive_s - time.monotonic()))
            if time.monotonic() - self._last >= self._keep_alive_s:
                self._last = time.monotonic()
                await self._send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


async def race(work: "asyncio.Task[None]", receive: Receive) -> bool:
    """Runs a task until it ends or the client leaves, whichever is first; it has ended when this returns.

    Returns:
        Whether the client left.

    Starlette tells a handler nothing before its response starts: only a watcher of `receive` sees a client leave a
    request that has not been answered yet.
    """
    gone = asyncio.create_task(left(receive))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        return gone.done() and not work.done()
    finally:
        for task in (gone, work):
            if not task.done():
                task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
        with contextlib.suppress(asyncio.CancelledError):
            if work.exception() is not None:
                raise work.exception()  # type: ignore[misc]
