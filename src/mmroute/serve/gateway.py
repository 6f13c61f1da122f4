"""The ASGI application: OpenAI's endpoints in front of a draft and a target, and what one needs to run it.

app = build_app(settings.read(Path("serve.yaml")))      # for any ASGI server; `mmroute serve` runs uvicorn
"""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mmroute.errors import ConfigError, MmrouteError
from mmroute.gate._manifest import Manifest, first_threshold, verifier_of
from mmroute.gate._verify import Verifier
from mmroute.serve import raters
from mmroute.serve.book import Book
from mmroute.serve.breaker import RetryBudget
from mmroute.serve.chat import Chat
from mmroute.serve.decide import Decider
from mmroute.serve.limits import Fetcher
from mmroute.serve.pages import PAGES, drawn, page
from mmroute.serve.schema import ApiError
from mmroute.serve.settings import Keys, Settings
from mmroute.serve.turn import Turn
from mmroute.serve.upstreams import HttpUpstream, SessionUpstream, Upstream

__all__ = ["Gateway", "build_app"]

log = logging.getLogger(__name__)

_ID = re.compile(r"[\w.:-]{1,128}")


@dataclass(frozen=True)
class Live:
    """What a reload replaces, by one reference."""

    decider: Decider
    keys: Keys
    artifact: str
    known: Manifest | None
    """Of a draft behind HTTP: what its ratings were calibrated as."""
    verifier: Verifier | None
    """What a second look judges finished answers by, if the artifact can."""
    curve: dict[str, list[float]] | None
    """How accurate routing was on the calibration split, by share of target calls."""


