"""Gateways between scripted upstreams: in one process over loopback sockets, with the real `openai` client in front."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import socket
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import uvicorn

from mmroute.bench.upstream import Counts, Script, ScriptedUpstream
from mmroute.serve.gateway import Gateway, build_app
from mmroute.serve.settings import Settings

__all__ = ["Rig", "as_openai", "asking", "rig", "serving"]

PLAIN = Script()
QUICK = {
    "retries": {"backoff_s": 0.01, "share": 10.0},
    "drain_delay_s": 0,
    "policy": {"name": "threshold", "threshold": 0.0},
}


class Served(str):
    """The base address of an application under uvicorn."""

    server: uvicorn.Server

    def stop(self) -> None:
        """Begins to stop it, so that several stop at the same time."""
        self.server.should_exit = True


@contextlib.asynccontextmanager
async def serving(app: Any) -> AsyncIterator[Served]:
    """The application under uvicorn on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        config = uvicorn.Config(app, log_level="critical", access_log=False, timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # the test runner's handlers stay
        task = asyncio.create_task(server.serve([sock]))
        while not server.started:
            await asyncio.sleep(0.005)
        served = Served(f"http://127.0.0.1:{sock.getsockname()[1]}")
        served.server = server
        try:
            yield served
        finally:
            served.stop()
            await task


@dataclasses.dataclass
class Rig:
    gateway: Gateway
    url: str
    draft: ScriptedUpstream
    target: ScriptedUpstream
    client: openai.AsyncOpenAI
    http: httpx2.AsyncClient
    upstream_urls: dict[str, str]

    @property
    def upstreams(self) -> dict[str, ScriptedUpstream]:
        return {"draft": self.draft, "target": self.target}

    def counts(self) -> list[Counts]:
        return [self.draft.counts, self.target.counts]

    async def idle(self, seconds: float = 2.0) -> None:
        """Waits until no upstream runs anything; fails if one goes on."""
        async with asyncio.timeout(seconds):
            while any(c.running for c in self.counts()) or self.gateway.tasks:
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def rig(
    draft: Script = PLAIN, target: Script = PLAIN, fetcher: Any = None, of: Any = None, **settings: Any
) -> AsyncIterator[Rig]:
    """Two scripted servers, a gateway in front, clients that do not retry; `of` adds to what is said of the servers."""
    servers = ScriptedUpstream("draft", draft), ScriptedUpstream("target", target)
    async with serving(servers[0]) as one, serving(servers[1]) as two:
        given = {
            "draft": {"url": f"{one}/v1", "model": "small"},
            "target": {"url": f"{two}/v1", "model": "large"},
            **QUICK,
            **settings,
        }
        for name, more in (of or {}).items():
            given[name] |= more
        gateway = Gateway(Settings(**given), fetcher=fetcher)
        async with (
            serving(build_app(gateway.settings, gateway)) as url,
            httpx2.AsyncClient(base_url=url, timeout=20, trust_env=False) as http,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
        ):
            try:
                yield Rig(gateway, url, *servers, client, http, {"draft": one, "target": two})
            finally:
                for each in (one, two, url):
                    each.stop()


def asking(question: str, **rest: Any) -> dict[str, Any]:
    """A request body for the OpenAI client or as JSON."""
    return {"model": "auto", "messages": [{"role": "user", "content": question}], **rest}


def as_openai(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of a model in this process as a client writes them: images are data addresses."""

    def part(block: dict[str, Any]) -> dict[str, Any]:
        if block["type"] == "text":
            return block
        data = io.BytesIO()
        block["image"].save(data, "PNG")
        return {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"},
        }

    return [{"role": m["role"], "content": [part(b) for b in m["content"]]} for m in messages]
