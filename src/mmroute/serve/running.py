"""An open answer between an upstream and a client: checked events in, what the client may see out."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any

from mmroute.serve.schema import DONE
from mmroute.serve.upstreams import Fault, Reply, Upstream

__all__ = ["Running"]


class Running:
    """One answer of one upstream. Whoever holds it closes it."""

    def __init__(self, upstream: Upstream, reply: Reply) -> None:
        self.upstream, self.reply = upstream, reply
        self.hide_logprobs = False
        """We asked for them, the client did not."""
        self.rating_tokens = 0
        """Written before the answer; taken out of usage."""
        self.written = 0
        """Tokens that the server counts of an answer that has been read to its end, a rating included."""
        self.finished = False
        self.usage: dict[str, Any] | None = None
        self.whole: dict[str, Any] | None = None
        """An answer that came in one piece."""
        self.logprobs: list[float] = []
        """Of the answer's tokens, once it has been read to its end."""
        self._events = aiter(reply)
        self._ahead: deque[dict[str, Any]] = deque()
        self._open: set[int] = set()
        self._closed = False

    async def begin(self, stream: bool) -> None:
        """Waits for the first event, so that a failure before it can still be mended.

        Raises:
            Fault: as `chunk`.
        """
        if stream:
            first = await self.chunk()
            self.put_back([] if first is None else [first])
        else:
            self.whole = json.loads(await anext(self._events))

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            await self.reply.aclose()

    def put_back(self, chunks: Iterable[dict[str, Any]]) -> None:
        """Chunks that were looked at and not given away."""
        self._ahead.extendleft(reversed(list(chunks)))

    async def chunk(self) -> dict[str, Any] | None:
        """The next chunk; None behind the last one.

        Raises:
            Fault: it is no chunk, an error was sent, or the stream ended before its answer did.
        """
        if self._ahead:
            return self._ahead.popleft()
        payload = await anext(self._events, None)
        role = self.upstream.role
        if payload is None or payload == DONE:
            if self._open or not self.finished:
                raise Fault("broken", f"{role}: the stream ended before the answer did")
            return None
        try:
            chunk = json.loads(payload)
        except ValueError:
            raise Fault("malformed", f"{role}: an event is not JSON") from None
        if not isinstance(chunk, dict):
            raise Fault("malformed", f"{role}: an event is not an object")
        if "error" in chunk:
            raise Fault("error_event", f"{role}: the server reported an error in its stream")
        if not isinstance(chunk.get("choices"), list):
            raise Fault("malformed", f"{role}: an event has no choices")
        for choice in chunk["choices"]:
            if not isinstance(choice, dict):
                raise Fault("malformed", f"{role}: a choice is not an object")
            if choice.get("finish_reason") is not None:
                self.finished = True
                self._open.discard(choice.get("index", 0))
            else:
                self._open.add(choice.get("index", 0))
        return chunk

    async def read_all(self, silence_s: float) -> None:
        """Reads to the end; `chunks` then gives the same away as if it had not been read.

        Raises:
            Fault: as `chunks`.
        """
        held: list[dict[str, Any]] = []
        while (chunk := await self._soon(silence_s)) is not None:
            held.append(chunk)
            for choice in chunk["choices"]:
                entries = (choice.get("logprobs") or {}).get("content") or ()
                self.logprobs += [entry["logprob"] for entry in entries]
            usage = chunk.get("usage")
            if isinstance(usage, dict):
                self.written = usage.get("completion_tokens") or 0
        self.put_back(held)

    async def _soon(self, silence_s: float) -> dict[str, Any] | None:
        try:
            async with asyncio.timeout(silence_s):
                return await self.chunk()
        except TimeoutError:
            raise Fault("timeout", f"{self.upstream.role}: silent for {silence_s:g} s", status=504) from None

    async def chunks(self, silence_s: float) -> AsyncIterator[dict[str, Any]]:
        """What the client may see, to the end.

        Raises:
            Fault: as `chunk`; `timeout` after so many seconds without one.
        """
        while (chunk := await self._soon(silence_s)) is not None:
            self._correct(chunk)
            yield chunk

    def _correct(self, chunk: dict[str, Any]) -> None:
        if self.hide_logprobs:
            for choice in chunk["choices"]:
                if choice.get("logprobs") is not None:
                    choice["logprobs"] = None
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            for name in ("completion_tokens", "total_tokens"):
                if self.rating_tokens and isinstance(usage.get(name), int):
                    usage[name] = max(0, usage[name] - self.rating_tokens)
            self.usage = usage