class Gateway:
    """Everything one process holds. Make it, `start` it in the event loop that serves it, `aclose` it there."""

    def __init__(
        self,
        settings: Settings,
        *,
        reread: Callable[[], Settings] | None = None,
        upstreams: dict[str, Upstream] | None = None,
        fetcher: Fetcher | None = None,
    ) -> None:
        self.settings = settings
        self._reread = reread or (lambda: settings)
        self.upstreams = upstreams or _upstreams(settings)
        self.book = Book(settings)
        self.fetcher = fetcher or Fetcher(settings.limits, settings.media_domains)
        self.retry_budget = RetryBudget(settings.retries.share)
        self.live = self._build(settings, None)
        self.tasks: set[asyncio.Task[None]] = set()
        self.at_target: set[Turn] = set()
        """Requests that the target was chosen for and that have not ended: what caps on it count. A call counts
        itself only once it is made, and between a decision and its call others decide."""
        self.draining = False
        """Nothing new is taken."""
        self.leaving = False
        """/ready says no, requests are still taken."""
        self.expired = False
        """What still runs is being cut off."""
        self._places = asyncio.Semaphore(settings.limits.in_flight)
        self._waiting = 0
        self._ready = (0.0, False)

    def _build(self, settings: Settings, before: Live | None) -> Live:
        same = before is not None and before.decider.made_of(settings)
        draft, known = self.upstreams["draft"], raters.manifest(settings)
        verifier, curve = (None, None) if known is None else (verifier_of(known.facts), known.facts.get("curve"))
        if settings.verify != "none" and verifier is None:
            raise ConfigError(
                "verify looks at finished answers by what the artifact has learned of them, and "
                f"{settings.rater or 'no artifact'} has learned nothing; set rater to a folder that this version's "
                "`mmroute train prp` wrote"
            )
        artifact, first = f"{settings.draft.model}:{settings.rates_by}", None
        if isinstance(draft, SessionUpstream):
            artifact, first, known = draft.artifact, draft.first_threshold, None
        elif known is not None:
            artifact, first = f"prp:{known.id_with()}", partial(first_threshold, known.facts)
        decider = before.decider if same and before is not None else Decider(settings, first)
        return Live(decider, Keys(settings.api_keys_file), artifact, known, verifier, curve)

    @property
    def served(self) -> list[str]:
        return [up.name for up in self.upstreams.values()]

    @property
    def image_urls(self) -> str:
        if self.settings.image_urls != "auto":
            return self.settings.image_urls
        return "fetch" if any(isinstance(up, SessionUpstream) for up in self.upstreams.values()) else "forward"

    async def start(self) -> None:
        """Loads local models."""
        for upstream in self.upstreams.values():
            if isinstance(upstream, SessionUpstream):
                await asyncio.to_thread(upstream.start)
        draft = self.upstreams["draft"]
        if isinstance(draft, SessionUpstream) and self.settings.rater is not None:
            await asyncio.to_thread(draft.load_rater, self.settings.rater)
            self.live = self._build(self.settings, None)

    async def aclose(self) -> None:
        for upstream in self.upstreams.values():
            await upstream.aclose()
        await self.fetcher.aclose()
        self.book.shut()

    # ------------------------------------------------------------------ what every request asks

    def request_id(self, given: str) -> str:
        return given if _ID.fullmatch(given) else uuid.uuid4().hex

    def check_key(self, authorization: str) -> str:
        """Who asks.

        Raises:
            ApiError: 401.
        """
        owner = self.live.keys.owner(authorization)
        if owner is None:
            raise ApiError(
                401, "a key is needed, and this is not one: Authorization: Bearer KEY", code="invalid_api_key"
            )
        return owner

    @contextlib.asynccontextmanager
    async def admission(self) -> AsyncIterator[None]:
        """A place among the requests in flight; a short wait for one.

        Raises:
            ApiError: 503 while draining, 429 when there is no place and none to wait in.
        """
        limits = self.settings.limits
        self._refuse_if_draining()
        if self._places.locked():
            if self._waiting >= limits.queue:
                raise ApiError(429, "too many requests at once", code="overloaded", retry_after=1)
            self._waiting += 1
            try:
                async with asyncio.timeout(limits.queue_s):
                    await self._places.acquire()
            except TimeoutError:
                raise ApiError(429, "too many requests at once", code="overloaded", retry_after=1) from None
            finally:
                self._waiting -= 1
        else:
            await self._places.acquire()
        self.book.in_flight += 1
        try:
            self._refuse_if_draining()
            yield
        finally:
            self.book.in_flight -= 1
            self._places.release()

    def _refuse_if_draining(self) -> None:
        if self.draining:
            raise ApiError(503, "the gateway is shutting down; ask another one", code="draining", retry_after=5)

    # ------------------------------------------------------------------ reload and drain

    async def reload(self) -> bool:
        """Reads policy, keys and rater anew; what is wrong changes nothing but a log line and a counter."""
        draft = self.upstreams["draft"]
        try:
            fresh = self._reread()
            self._build(fresh, self.live)
            if isinstance(draft, SessionUpstream):
                await asyncio.to_thread(draft.load_rater, fresh.rater)
            before, self.live = self.live, self._build(fresh, self.live)
        except (MmrouteError, OSError) as error:
            log.error("reload refused, what was there stays: %s", error)
            self.book.reloads.labels("refused").inc()
            return False
        if before.decider is not self.live.decider:
            log.info("reloaded: policy %s", fresh.policy)
        self.book.reloads.labels("ok").inc()
        return True

    async def watch_files(self, paths: list[Path], every_s: float = 2) -> None:
        """Reloads when one of the files changes; for `reload: poll`."""
        seen = [_changed(path) for path in paths]
        while True:
            await asyncio.sleep(every_s)
            now = [_changed(path) for path in paths]
            if now != seen:
                seen = now
                await self.reload()

    async def drain(self) -> None:
        """Stops as a balancer needs it: /ready says no, then nothing new is taken, then what runs may end."""
        self.leaving = True
        await asyncio.sleep(self.settings.drain_delay_s)
        self.draining = True
        until = time.monotonic() + self.settings.drain_s
        while self.tasks and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.expired = True
        for task in list(self.tasks):
            task.cancel()
        while self.tasks:
            await asyncio.sleep(0.02)

    # ------------------------------------------------------------------ the other endpoints

    async def models(self, _: Request) -> Response:
        made = int(time.time())
        names = ["auto", "draft", "target", *self.served]
        listed = [{"id": name, "object": "model", "created": made, "owned_by": "mmroute"} for name in names]
        return JSONResponse({"object": "list", "data": listed})

    async def health(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(self, _: Request) -> Response:
        if self.leaving or self.draining:
            return JSONResponse({"status": "draining"}, 503)
        if time.monotonic() - self._ready[0] > 2:  # a balancer's probes are not passed on one by one
            found = await asyncio.gather(*(up.ready() for up in self.upstreams.values()))
            self._ready = (time.monotonic(), any(found))
        ok = self._ready[1]
        return JSONResponse({"status": "ready" if ok else "no model answers"}, 200 if ok else 503)

    async def metrics(self, _: Request) -> Response:
        circuits: dict[str, str] = {role: up.breaker.state for role, up in self.upstreams.items()}
        body = self.book.metrics(circuits, self.live.decider.budget)
        return Response(body, media_type="text/plain; version=0.0.4")

    async def version(self, _: Request) -> Response:
        return JSONResponse({"mmroute": version("mmroute"), "artifact": self.live.artifact, "models": self.served})

    async def stats(self, _: Request) -> Response:
        """The last decisions, without content, for the page."""
        settings = self.settings
        return JSONResponse(
            {
                "draft": settings.draft.name,
                "target": settings.target.name,
                "mode": settings.rates_by,
                "policy": self.live.decider.name,
                "budget": self.live.decider.budget,
                "artifact": self.live.artifact,
                "in_flight": self.book.in_flight,
                "totals": self.book.totals,
                "cost": self.book.spent,
                "curve": self.live.curve,
                "recent": list(self.book.recent),
                "examples": _bundled(settings),
            }
        )

    async def example(self, request: Request) -> Response:
        """A generated question with its picture, for models that know such worlds."""
        if not _bundled(self.settings):
            raise HTTPException(404, "examples are for the bundled model")
        kind = request.query_params.get("task", "maze")
        number = request.query_params.get("n", "0")
        if kind not in ("maze", "frozenlake") or not number.isdigit() or int(number) >= 1000:
            raise HTTPException(404, "task is maze or frozenlake, n a number below 1000")
        return JSONResponse(await asyncio.to_thread(drawn, kind, int(number)))

    def keyed(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """The endpoint for those who have a key."""

        async def check(request: Request) -> Response:
            self.check_key(request.headers.get("authorization", ""))
            return await endpoint(request)

        return check


def _upstreams(settings: Settings) -> dict[str, Upstream]:
    made: dict[str, Upstream] = {}
    local: list[Any] = []
    for role, given in (("draft", settings.draft), ("target", settings.target)):
        if given.url is not None:
            made[role] = HttpUpstream(role, given, settings)
            continue
        from mmroute.serve.local import LocalUpstream  # torch costs seconds; a proxy does without
        from mmroute.serve.session_raters import FirstToken

        made[role] = LocalUpstream(role, given, settings, FirstToken() if role == "draft" else None)
        local.append(made[role])
    if len(local) == 2:
        local[0].counterpart = local[1]
    return made


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # between an editor's two renames there is no file
        return 0.0


def _bundled(settings: Settings) -> bool:
    return settings.draft.url is None and settings.draft.model == "tiny"


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Response(ApiError(error.status_code, error.detail).payload, error.status_code, media_type="application/json")


async def _own_error(_: Request, error: Exception) -> Response:
    """Starlette's own last resort is plain text; the traceback goes to the log all the same."""
    failed = ApiError(500, "the gateway failed; its log says why", code="internal")
    return Response(failed.payload, 500, media_type="application/json")


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(error.payload, error.status, media_type="application/json")


def build_app(settings: Settings, gateway: Gateway | None = None) -> Starlette:
    """The application; its lifespan starts and closes the gateway, which stands in `app.state.gateway`."""
    made = gateway or Gateway(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await made.start()
        yield
        await made.aclose()

    keyed = made.keyed
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", Chat(made), methods=["POST"]),
            Route("/v1/route", Chat(made, decides_only=True), methods=["POST"]),
            Route("/v1/models", keyed(made.models)),
            Route("/health", made.health),
            Route("/ready", made.ready),
            Route("/metrics", made.metrics),
            Route("/version", keyed(made.version)),
            Route("/stats", keyed(made.stats)),
            Route("/example", keyed(made.example)),
            *(Route(path, page) for path in PAGES),
        ],
        exception_handlers={HTTPException: _http_error, ApiError: _api_error, Exception: _own_error},
        lifespan=lifespan,
    )
    app.state.gateway = made
    return app
