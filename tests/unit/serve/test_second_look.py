"""A second look at the draft's finished answers: nothing goes out before it, and one answer comes whole."""

import asyncio
import json

import pytest
from gateways import asking, rig
from pydantic import ValidationError

from mmroute.bench.upstream import Script, expected_answer
from mmroute.errors import ConfigError
from mmroute.serve.gateway import Gateway
from mmroute.serve.settings import Settings

RATED = Script(rating="59\n")
CURVE = {"share": [0.0, 0.5, 1.0], "accuracy": [0.5, 0.9, 0.8]}


@pytest.fixture
def artifact(tmp_path):
    """A draft that writes its ratings, whose answers are right where their log-probability is above -1."""
    manifest = {"format": "prp/1", "config": {"form": "tokens", "num_ratings": 2, "score": "advantage"}, "base": "b"}
    manifest |= {"weights": "w", "calibrators": [], "verify": [20.0, 0.0, 20.0], "costs": [0.2, 1.0]}
    manifest |= {"curve": CURVE}
    (tmp_path / "rater.json").write_text(json.dumps(manifest))
    return tmp_path


def looking(artifact, budget, share=1.0):
    """By `share` 1, every query gets to the second look, which sends the share `budget`."""
    return {
        "rater": artifact,
        "verify": "logprob",
        "verify_share": share,
        "policy": {"name": "budget", "budget": budget},
    }


def scripted(lp, **more):
    return {"script": {"draft": {"word_logprob": lp, **more}}}


async def text_of(stream):
    return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("threshold", "role"), [(0.5, "target"), (2.0, "draft")])
def test_a_finished_answer_is_kept_or_the_target_asked_and_the_client_sees_one(artifact, stream, threshold, role):
    async def run():
        async with rig(RATED, **looking(artifact, 0.4)) as r:
            body = {"mmroute": {"threshold": threshold, "debug": True}, **scripted(-3.0)}
            raw = await r.client.chat.completions.with_raw_response.create(
                **asking("where?"), stream=stream, extra_body=body
            )
            answer = raw.parse()
            text = await text_of(answer) if stream else answer.choices[0].message.content
            assert text == expected_answer(role, "where?")
            told = {k.removeprefix("x-mmroute-"): v for k, v in raw.headers.items() if k.startswith("x-mmroute-")}
            assert told["route"] == role
            assert told["reason"] == {"draft": "rating", "target": "verify"}[role]
            if role == "target":
                assert float(told["score"]) == pytest.approx(1.0, abs=1e-3)  # r_t - P(right), and wrong it is
            if not stream:
                assert answer.choices[0].logprobs is None
                assert answer.usage.completion_tokens == 8
                assert answer.model_extra["mmroute"]["wasted_draft_tokens"] == {"draft": 0, "target": 11}[role]
            await r.idle()
            assert (r.draft.counts.finished, r.target.counts.started) == (1, int(role == "target"))

    asyncio.run(run())


def test_the_budget_goes_to_the_answers_that_are_least_sure(artifact):
    async def run():
        async with rig(RATED, **looking(artifact, 0.25)) as r:
            routes = {}
            for i in range(120):
                lp = -3.0 if i % 4 == 0 else -0.1
                reply = await r.http.post("/v1/chat/completions", json=asking(f"q{i}", **scripted(lp)))
                routes.setdefault(lp, []).append(reply.headers["x-mmroute-route"])
            sent = {lp: found[10:].count("target") / len(found[10:]) for lp, found in routes.items()}
            assert sent[-3.0] > 0.8 > 0.1 > sent[-0.1]
            stats = (await r.http.get("/stats")).json()
            assert (stats["budget"], stats["curve"]) == (0.25, CURVE)
            metrics = (await r.http.get("/metrics")).text
            assert 'mmroute_decisions_total{reason="verify",route="target"}' in metrics

    asyncio.run(run())


