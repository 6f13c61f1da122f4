"""Two gateways behind nginx with the configuration that examples/serving shows: one leaves, and no client notices."""

import asyncio
import contextlib
import json
import os
import signal
from collections import Counter
from pathlib import Path

import httpx2 as httpx
import pytest

from mmroute.bench import gateway_processes as bench
from mmroute.bench import nginx
from mmroute.bench.gateway import ask, judged
from mmroute.bench.upstream import expected_answer
from mmroute.serve.replay import read_log

pytestmark = [
    pytest.mark.slow,  # two upstreams, two gateways and nginx, each a process
    pytest.mark.skipif(nginx.binary() is None, reason="no nginx here; apt-get install nginx-light"),
]
EXAMPLE = Path(__file__).parents[3] / "examples" / "serving" / "balancer.conf"
BUDGET = 0.4
SLOW = {"gap_s": 0.3, "tokens": 8}


@contextlib.contextmanager
def fleet(folder):
    """The processes, and the balancer's address in their `ports`; each gateway writes a log of its own."""
    text = EXAMPLE.read_text()
    settings = {
        "replicas": 2,
        "policy": {"name": "budget", "budget": BUDGET},
        "timeouts": {"rating_s": 30},
        "replay_content": "full",
        "replay_log": str(folder / "gateway.jsonl"),
        "drain_delay_s": 1,
    }
    with bench.started(settings) as processes:
        processes.start_gateway("second", replay_log=str(folder / "second.jsonl"))
        processes.ports["balancer"] = bench.free_port()
        for name, port in (("balancer", 8000), ("gateway", 8001), ("second", 8002)):
            assert text.count(f"127.0.0.1:{port}") == 1
            text = text.replace(f"127.0.0.1:{port}", f"127.0.0.1:{processes.ports[name]}")
        with nginx.running(text, processes.ports["balancer"]):
            yield processes


def client(processes, name="balancer"):
    return httpx.AsyncClient(base_url=processes.url(name), timeout=120, trust_env=False)


@pytest.fixture(scope="module")
def standing(tmp_path_factory):
    """A fleet that nobody takes down."""
    with fleet(tmp_path_factory.mktemp("fleet")) as processes:
        yield processes


def asked(record):
    return record["prompt"][0]["content"]


def test_both_keep_the_share_and_when_one_leaves_no_request_is_lost_or_doubled(tmp_path):
    n, at_once = 400, 16
    routes, wrong, late = Counter(), [], []

    async def run(processes):
        leaving = processes.running["gateway"]
        gate, done = asyncio.Semaphore(at_once), asyncio.Event()
        async with client(processes) as http, client(processes, "gateway") as drained:

            async def one(i):
                async with gate:
                    text = f"q{i}"
                    status, route, said, error = await ask(http, bench.request_body(text, stream=i % 2 == 0))
                    routes[route] += 1
                    verdict = judged(text, route, said, error, status)
                    wrong.extend([] if verdict == ["whole"] else [(text, status, said, error)])
                    if routes.total() >= n // 2:
                        done.set()

            async def leave():
                """Halfway, with streams open that keep it from being gone at once."""
                await done.wait()
                body = bench.request_body("long", model="target", stream=True, script={"target": SLOW})
                streams = [asyncio.create_task(ask(drained, body)) for _ in range(3)]
                while (await drained.get("/stats")).json()["in_flight"] < 3:
                    await asyncio.sleep(0.02)
                os.kill(leaving.pid, signal.SIGTERM)
                while (await drained.get("/ready")).status_code == 200:
                    await asyncio.sleep(0.01)
                while leaving.poll() is None and not late:
                    refused = await drained.post("/v1/chat/completions", json=bench.request_body("directly"))
                    late.extend([refused] if refused.status_code == 503 else [])
                for status, _, said, error in await asyncio.gather(*streams):
                    assert (status, said, error) == (200, expected_answer("target", "long"), None)
                status = await asyncio.to_thread(leaving.wait, 60)
                assert status == 0
                for i in range(3):  # its port is closed by now
                    assert (await ask(http, bench.request_body(f"after{i}")))[0] == 200

            going = asyncio.create_task(leave())
            await asyncio.gather(*(one(i) for i in range(n)))
            await going
            ready = await http.get("/ready")
            assert ready.status_code == 200

    with fleet(tmp_path) as processes:
        asyncio.run(run(processes))
        seen = {r: httpx.get(f"{processes.url(r)}/counts", trust_env=False).json() for r in ("draft", "target")}
    assert wrong == []
    assert routes.total() == n
    assert abs(routes["target"] / n - BUDGET) <= 0.06
    assert late[0].json()["error"].keys() >= {"message", "type", "param", "code"}
    assert late[0].json()["error"]["code"] == "draining"
    logs = {name: list(read_log(tmp_path / f"{name}.jsonl")) for name in ("gateway", "second")}
    answered = Counter(asked(r) for log in logs.values() for r in log if r["outcome"] == "ok")
    assert {text: count for text, count in answered.items() if text.startswith("q")} == {f"q{i}": 1 for i in range(n)}
    shares = []
    for log in logs.values():
        rated = [r["route"] for r in log if r["outcome"] == "ok" and r["reason"] == "rating"]
        assert len(rated) > n // 8  # each had its part of the traffic
        shares.append(rated.count("target") / len(rated))
    assert all(abs(share - BUDGET) <= 0.12 for share in shares), shares
    ours = {text: count for text, count in seen["target"]["seen"].items() if text.startswith("q")}
    assert sum(ours.values()) == routes["target"] == len(ours)
    assert all(side["running"] == 0 for side in seen.values())


