"""The gateway under load and under faults, beside the same upstream called directly, in one run on one machine.

    python -m mmroute.bench.gateway --out results/gateway/load.json          10,000 requests, 64 at a time
    python -m mmroute.bench.gateway --n 300 --concurrency 16 --rounds 50     the same in half a minute

Two scripted upstreams and the gateway run as processes of their own on loopback. `load` sends every kind of request,
one in eight with a fault, one in sixteen from a client that leaves at a random moment, and checks each answer to the
letter.
`latency` sends single requests in turn, directly and through the gateway; `throughput` the same at full concurrency,
and through nginx where that is installed. Only differences and ratios of one run mean anything.
"""

import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import httpx2 as httpx
import typer

from mmroute.bench.upstream import expected_answer

__all__ = ["Processes", "latency", "load", "started", "throughput"]

FAULTS: tuple[dict[str, Any], ...] = (
    {"first_s": 0.2},
    {"fail": 429, "times": 1, "retry_after": 0.05},
    {"fail": 500},
    {"fail": 503, "times": 1},
    {"cut_after": 6},
    {"hang": True},
    {"malformed_after": 6},
    {"split": 3},
    {"rating": "no rating\n"},
    {"rating_split": False},
)
SETTINGS: dict[str, Any] = {
    "policy": {"name": "budget", "budget": 0.4},
    "timeouts": {"rating_s": 1.0, "first_byte_s": 1.5, "between_bytes_s": 5},
    "retries": {"backoff_s": 0.02, "share": 1.0},
    # Faults are drawn at random here, so a row of them says nothing about the server.
    "circuit": {"failures": 1_000_000, "window_calls": 1_000_000},
    "drain_delay_s": 0,
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Processes:
    """Two upstreams and a gateway in front, each a process."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.ports = {name: free_port() for name in ("draft", "target", "gateway")}
        self.config = folder / "serve.json"  # JSON is YAML
        roles = {
            role: {"url": f"http://127.0.0.1:{self.ports[role]}/v1", "model": role, "served": f"the-{role}"}
            for role in ("draft", "target")
        }
        self.config.write_text(json.dumps({**SETTINGS, **roles, "port": self.ports["gateway"], **settings}))
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    @property
    def urls(self) -> dict[str, str]:
        return {name: self.url(name) for name in self.ports}

    def start(self) -> None:
        for role in ("draft", "target"):
            self._run(role, "mmroute.bench.upstream", "--role", role, "--port", str(self.ports[role]))
        self.start_gateway()

    def start_gateway(self) -> None:
        code = "import sys; from mmroute.cli import main; sys.argv[0] = 'mmroute'; main()"
        self._spawn("gateway", [sys.executable, "-c", code, "serve", "--config", str(self.config)])
        self.wait("gateway", "/ready")

    def _run(self, name: str, module: str, *arguments: str) -> None:
        self._spawn(name, [sys.executable, "-m", module, *arguments])
        self.wait(name, "/v1/models")

    def _spawn(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def wait(self, name: str, path: str, seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.running[name].poll() is not None:
                break
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(self.url(name) + path, timeout=2, trust_env=False).status_code == 200:
                    return
            time.sleep(0.05)
        raise RuntimeError(f"{name} did not start: {(self.folder / f'{name}.log').read_text()[-2000:]}")

    def stop(self) -> None:
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def started(settings: dict[str, Any] | None = None) -> Iterator[Processes]:
    """The three processes, stopped at the end whatever happens."""
    with tempfile.TemporaryDirectory() as folder:
        processes = Processes(Path(folder), settings or {})
        try:
            processes.start()
            yield processes
        finally:
            processes.stop()


def request_body(question: str, **rest: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": question}], **rest}


# ---------------------------------------------------------------------- correctness under load


async def load(urls: dict[str, str], n: int, concurrency: int, seed: int) -> dict[str, Any]:
    """Sends `n` requests, `concurrency` at a time, and looks at every answer.

    Args:
        urls: addresses of `gateway`, and of the scripted `draft` and `target` behind it.

    Returns:
        Counts by outcome; `lost`, `doubled`, `leaked`, `unshaped` and `left_running` must be 0.
    """
    found: Counter[str] = Counter()
    gate = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=None)
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=urls["gateway"], timeout=60, limits=limits, trust_env=False) as http:

        async def one(i: int) -> None:
            async with gate:
                found.update(await _one(http, i, random.Random(f"{seed}/{i}")))

        await asyncio.gather(*(one(i) for i in range(n)))
        wall = time.monotonic() - began
        left = await _left_running(urls)
        metrics = (await http.get("/metrics")).text
    accepted = sum(found[name] for name in ("whole", "error", "broken", "gone"))
    return {
        "n": n,
        "concurrency": concurrency,
        "seed": seed,
        "wall_s": wall,
        "outcomes": dict(found),
        "lost": n - accepted + found["lost"],
        "doubled": found["doubled"],
        "leaked": found["leaked"],
        "unshaped": found["unshaped"],
        "left_running": sum(side["running"] for side in left.values()),
        "upstreams": left,
        "client_disconnects": _metric(metrics, "mmroute_client_disconnects_total"),
    }


def _metric(text: str, name: str) -> float:
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name)


async def _one(http: httpx.AsyncClient, i: int, draw: random.Random) -> list[str]:
    """One request and what became of it."""
    question, stream = f"q{i}", draw.random() < 0.5
    fault = {draw.choice(("draft", "target")): draw.choice(FAULTS)} if draw.random() < 1 / 8 else {}
    leaves = draw.random() < 1 / 16
    body = request_body(question, stream=stream, script=fault)
    if leaves:
        body["script"] = {role: {"gap_s": 0.01, "tokens": 60, **fault.get(role, {})} for role in ("draft", "target")}
    try:
        if leaves:
            async with asyncio.timeout(draw.uniform(0.0, 0.4)):
                await _ask(http, body)
            return ["gone"]  # the answer was faster than the client's patience
        status, route, text, error = await _ask(http, body)
    except TimeoutError:
        return ["gone"]
    except httpx.HTTPError:
        return ["lost"]
    return judged(question, route, text, error, status)


def judged(question: str, route: str, text: str, error: Any, status: int) -> list[str]:
    """What an answer is: whole, an error, or broken off with one; and what is wrong with it."""
    if error is not None:
        shaped = isinstance(error, dict) and {"message", "type", "param", "code"} <= error.keys()
        wanted = expected_answer(route or "draft", question)
        out = ["broken"] if status == 200 else ["error", f"error {status}"]
        out += [] if shaped else ["unshaped"]
        return out + (["leaked"] if text and not wanted.startswith(text) else [])
    wanted = expected_answer(route, question)
    if text == wanted:
        return ["whole"]
    if text.count(wanted) > 1:
        return ["doubled", "whole"]
    # An unrated draft may keep the text that is no rating; anything else before the answer is a leak.
    return ["leaked" if text.endswith(wanted) and not text.startswith("no rating") else "lost"]


async def _ask(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, str, str, Any]:
    """Status, route, text, and the error if there is one."""
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        route = reply.headers.get("x-mmroute-route", "")
        if not body.get("stream") or reply.status_code != 200:
            whole = json.loads(await reply.aread())
            if "error" in whole:
                return reply.status_code, route, "", whole["error"]
            return reply.status_code, route, whole["choices"][0]["message"]["content"], None
        text, done = "", False
        async for line in reply.aiter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    return reply.status_code, route, text, chunk["error"]
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
        return reply.status_code, route, text, None if done else "the stream ended without [DONE]"


async def _left_running(urls: dict[str, str]) -> dict[str, dict[str, int]]:
    """Counts of both upstreams, a second after the last client has gone."""
    await asyncio.sleep(1)
    out = {}
    async with httpx.AsyncClient(trust_env=False) as http:
        for role in ("draft", "target"):
            counts = (await http.get(urls[role] + "/counts")).json()
            out[role] = {k: v for k, v in counts.items() if k != "seen"}
    return out


# ---------------------------------------------------------------------- time


async def latency(urls: dict[str, str], rounds: int) -> dict[str, Any]:
    """Seconds of single requests, directly and through the gateway in turn; what the gateway adds, in milliseconds."""
    cases = {
        "direct": (urls["target"], "target"),
        "forced": (urls["gateway"], "target"),
        "direct draft": (urls["draft"], "draft"),
        "peek kept": (urls["gateway"], "auto-b0"),
    }
    out: dict[str, Any] = {}
    async with httpx.AsyncClient(timeout=60, trust_env=False) as http:
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
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if binary is None:
        yield None
        return
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        paths = " ".join(f"{k}_temp_path {folder}/{k};" for k in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        file = Path(folder) / "nginx.conf"
        file.write_text(
            f"daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
            f"http {{ access_log off; {paths}\n"
            f"upstream u {{ server {url.removeprefix('http://')}; keepalive 64; }}\n"
            f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://u; proxy_http_version 1.1; "
            'proxy_set_header Connection ""; proxy_buffering off; } } }\n'
        )
        process = subprocess.Popen([binary, "-p", folder, "-c", str(file)], stderr=subprocess.DEVNULL)
        try:
            await asyncio.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(10)


def main(
    n: Annotated[int, typer.Option(help="Requests under load.")] = 10_000,
    concurrency: Annotated[int, typer.Option(help="Of them at a time.")] = 64,
    rounds: Annotated[int, typer.Option(help="Requests for latency, of each kind.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which faults and leavings.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON file of all figures.")] = None,
) -> None:
    """Runs load, latency and throughput; prints a card, and one line of JSON last."""
    from mmroute.bench import schema

    with started() as processes:
        asyncio.run(load(processes.urls, n // 10, concurrency, seed + 1))  # pools and caches are full by then
        before = resident_mib(processes.running["gateway"].pid)
        under_load = asyncio.run(load(processes.urls, n, concurrency, seed))
        after = resident_mib(processes.running["gateway"].pid)
    with started({"timeouts": {}}) as processes:  # the short ones above are for faults; a busy machine is not one
        times = asyncio.run(latency(processes.urls, rounds))
        rates = asyncio.run(throughput(processes.urls, n // 5, 32))
    result = {
        "schema": "gateway/1",
        "settings": SETTINGS,
        "machine": _machine(),
        **dict(zip(("commit", "dirty"), schema.commit_of_source(), strict=True)),
        "load": under_load,
        "resident_mib": {"before": before, "after": after},
        "latency": times,
        "throughput": rates,
    }
    if out is not None:
        schema.write_json(out, result)
    for name in ("lost", "doubled", "leaked", "unshaped", "left_running"):
        typer.echo(f"{name:14} {under_load[name]}")
    for kind, cases in times.items():
        if isinstance(cases, dict):
            typer.echo(
                f"{kind}: added p50 {cases['added forced']['p50']:.2f} ms, p99 {cases['added forced']['p99']:.2f} ms"
            )
    typer.echo(json.dumps(result))
    if any(under_load[name] for name in ("lost", "doubled", "leaked", "unshaped", "left_running")):
        raise typer.Exit(1)


def resident_mib(pid: int) -> float | None:
    """Resident memory of a process; None where /proc does not say."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def _machine() -> dict[str, Any]:
    return {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()}


if __name__ == "__main__":
    typer.run(main)
