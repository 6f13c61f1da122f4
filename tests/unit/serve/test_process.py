"""The process: starts with nothing said, drains on SIGTERM, keeps its log through SIGKILL, reloads on SIGHUP."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time

import httpx2 as httpx
import pytest

from mmroute.bench import gateway_processes as bench
from mmroute.bench.gate_schema import read_gateway
from mmroute.bench.gateway import ask
from mmroute.bench.upstream import expected_answer
from mmroute.serve.replay import read_log

pytestmark = pytest.mark.slow  # three processes each


def body(question, **rest):
    return bench.request_body(question, **rest)


def test_the_committed_command_runs_and_finds_nothing_wrong(tmp_path):
    out = tmp_path / "load.json"
    command = ["--n", "400", "--concurrency", "32", "--rounds", "20", "--seed", "1", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "mmroute.bench.gateway", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == result
    assert read_gateway(out).sound
    assert set(result["latency"]["whole JSON answer"]) >= {"direct", "forced", "added forced", "added peek"}
    assert result["throughput"]["json"].keys() >= {"direct", "gateway", "gateway, peek"}


async def in_flight(http, n):
    """Waits until so many requests are being answered."""
    async with asyncio.timeout(60):
        while (await http.get("/stats")).json()["in_flight"] < n:
            await asyncio.sleep(0.02)


def test_sigterm_finishes_what_streams_and_refuses_the_rest(tmp_path):
    async def run(processes):
        pid = processes.running["gateway"].pid
        async with httpx.AsyncClient(base_url=processes.url("gateway"), timeout=60, trust_env=False) as http:
            slow = {"script": {role: {"gap_s": 1.0, "tokens": 8} for role in ("draft", "target")}}
            running = [asyncio.create_task(ask(http, body(f"s{i}", stream=True, **slow))) for i in range(12)]
            running += [asyncio.create_task(ask(http, body(f"j{i}", **slow))) for i in range(12)]
            await in_flight(http, 24)
            os.kill(pid, signal.SIGTERM)
            while (await http.get("/ready")).status_code == 200:
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
            late = await http.post("/v1/chat/completions", json=body("late"))
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
            assert late.headers["retry-after"]
            assert (await http.get("/ready")).status_code == 503
            assert (await http.get("/health")).status_code == 200
            for (status, route, text, error), name in zip(
                await asyncio.gather(*running), [f"{k}{i}" for k in "sj" for i in range(12)], strict=True
            ):
                assert (status, error) == (200, None)
                assert text == expected_answer(route, name, 8)

    with bench.started({"replay_log": str(tmp_path / "replay.jsonl"), "timeouts": {"rating_s": 30}}) as processes:
        asyncio.run(run(processes))
        assert processes.running["gateway"].wait(20) == 0
    assert sum(r["outcome"] == "ok" for r in read_log(tmp_path / "replay.jsonl")) == 24


def test_what_outlives_the_drain_gets_an_error_event():
    async def run(processes):
        async with httpx.AsyncClient(base_url=processes.url("gateway"), timeout=60, trust_env=False) as http:
            slow = body("x", stream=True, script={r: {"gap_s": 0.2, "tokens": 500} for r in ("draft", "target")})
            running = asyncio.create_task(ask(http, slow))
            await in_flight(http, 1)
            await asyncio.sleep(1)
            processes.running["gateway"].terminate()
            status, _, text, error = await running
            assert (status, error["code"]) == (200, "draining")
            assert text

    with bench.started({"drain_s": 0.5}) as processes:
        asyncio.run(run(processes))
        assert processes.running["gateway"].wait(20) == 0


def test_sigkill_loses_no_line_of_an_answer_a_client_has_seen(tmp_path):
    log = tmp_path / "replay.jsonl"
    seen = []

    async def run(processes):
        async with httpx.AsyncClient(base_url=processes.url("gateway"), timeout=60, trust_env=False) as http:

            async def one(i):
                try:
                    reply = await http.post(
                        "/v1/chat/completions",
                        json=body(f"q{i}", stream=i % 2 == 0),
                        headers={"x-request-id": f"id{i}"},
                    )
                except httpx.HTTPError:
                    return
                if i % 2 or reply.text.rstrip().endswith("[DONE]"):
                    seen.append(f"id{i}")

            tasks = []
            for i in range(1000):
                tasks.append(asyncio.create_task(one(i)))
                await asyncio.sleep(0.02)
                if len(seen) > 60 and len(tasks) > len(seen):  # some are still running
                    break
            processes.running["gateway"].kill()
            await asyncio.gather(*tasks)

    with bench.started({"replay_log": str(log)}) as processes:
        asyncio.run(run(processes))
    assert len(seen) > 60
    assert set(seen) <= {r["request_id"] for r in read_log(log)}


def test_sighup_reloads_and_a_broken_file_changes_nothing(tmp_path):
    async def route(http):
        return (await http.post("/v1/route", json=body("?"))).json()["route"]

    async def run(processes):
        pid = processes.running["gateway"].pid
        config = json.loads(processes.config.read_text())
        async with httpx.AsyncClient(base_url=processes.url("gateway"), timeout=60, trust_env=False) as http:
            for policy, expected, result in (
                ({"name": "always", "route": "draft"}, "draft", "ok"),
                ({"name": "nonsense"}, "draft", "refused"),
                ({"name": "always", "route": "target"}, "target", "ok"),
            ):
                processes.config.write_text(json.dumps({**config, "policy": policy}))
                os.kill(pid, signal.SIGHUP)
                await asyncio.sleep(0.7)
                assert await route(http) == expected
                assert f'mmroute_reload_total{{result="{result}"}}' in (await http.get("/metrics")).text

    with bench.started({"policy": {"name": "always", "route": "target"}}) as processes:
        asyncio.run(run(processes))


def test_with_nothing_said_it_serves_the_bundled_model_on_loopback(tmp_path):
    code = "import sys; from mmroute.cli import main; sys.argv[0] = 'mmroute'; main()"
    port = bench.free_port()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-c", code, "serve", "--port", str(port)], stderr=log)
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + 180
        while time.monotonic() < until and process.poll() is None:
            try:
                if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.3)
        example = httpx.get(f"{url}/example?task=maze&n=1", trust_env=False).json()
        before, after = example["question"].split("<image>")
        parts = [{"type": "text", "text": before}, {"type": "image_url", "image_url": {"url": example["images"][0]}}]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": after}]}]
        reply = httpx.post(
            f"{url}/v1/chat/completions", json={"model": "auto", "messages": messages}, timeout=120, trust_env=False
        )
        assert reply.json()["choices"][0]["message"]["content"].endswith(example["answer"])
        assert reply.headers["x-mmroute-artifact"] == "first-token"
    finally:
        process.terminate()
        assert process.wait(20) == 0
    said = (tmp_path / "log").read_text()
    assert "are the same model 'tiny'" in said
    assert f"serving on http://127.0.0.1:{port}" in said
