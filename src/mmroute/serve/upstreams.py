"""How an OpenAI-compatible server is called: streams as events, JSON as one payload, failures as one exception."""

import asyncio
import datetime
import json
import os
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx2 as httpx

from mmroute.errors import ConfigError, MmrouteError
from mmroute.gate.base import Rating
from mmroute.serve.breaker import Breaker
from mmroute.serve.schema import DONE, Asked
from mmroute.serve.settings import Settings, UpstreamSettings
from mmroute.serve.sse import Decoder, TooLong

__all__ = ["Fault", "HttpUpstream", "Reply", "SessionReply", "SessionUpstream", "Upstream"]

RETRYABLE = (408, 429, 502, 503, 504)


class Fault(MmrouteError):
    """A call that brought no answer, or broke off in one."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        status: int = 502,
        retryable: bool = False,
        ours: bool = False,
        retry_after: float | None = None,
        body: bytes | None = None,
    ) -> None:
        super().__init__(message)
        self.reason, self.status, self.retryable, self.retry_after, self.body = (
            reason,
            status,
            retryable,
            retry_after,
            body,
        )
        self.ours = ours
        """The request's own fault: another server would say the same, and the breaker learns nothing."""


class Reply(ABC):
    """One open answer. Closing it early makes the server stop."""

    @abstractmethod
    def __aiter__(self) -> AsyncIterator[bytes]:
        """Payloads of its events, `[DONE]` last; of a JSON answer the body alone. Raises Fault."""

    @abstractmethod
    async def aclose(self) -> None: ...


class Upstream(ABC):
    """A model that answers, somewhere."""

    streams_only = False
    """Whether it answers in events alone; the gateway then assembles JSON."""

    def __init__(self, role: str, settings: UpstreamSettings, breaker: Breaker) -> None:
        self.role, self.settings, self.breaker = role, settings, breaker

    @property
    def name(self) -> str:
        return self.settings.name

    def lacks(self, asked: Asked) -> str | None:
        """What the request needs and this model has not; None if it can serve it."""
        s, body = self.settings, asked.body
        choice = body.get("response_format")
        needs = {
            "vision": bool(asked.images) and not s.vision,
            "tools": bool(body.get("tools") or body.get("functions")) and not s.tools,
            "JSON mode": isinstance(choice, dict) and choice.get("type") != "text" and not s.json_mode,
            "logprobs": bool(body.get("logprobs")) and not s.logprobs,
            "context": s.max_context is not None and asked.characters / 4 > s.max_context,
        }
        return next((name for name, missing in needs.items() if missing), None)

    @abstractmethod
    async def open(self, body: dict[str, Any], stream: bool, request_id: str) -> Reply:
        """Starts an answer; returns when the server has accepted it.

        Raises:
            Fault: it has not.
        """

    @abstractmethod
    async def ready(self) -> bool: ...

    @abstractmethod
    async def aclose(self) -> None:
        """Lets go of connections and threads."""


class SessionReply(Reply):
    """An answer on a session of this process: rated before it is written, then told to go on."""

    prompt_tokens: int
    prefill_flops: float
    report: dict[str, Any] | None
    """What the run cost and kept; there when the last event has come."""

    @abstractmethod
    async def rated(self) -> Rating | None:
        """The rating, when the prompt has been read.

        Raises:
            Fault: the prompt cannot be read.
        """

    @abstractmethod
    def resume(self) -> None:
        """The draft stays: its session goes on."""


class SessionUpstream(Upstream):
    """A model whose session can be rated and kept."""

    streams_only = True

    @property
    @abstractmethod
    def artifact(self) -> str:
        """What rates, as headers and logs name it."""

    @abstractmethod
    def first_threshold(self, budget: float) -> float | None:
        """The threshold of a share for a policy's first decisions, if it is known from calibration."""

    @abstractmethod
    def load_rater(self, name: str | Path | None) -> None:
        """Rates by another artifact from the next request on.

        Raises:
            CheckpointMismatch: it is none, or belongs to another draft; the old one stays.
        """

    @abstractmethod
    def start(self) -> None:
        """Loads the model; seconds to minutes."""

    @abstractmethod
    def begin(self, body: dict[str, Any], request_id: str, *, park: bool, trace: bool = False) -> SessionReply:
        """Starts a conversation; with `park` it is rated and then waits for `resume` or `aclose`.

        Args:
            trace: record which positions ran, for `report`.

        Raises:
            Fault: the request asks for what a local model does not do.
        """


