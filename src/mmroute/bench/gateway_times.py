"""What a gateway adds to a call in milliseconds, and how many calls a second it bears.

The upstream is called directly in the same run. Only differences and ratios of one run mean anything.
"""

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2 as httpx

from mmroute.bench import nginx
from mmroute.bench.gateway_processes import free_port, request_body

__all__ = ["latency", "throughput"]


async def latency(urls: dict[str, str], rounds: int) -> dict[str, Any]:
    """Single requests directly, through the gateway, and through nginx where there is one, in turn; what either adds.

    Args:
        urls: addresses of `gateway`, and of the scripted `draft` and `target` behind it.
        rounds: requests of each kind.

    Returns:
        Milliseconds.
    """
    out: dict[str, Any] = {}
    async with _nginx(urls["target"]) as proxy, httpx.AsyncClient(timeout=60, trust_env=False) as http:
        cases = {
            "direct": (urls["target"], "target"),
            "forced": (urls["gateway"], "target"),
            "direct draft": (urls["draft"], "draft"),
            "peek kept": (urls["gateway"], "auto-b0"),
            **({} if proxy is None else {"nginx": (proxy, "target")}),
        }
        for stream in (False, True):
            took: dict[str, list[float]] = {name: [] for name in cases}
            for i in range(rounds + 5):
                for name, (url, model) in cases.items():
                    body = request_body(f"q{i}", model=model, stream=stream)
                    seconds = await _time_first(http, url, body)
                    if i >= 5:  # connections are warm by then
                        took[name].append(seconds)
            kind = "first event of a stream" if stream else "whole JSON answer"
            out[kind] = {name: _spread(times) for name, times in took.items()} | {
                "added forced": _added(took["forced"], took["direct"]),
                "added peek": _added(took["peek kept"], took["direct draft"]),
                **({} if proxy is None else {"added nginx": _added(took["nginx"], took["direct"])}),
            }
    return {"rounds": rounds, "unit": "ms", **out}


async def _time_first(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> float:
    began = time.perf_counter()
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
        seconds = 0.0
        async for _ in reply.aiter_raw():
            seconds = seconds or time.perf_counter() - began
    return time.perf_counter() - began if not body["stream"] else seconds


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(1000 * s for s in seconds)
    return {"p50": statistics.median(ordered), "p99": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}


def _added(through: list[float], direct: list[float]) -> dict[str, float]:
    """Difference of the percentiles, not the percentile of differences: rounds are neighbours in time, not pairs."""
    a, b = _spread(through), _spread(direct)
    return {name: a[name] - b[name] for name in a}


async def throughput(urls: dict[str, str], n: int, concurrency: int) -> dict[str, Any]:
    """Requests a second at full concurrency: directly, through the gateway, and through nginx where there is one."""
    out: dict[str, Any] = {"n": n, "concurrency": concurrency}
    async with _nginx(urls["target"]) as proxy:
        cases = {
            "direct": (urls["target"], "target"),
            "gateway": (urls["gateway"], "target"),
            "gateway, peek": (urls["gateway"], "auto-b0"),
            **({} if proxy is None else {"nginx": (proxy, "target")}),
        }
        for stream in (False, True):
            rates: dict[str, float] = {}
            for name, (url, model) in cases.items():
                rates[name] = await _rate(url, model, stream, n, concurrency)
            out["streams" if stream else "json"] = rates
    return out


async def _rate(url: str, model: str, stream: bool, n: int, concurrency: int) -> float:
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(timeout=60, limits=limits, trust_env=False) as http:
        left = iter(range(n))

        async def worker() -> None:
            for i in left:
                reply = await http.post(
                    f"{url}/v1/chat/completions", json=request_body(f"q{i}", model=model, stream=stream)
                )
                reply.raise_for_status()

        began = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return n / (time.perf_counter() - began)


@contextlib.asynccontextmanager
async def _nginx(url: str) -> AsyncIterator[str | None]:
    """A plain reverse proxy in front of one server; None where nginx is not installed."""
    if nginx.binary() is None:
        yield None
        return
    port = free_port()
    text = (
        "worker_processes 1; events {}\n"
        f"http {{ upstream u {{ server {url.removeprefix('http://')}; keepalive 64; }}\n"
        f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://u; proxy_http_version 1.1; "
        'proxy_set_header Connection ""; proxy_buffering off; } } }\n'
    )
    with nginx.running(text, port):
        yield f"http://127.0.0.1:{port}"