def test_nothing_goes_out_before_the_answer_has_been_looked_at(artifact):
    async def run():
        async with rig(RATED, **looking(artifact, 0.0)) as r:
            body = asking("slow", stream=True, **scripted(-3.0, gap_s=0.05))
            async with r.http.stream("POST", "/v1/chat/completions", json=body) as reply:
                assert reply.headers["x-mmroute-route"] == "draft"
                assert r.draft.counts.finished == 1  # the first byte came behind the draft's last one
                lines = [line async for line in reply.aiter_lines() if line]
            assert lines[-1] == "data: [DONE]"
            await r.idle()

    asyncio.run(run())


def test_an_answer_of_its_own_call_is_looked_at_too(artifact):
    async def run():
        async with rig(RATED, **looking(artifact, 0.4)) as r:
            shaped = asking("where?", stop=["7"], mmroute={"threshold": 0.5}, **scripted(-3.0))
            reply = await r.http.post("/v1/chat/completions", json=shaped)
            assert reply.headers["x-mmroute-reason"] == "verify"
            kept = asking("where?", stop=["7"], logprobs=True, mmroute={"threshold": 2.0}, **scripted(-0.5))
            answer = (await r.http.post("/v1/chat/completions", json=kept)).json()
            assert answer["choices"][0]["message"]["content"] == expected_answer("draft", "where?")
            assert [e["logprob"] for e in answer["choices"][0]["logprobs"]["content"]] == [-0.5] * 8
            await r.idle()

    asyncio.run(run())


def test_without_log_probabilities_or_a_place_at_the_target_the_draft_stays(artifact):
    async def run():
        sure = {"mmroute": {"threshold": 0.5}}
        async with rig(RATED, **looking(artifact, 0.4)) as r:
            body = asking("?", **sure, **scripted(-3.0, no_logprobs=True))
            reply = await r.http.post("/v1/chat/completions", json=body)
            assert (reply.headers["x-mmroute-route"], reply.headers["x-mmroute-reason"]) == ("draft", "rating")
        async with rig(RATED, **looking(artifact, 0.4), target_in_flight=1) as r:
            hold = asyncio.create_task(
                r.http.post("/v1/chat/completions", json=asking("a", model="target", script={"target": {"gap_s": 0.2}}))
            )
            while not r.target.counts.running:
                await asyncio.sleep(0.005)
            reply = await r.http.post("/v1/chat/completions", json=asking("?", **sure, **scripted(-3.0)))
            assert reply.headers["x-mmroute-route"] == "draft"
            await hold

    asyncio.run(run())


def test_who_leaves_while_the_answer_is_read_stops_it(artifact):
    async def run():
        async with rig(RATED, **looking(artifact, 0.4)) as r:
            body = asking("left", stream=True, **scripted(-3.0, gap_s=0.2))
            call = asyncio.create_task(r.http.post("/v1/chat/completions", json=body))
            while not r.draft.counts.running:
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.3)
            call.cancel()
            await r.idle()
            assert (r.draft.counts.cancelled, r.target.counts.started) == (1, 0)

    asyncio.run(run())


def test_a_draft_that_breaks_off_while_it_is_read_is_replaced(artifact):
    async def run():
        async with rig(RATED, **looking(artifact, 0.4)) as r:
            reply = await r.http.post("/v1/chat/completions", json=asking("?", **scripted(-3.0, cut_after=7)))
            assert reply.headers["x-mmroute-reason"] == "fallback"
            assert reply.json()["choices"][0]["message"]["content"] == expected_answer("target", "?")
            await r.idle()

    asyncio.run(run())


def test_a_second_look_needs_a_budget_and_an_artifact_that_has_learned_of_answers(artifact):
    server = {
        role: {"url": f"http://127.0.0.1:{port}/v1", "model": role} for port, role in enumerate(("draft", "target"), 1)
    }
    with pytest.raises(ValidationError, match="verify shares a budget"):
        Settings(**server, verify="logprob", policy={"name": "threshold", "threshold": 0})
    with pytest.raises(ConfigError, match="no artifact has learned nothing"):
        Gateway(Settings(**server, verify="logprob"))
    manifest = json.loads((artifact / "rater.json").read_text())
    del manifest["verify"]
    (artifact / "rater.json").write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="has learned nothing"):
        Gateway(Settings(**server, verify="logprob", rater=artifact))