class HttpUpstream(Upstream):
    """Behind a base address such as http://127.0.0.1:8001/v1."""

    def __init__(
        self, role: str, settings: UpstreamSettings, all_: Settings, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        super().__init__(role, settings, Breaker(all_.circuit))
        headers = {"accept-encoding": "identity", "user-agent": "mmroute"}
        if settings.api_key_env is not None:
            key = os.environ.get(settings.api_key_env)
            if not key:
                raise ConfigError(
                    f"{role}: the environment has no {settings.api_key_env}, named by api_key_env; set it"
                )
            headers["authorization"] = f"Bearer {key}"
        t = all_.timeouts
        self._client = httpx.AsyncClient(
            headers=headers,
            transport=transport,
            # What is read is timed by the gateway, which knows the phase.
            timeout=httpx.Timeout(None, connect=t.connect_s, pool=t.pool_s, write=t.between_bytes_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=128, keepalive_expiry=4),
            trust_env=False,
        )
        assert settings.url is not None
        self._base = settings.url.rstrip("/")

    async def open(self, body: dict[str, Any], stream: bool, request_id: str) -> Reply:
        sent = {**body, "model": self.settings.model}
        request = self._client.build_request(
            "POST",
            self._base + "/chat/completions",
            content=json.dumps(sent, ensure_ascii=False).encode("utf-8", "surrogatepass"),
            headers={"content-type": "application/json", "x-request-id": request_id},
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.TimeoutException:
            raise Fault("timeout", f"{self.role}: no connection in time", status=504, retryable=True) from None
        except httpx.HTTPError as error:
            raise Fault("connect", f"{self.role}: {type(error).__name__}", retryable=True) from None
        try:
            if response.status_code != 200:
                raise await self._refusal(response)
            if not stream:
                return _Json(await response.aread(), self.role)
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise Fault("malformed", f"{self.role}: a stream was asked for, {kind or 'nothing'} came")
        except httpx.HTTPError as error:
            await response.aclose()
            raise Fault("broken", f"{self.role}: {type(error).__name__} in the answer", retryable=True) from None
        except BaseException:
            await response.aclose()
            raise
        return _Events(response, self.role)

    async def _refusal(self, response: httpx.Response) -> Fault:
        status, body = response.status_code, await response.aread()
        try:
            envelope: Any = json.loads(body)
        except ValueError:
            envelope = None
        is_envelope = isinstance(envelope, dict) and isinstance(envelope.get("error"), dict)
        if 400 <= status < 500 and status not in (401, 403, 408, 429):
            said = None if is_envelope else body[:200].decode("utf-8", "replace")
            return Fault(
                "refused",
                said or f"{self.role} answered {status}",
                status=status,
                ours=True,
                body=body if is_envelope else None,
            )
        if status in (401, 403):
            return Fault("key", f"{self.role} does not take the gateway's key")
        wait = _seconds(response.headers.get("retry-after"))
        if status == 429:
            return Fault("limited", f"{self.role} is at its limit", status=429, retryable=True, retry_after=wait)
        return Fault(
            "status",
            f"{self.role} answered {status}",
            status=status if status in (503, 504) else 502,
            retryable=status in RETRYABLE,
            retry_after=wait,
        )

    async def ready(self) -> bool:
        try:
            async with asyncio.timeout(3):
                return (await self._client.get(self._base + "/models")).status_code == 200
        except (httpx.HTTPError, TimeoutError):
            return False

    async def aclose(self) -> None:
        await self._client.aclose()


def _seconds(header: str | None) -> float | None:
    """Retry-After as seconds from now; None where it says nothing that can be read."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())


class _Json(Reply):
    def __init__(self, body: bytes, role: str) -> None:
        try:
            parsed = json.loads(body)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict) or not isinstance(parsed.get("choices"), list):
            raise Fault("malformed", f"{role}: the answer is no chat completion")
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._body

    async def aclose(self) -> None:
        """The body has been read; nothing runs any more."""


class _Events(Reply):
    def __init__(self, response: httpx.Response, role: str) -> None:
        self._response, self._role = response, role

    async def __aiter__(self) -> AsyncIterator[bytes]:
        decoder = Decoder()
        try:
            async for piece in self._response.aiter_bytes():
                for payload in decoder.feed(piece):
                    yield payload
                    if payload == DONE:
                        return
        except httpx.HTTPError as error:
            raise Fault(
                "broken", f"{self._role}: the stream broke off ({type(error).__name__})", retryable=True
            ) from None
        except TooLong as error:
            raise Fault("malformed", f"{self._role}: {error}") from None

    async def aclose(self) -> None:
        await self._response.aclose()
