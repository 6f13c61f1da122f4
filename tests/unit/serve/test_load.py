"""Hundreds of requests at once, one in eight with a fault, one in sixteen whose client leaves: nothing goes wrong."""

import asyncio

import pytest
from gateways import rig

from mmroute.bench.gateway import judged, load
from mmroute.bench.gateway_processes import SETTINGS, settings_of
from mmroute.bench.upstream import expected_answer


def test_under_load_and_faults_nothing_is_lost_doubled_leaked_or_left():
    async def run():
        async with rig(**settings_of(3)) as r:
            urls = {"gateway": r.url, "draft": r.upstream_urls["draft"], "target": r.upstream_urls["target"]}
            found = await load(urls, 300, 64, seed=0)
            assert [found[k] for k in ("lost", "doubled", "leaked", "unshaped", "left_running")] == [0] * 5
            # How many are whole depends on how busy the machine is: a late answer is an error, as it should be.
            assert found["outcomes"].get("whole", 0) > 0
            assert found["outcomes"].get("gone", 0) > 0
            for side in r.counts():
                assert side.started == side.finished + side.cancelled + side.failed
            totals = r.gateway.book.totals
            assert totals["ok"] >= found["outcomes"]["whole"]
            assert sum(totals.values()) <= 300  # one for each request; a client may leave before it is heard
            assert not r.gateway.tasks
            assert not r.gateway.at_target

    asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "error", "status", "verdict"),
    [
        (expected_answer("draft", "q1"), None, 200, ["whole"]),
        ("73\n" + expected_answer("draft", "q1"), None, 200, ["leaked"]),
        (2 * expected_answer("draft", "q1"), None, 200, ["doubled", "whole"]),
        (expected_answer("draft", "q2"), None, 200, ["lost"]),
        (expected_answer("draft", "q1")[:-3], None, 200, ["lost"]),
        ("draft", {"message": "", "type": "", "param": None, "code": None}, 200, ["broken"]),
        ("7", {"message": "", "type": "", "param": None, "code": None}, 200, ["broken", "leaked"]),
        ("", {"detail": "x"}, 502, ["error", "error 502", "unshaped"]),
        ("", "the stream ended without [DONE]", 200, ["broken", "unshaped"]),
    ],
)
def test_the_judge_sees_what_is_wrong_with_an_answer(text, error, status, verdict):
    assert judged("q1", "draft", text, error, status) == verdict


def test_patience_is_in_the_timeouts_and_nowhere_else():
    assert settings_of(1) == SETTINGS
    slow = settings_of(3)
    assert slow["timeouts"] == {name: 3 * seconds for name, seconds in SETTINGS["timeouts"].items()}
    assert {**slow, "timeouts": None} == {**SETTINGS, "timeouts": None}