def test_a_streams_first_event_comes_before_its_last_is_written(standing):
    async def run():
        async with client(standing) as http, client(standing, "target") as target:
            before = (await target.get("/counts")).json()
            body = bench.request_body("slowly", model="target", stream=True, script={"target": SLOW})
            async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                lines = reply.aiter_lines()
                first = await anext(lines)
                meanwhile = (await target.get("/counts")).json()
                rest = [line async for line in lines]
        assert first.startswith("data: ")
        assert (meanwhile["running"], meanwhile["finished"]) == (1, before["finished"])
        assert rest[-2:] == ["data: [DONE]", ""]

    asyncio.run(run())


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_the_balancer_stops_the_model(standing, stream):
    async def run():
        async with client(standing) as http, client(standing, "target") as target:

            async def counts():
                return (await target.get("/counts")).json()

            before = await counts()
            script = {"target": {"gap_s": 0.1, "tokens": 3000}}
            body = bench.request_body("leaving", model="target", stream=stream, script=script)
            asking = asyncio.create_task(ask(http, body))
            async with asyncio.timeout(60):
                while not (await counts())["running"]:
                    await asyncio.sleep(0.02)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
                while (await counts())["running"]:
                    await asyncio.sleep(0.02)
            assert (await counts())["cancelled"] == before["cancelled"] + 1

    asyncio.run(run())


def test_one_clients_failing_model_takes_no_gateway_away_from_the_others(standing):
    async def run():
        async with client(standing) as http:
            down = {role: {"fail": 503} for role in ("draft", "target")}
            for i in range(4):
                status, _, _, error = await ask(http, bench.request_body(f"down{i}", model="target", script=down))
                assert (status, error["type"]) == (503, "server_error")
                status, route, said, error = await ask(http, bench.request_body(f"well{i}", model="draft"))
                assert (status, route, said) == (200, "draft", expected_answer("draft", f"well{i}")), error

    asyncio.run(run())


def test_what_is_too_large_for_the_balancer_is_told_as_the_gateway_would(standing):
    with httpx.Client(base_url=standing.url("balancer"), timeout=120, trust_env=False) as http:
        for size in (41 * 2**19, 23 * 2**20):  # the gateway's limit, and the balancer's own
            reply = http.post("/v1/chat/completions", json=bench.request_body("x" * size))
            assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
            assert reply.headers["content-type"] == "application/json"
        assert http.get("/health").status_code == 200


def test_without_any_gateway_the_balancer_says_so_in_openais_words(tmp_path):
    port = bench.free_port()
    text = EXAMPLE.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}")
    for replica in (8001, 8002):
        text = text.replace(f"127.0.0.1:{replica}", f"127.0.0.1:{bench.free_port()}")
    with nginx.running(text, port), httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
        for _ in range(3):
            reply = http.post("/v1/chat/completions", content=json.dumps(bench.request_body("anyone?")))
            assert reply.status_code == 503
            assert reply.headers["retry-after"]
            assert reply.json()["error"].keys() == {"message", "type", "param", "code"}
