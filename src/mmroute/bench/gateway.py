"""The gateway under load and under faults, beside the same upstream called directly, in one run on one machine.

    python -m mmroute.bench.gateway --rounds 0 --out results/gateway/load.json    10,000 requests, 64 at a time
    python -m mmroute.bench.gateway --n 0 --out results/gateway/times.json        both times, on a quiet machine
    python -m mmroute.bench.gateway --n 300 --concurrency 16 --rounds 50          all of it in half a minute

`load` sends every kind of request, one in eight with a fault, one in sixteen from a client that leaves at a random
moment, and checks each answer to the letter. `latency` sends single requests in turn, directly and through the gateway;
`throughput` the same at full concurrency, and through nginx where that is installed.
"""

import asyncio
import json
import os
import platform
import random
import shlex
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx2 as httpx
import typer

from mmroute.bench.gateway_processes import request_body, resident_mib, settings_of, started
from mmroute.bench.gateway_times import latency, throughput
from mmroute.bench.upstream import expected_answer

__all__ = ["ask", "judged", "load"]

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


LEAVING_TOKENS = 60
"""Of answers whose client may leave: long enough for it to leave in every phase."""


async def load(urls: dict[str, str], n: int, concurrency: int, seed: int, timeout: float = 60) -> dict[str, Any]:
    """Sends `n` requests, `concurrency` at a time, and looks at every answer.

    Args:
        urls: addresses of `gateway`, and of the scripted `draft` and `target` behind it.
        n: requests.
        concurrency: of them at a time.
        seed: which faults and leavings.
        timeout: seconds without a byte after which a request counts as lost.

    Returns:
        Counts by outcome; `lost`, `doubled`, `leaked`, `unshaped` and `left_running` must be 0.
    """
    found: Counter[str] = Counter()
    gate = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=None)
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=urls["gateway"], timeout=timeout, limits=limits, trust_env=False) as http:

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
        body["script"] = {
            role: {"gap_s": 0.01, "tokens": LEAVING_TOKENS, **fault.get(role, {})} for role in ("draft", "target")
        }
    try:
        if leaves:
            async with asyncio.timeout(draw.uniform(0.0, 0.4)):
                status, route, text, error = await ask(http, body)
            return judged(question, route, text, error, status, LEAVING_TOKENS)  # faster than the client's patience
        status, route, text, error = await ask(http, body)
    except TimeoutError:
        return ["gone"]
    except httpx.HTTPError:
        return ["lost"]
    return judged(question, route, text, error, status)


def judged(question: str, route: str, text: str, error: Any, status: int, tokens: int = 8) -> list[str]:
    """What an answer is: whole, an error, or broken off with one; and what is wrong with it."""
    if error is not None:
        shaped = isinstance(error, dict) and {"message", "type", "param", "code"} <= error.keys()
        wanted = expected_answer(route or "draft", question, tokens)
        out = ["broken"] if status == 200 else ["error", f"error {status}"]
        out += [] if shaped else ["unshaped"]
        return out + (["leaked"] if text and not wanted.startswith(text) else [])
    wanted = expected_answer(route, question, tokens)
    if text == wanted:
        return ["whole"]
    if text.count(wanted) > 1:
        return ["doubled", "whole"]
    # An unrated draft may keep the text that is no rating; anything else before the answer is a leak.
    return ["leaked" if text.endswith(wanted) and not text.startswith("no rating") else "lost"]


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[int, str, str, Any]:
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


def main(
    n: Annotated[int, typer.Option(help="Requests under load; 0 is none.", min=0)] = 10_000,
    concurrency: Annotated[int, typer.Option(help="Of them at a time.", min=1)] = 64,
    rounds: Annotated[int, typer.Option(help="Requests for latency, of each kind; 0 times nothing.", min=0)] = 1000,
    seed: Annotated[int, typer.Option(help="Which faults and leavings.")] = 0,
    patience: Annotated[float, typer.Option(help="Times all timeouts under load: for a busy machine.", min=1)] = 1,
    out: Annotated[Path | None, typer.Option(help="JSON file of all figures.")] = None,
) -> None:
    """Runs load, latency and throughput; prints a card, and one line of JSON last."""
    from mmroute.bench import gateway_report, schema
    from mmroute.bench.gate_schema import GatewayResult
    from mmroute.config import resolved

    origin, began = schema.commit_of_source(), time.perf_counter()
    started_at, busy = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0]
    under_load, memory, times, rates = None, dict[str, float | None](), None, None
    settings = settings_of(patience)
    if n:
        with started(settings) as processes:
            first = load(processes.urls, n // 10, concurrency, seed + 1, 60 * patience)
            asyncio.run(first)  # pools and caches are full by then
            gateway = processes.running["gateway"].pid
            memory["before"] = resident_mib(gateway)
            under_load = asyncio.run(load(processes.urls, n, concurrency, seed, 60 * patience))
            memory["after"] = resident_mib(gateway)
    if rounds:
        with started({"timeouts": {}}) as processes:  # short ones are for faults; a busy machine is not one
            times = asyncio.run(latency(processes.urls, rounds))
            rates = asyncio.run(throughput(processes.urls, 2 * rounds, 32))
    command = shlex.join(["python", "-m", "mmroute.bench.gateway", *sys.argv[1:]])
    result = GatewayResult(
        run=schema.run_here(command, *origin, started_at, time.perf_counter() - began),
        cpus=os.cpu_count() or 1,
        busy=busy,
        python=platform.python_version(),
        settings=settings,
        load=under_load,
        resident_mib=memory,
        latency=times,
        throughput=rates,
    )
    if out is not None:
        schema.write_result(out, result)
    for line in gateway_report.section(result):
        typer.echo(line)
    typer.echo(json.dumps(resolved(result)))
    if not result.sound:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
