"""What a reload replaces, what it refuses, and the watcher of `reload: poll`."""

import asyncio
import hashlib
import os

import httpx2 as httpx
from gateways import asking, rig

from mmroute.bench.upstream import Script
from mmroute.serve.gateway import build_app
from mmroute.serve.settings import Settings

KEEP = Script(rating="90\n")


async def status(r, key):
    reply = await r.http.post("/v1/route", json=asking("?"), headers={"authorization": f"Bearer {key}"})
    return reply.status_code


def write(file, *keys):
    file.write_text("".join(f"name{i}:{hashlib.sha256(k.encode()).hexdigest()}\n" for i, k in enumerate(keys)))
    stamp = file.stat().st_mtime + 5  # a file system's clock may be coarse
    os.utime(file, (stamp, stamp))


def test_changed_files_are_seen_and_a_missing_or_broken_one_changes_nothing(tmp_path):
    file = tmp_path / "keys"
    write(file, "old")

    async def run():
        async with rig(KEEP, api_keys_file=file) as r:
            r.http.headers["authorization"] = "Bearer old"
            watching = asyncio.create_task(r.gateway.watch_files([tmp_path / "none.yaml", file], every_s=0.02))
            refused = r.gateway.book.reloads.labels("refused")._value
            assert (await status(r, "old"), await status(r, "new")) == (200, 401)
            for broken, count in ((file.unlink, 1), (lambda: file.write_text("no key at all"), 2)):
                broken()
                async with asyncio.timeout(20):
                    while refused.get() < count:
                        await asyncio.sleep(0.01)
                assert (await status(r, "old"), await status(r, "new")) == (200, 401)
            file.unlink()
            write(file, "new")
            async with asyncio.timeout(20):
                while await status(r, "new") == 401:
                    await asyncio.sleep(0.01)
            assert await status(r, "old") == 401
            assert not watching.done()
            watching.cancel()

    asyncio.run(run())


def test_a_torn_artifact_is_refused_and_the_policy_stays_with_its_window(tmp_path):
    (tmp_path / "rater.json").write_text('{"format": "prp/1", "conf')

    async def run():
        async with rig(KEEP, policy={"name": "budget", "budget": 0.5}) as r:
            await r.http.post("/v1/route", json=asking("?"))
            before = r.gateway.live
            as_given = r.gateway.settings.model_dump(exclude_unset=True)
            r.gateway._reread = lambda: Settings(**{**as_given, "rater": tmp_path})
            assert await r.gateway.reload() is False
            assert r.gateway.live is before
            r.gateway._reread = lambda: Settings(**as_given)
            assert await r.gateway.reload() is True
            assert r.gateway.live.decider is before.decider  # nothing of the policy changed: its window goes on

    asyncio.run(run())


def test_a_failure_of_any_endpoint_is_an_openai_error():
    async def run():
        async with rig(KEEP) as r:
            r.gateway.book.recent = None  # /stats stumbles
            transport = httpx.ASGITransport(build_app(r.gateway.settings, r.gateway), raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
                reply = await http.get("/stats")
            assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")

    asyncio.run(run())
