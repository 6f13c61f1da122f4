"""Caps on the target, in requests and in dollars: what no longer fits goes to the draft."""

import asyncio
from collections import Counter

import pytest
from gateways import asking, rig

from mmroute.bench.upstream import Script, expected_answer

SEND = Script(rating="09\n")


def test_the_target_takes_no_more_than_it_is_allowed():
    async def run():
        async with rig(SEND, Script(gap_s=0.05), target_in_flight=1) as r:
            first = asyncio.create_task(r.client.chat.completions.create(**asking("one")))
            while not r.target.counts.running:
                await asyncio.sleep(0.005)
            raw = await r.client.chat.completions.with_raw_response.create(**asking("two"))
            assert (raw.headers["x-mmroute-route"], raw.headers["x-mmroute-reason"]) == ("draft", "budget_cap")
            assert (await first).choices[0].message.content == expected_answer("target", "one")

    asyncio.run(run())


@pytest.mark.parametrize("policy", [{"name": "threshold", "threshold": 0.0}, {"name": "always", "route": "target"}])
def test_a_replica_keeps_to_its_part_of_the_cap_however_many_come_at_once(policy):
    async def run():
        async with rig(SEND, Script(first_s=2), target_in_flight=7, replicas=2, policy=policy) as r:
            asks = [r.http.post("/v1/chat/completions", json=asking(f"q{i}")) for i in range(12)]
            replies = await asyncio.gather(*asks)
            why = Counter((reply.headers["x-mmroute-route"], reply.headers["x-mmroute-reason"]) for reply in replies)
            assert why.pop(("draft", "budget_cap")) == 9
            assert [route for route, _ in why] == ["target"]
            assert r.target.counts.started == 3
            again = await r.http.post("/v1/route", json=asking("later"))  # ended requests have left their places
            assert again.json()["route"] == "target"
            assert not r.gateway.at_target

    asyncio.run(run())


def test_a_replica_stops_paying_when_its_part_of_the_hour_is_spent():
    async def run():
        prices = {"target": {"price_in": 0.0, "price_out": 1e6 / 8}}  # a dollar an answer of 8 tokens
        async with rig(SEND, of=prices, target_usd_per_hour=4.0, replicas=2) as r:
            got = []
            for i in range(4):
                reply = await r.http.post("/v1/chat/completions", json=asking(f"q{i}"))
                got.append((reply.headers["x-mmroute-route"], reply.headers["x-mmroute-reason"]))
            assert got == [("target", "rating")] * 2 + [("draft", "budget_cap")] * 2
            named = await r.http.post("/v1/chat/completions", json=asking("?", model="target"))
            assert named.headers["x-mmroute-route"] == "target"  # who names it is let through, and counted
            assert r.gateway.book.on_target.last_hour == 3.0

    asyncio.run(run())


def test_a_draft_that_has_failed_is_not_asked_again_because_the_target_is_full():
    async def run():
        async with rig(SEND, Script(first_s=1), target_in_flight=1) as r:
            first = asyncio.create_task(r.http.post("/v1/chat/completions", json=asking("one")))
            while not r.target.counts.running:
                await asyncio.sleep(0.005)
            down = asking("two", script={"draft": {"fail": 500}})
            reply = await r.http.post("/v1/chat/completions", json=down)
            assert (reply.headers["x-mmroute-route"], reply.headers["x-mmroute-reason"]) == ("target", "fallback")
            assert r.draft.counts.failed == 1
            await first

    asyncio.run(run())
