"""Whatever an upstream does wrong, the client gets one whole answer or one OpenAI-shaped error, and nothing runs on."""

import asyncio
import itertools
import json
import re

import openai
import pytest
from gateways import asking, rig

from mmroute.bench.upstream import Script, expected_answer
from mmroute.serve.breaker import Breaker
from mmroute.serve.settings import Circuit

KEEP, SEND = Script(rating="90\n"), Script(rating="09\n")


def scripted(**by_role):
    return {"extra_body": {"script": by_role}}


async def events_of(http, body):
    """Payloads of a streamed answer, as they come."""
    async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        assert reply.status_code == 200, await reply.aread()
        lines = [line async for line in reply.aiter_lines()]
    return [line[6:] for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("role", ["draft", "target"])
def test_what_may_pass_is_tried_again_and_answered_once(role):
    async def run():
        async with rig(KEEP if role == "draft" else SEND) as r:
            for n, (stream, status) in enumerate(itertools.product((False, True), (408, 429, 502, 503, 504)), 1):
                r.gateway.upstreams[role].breaker = Breaker(Circuit())  # two of three calls fail: it would open
                wait = 0 if status == 429 else None
                script = scripted(**{role: {"fail": status, "times": 2, "retry_after": wait}})
                raw = await r.client.chat.completions.with_raw_response.create(**asking("?"), stream=stream, **script)
                answer = raw.parse()
                if stream:
                    text = "".join([c.choices[0].delta.content or "" async for c in answer])
                else:
                    text = answer.choices[0].message.content
                assert text == expected_answer(role, "?")
                assert raw.headers["x-mmroute-reason"] == "rating"
                assert r.upstreams[role].counts.failed == 2 * n
            await r.idle()

    asyncio.run(run())


@pytest.mark.parametrize(("role", "other"), [("draft", "target"), ("target", "draft")])
def test_a_model_that_stays_down_is_replaced_and_the_reason_said(role, other):
    async def run():
        async with rig(KEEP if role == "draft" else SEND) as r:
            for fault in ({"fail": 500}, {"fail": 503}, {"cut_after": 0}):
                raw = await r.client.chat.completions.with_raw_response.create(
                    **asking("?"), **scripted(**{role: fault})
                )
                assert raw.parse().choices[0].message.content == expected_answer(other, "?")
                assert (raw.headers["x-mmroute-route"], raw.headers["x-mmroute-reason"]) == (other, "fallback")
            with pytest.raises(openai.InternalServerError) as forced:  # what the client chose is not replaced
                await r.client.chat.completions.create(
                    **{**asking("?"), "model": role}, **scripted(**{role: {"fail": 503}})
                )
            assert forced.value.status_code == 503
            metrics = (await r.http.get("/metrics")).text
            counted = re.findall(f'mmroute_fallback_total{{from="{role}",reason="(\\w+)",to="{other}"}} (.*)', metrics)
            assert sum(float(count) for _, count in counted) == 3
            assert dict(counted)["status"] in ("2.0", "3.0")  # a server that dies before its headers may say 500
            await r.idle()

    asyncio.run(run())


def test_a_long_wait_goes_to_the_client_and_a_short_one_is_waited_for():
    async def run():
        async with rig(SEND) as r:
            with pytest.raises(openai.RateLimitError) as limited:
                await r.client.chat.completions.create(
                    **asking("?"), **scripted(target={"fail": 429, "retry_after": 60})
                )
            assert limited.value.response.headers["retry-after"] == "60"
            assert limited.value.type == "rate_limit_error"
            assert r.target.counts.started == 1

    asyncio.run(run())


def test_an_upstreams_refusal_is_passed_on_and_not_held_against_it():
    async def run():
        async with rig(KEEP, circuit={"failures": 1}) as r:
            for _ in range(2):
                with pytest.raises(openai.BadRequestError, match="scripted"):
                    await r.client.chat.completions.create(**asking("?"), **scripted(draft={"fail": 400}))
            assert r.gateway.upstreams["draft"].breaker.state == "closed"
            with pytest.raises(openai.InternalServerError) as hidden:  # our key is wrong, not the client's
                await r.client.chat.completions.create(
                    **{**asking("?"), "model": "draft"}, **scripted(draft={"fail": 401})
                )
            assert hidden.value.status_code == 502

    asyncio.run(run())


def test_a_draft_that_is_silent_past_its_time_is_left_and_closed():
    async def run():
        async with rig(KEEP, timeouts={"rating_s": 1.0}) as r:
            raw = await r.client.chat.completions.with_raw_response.create(
                **asking("?"), **scripted(draft={"hang": True})
            )
            assert raw.parse().choices[0].message.content == expected_answer("target", "?")
            assert raw.headers["x-mmroute-reason"] == "rater_timeout"
            await r.idle()
            assert r.draft.counts.cancelled == 1

    asyncio.run(run())


def test_a_model_that_hangs_is_timed_out_and_another_asked():
    async def run():
        async with rig(SEND, timeouts={"first_byte_s": 0.2}) as r:
            raw = await r.client.chat.completions.with_raw_response.create(
                **asking("?"), **scripted(target={"hang": True})
            )
            assert raw.headers["x-mmroute-reason"] == "fallback"
            assert raw.parse().choices[0].message.content == expected_answer("draft", "?")
            hung = scripted(target={"hang": True}, draft={"hang": True, "rating": None})
            with pytest.raises(openai.InternalServerError) as late:
                await r.client.chat.completions.create(**{**asking("?"), "model": "target"}, **hung)
            assert late.value.status_code == 504
            await r.idle()

    asyncio.run(run())


@pytest.mark.parametrize("on_unrated", ["draft", "target"])
def test_a_head_that_is_no_rating_leaves_the_query_unrated(on_unrated):
    async def run():
        async with rig(on_unrated=on_unrated) as r:
            for rating in ("", "no idea\n", "9\n", "9x\n", "\n", "90 ", "90"):
                script = scripted(draft={"rating": rating})
                raw = await r.client.chat.completions.with_raw_response.create(**asking("?"), **script)
                assert (raw.headers["x-mmroute-route"], raw.headers["x-mmroute-reason"]) == (on_unrated, "unrated")
                text = raw.parse().choices[0].message.content
                assert text.endswith(expected_answer(on_unrated, "?"))
                assert not text.startswith("9")
            await r.idle()

    asyncio.run(run())


WAYS = (
    {"split": 1},
    {"split": 7},
    {"rating_split": False},
    {"field": "reasoning_content"},
    {"no_logprobs": True},
    {"rating": " 90\n"},
)


@pytest.mark.parametrize("stream", [False, True])
def test_a_rating_is_read_and_taken_out_however_it_comes(stream):
    async def run():
        async with rig(KEEP) as r:
            for how in WAYS:
                script = scripted(draft=how)
                raw = await r.client.chat.completions.with_raw_response.create(**asking("?"), stream=stream, **script)
                answer = raw.parse()
                assert raw.headers["x-mmroute-reason"] == "rating", how
                said = [c.choices[0].delta async for c in answer] if stream else [answer.choices[0].message]
                assert not any(getattr(d, "reasoning_content", None) for d in said), how
                assert "".join(d.content or "" for d in said) == expected_answer("draft", "?"), how

    asyncio.run(run())


@pytest.mark.parametrize("role", ["draft", "target"])
def test_a_stream_that_breaks_ends_with_an_error_event_and_no_done(role):
    async def run():
        async with rig(KEEP if role == "draft" else SEND, circuit={"failures": 100}) as r:
            for fault in ({"cut_after": 7}, {"malformed_after": 7}, {"error_after": 7}):
                script = {role: {**fault, "tokens": 12}}
                *pieces, last = await events_of(r.http, asking("?", script=script))
                assert json.loads(last)["error"]["type"] == "server_error", fault
                text = "".join(json.loads(p)["choices"][0]["delta"].get("content", "") for p in pieces)
                assert text
                assert expected_answer(role, "?", 12).startswith(text)
                stream = await r.client.chat.completions.create(
                    **asking("?"), stream=True, extra_body={"script": script}
                )
                with pytest.raises(openai.APIError):
                    _ = [c async for c in stream]
                with pytest.raises(openai.APIStatusError):  # not streamed: nothing has been sent, so it is a status
                    await r.client.chat.completions.create(
                        **{**asking("?"), "model": role}, extra_body={"script": script}
                    )
                whole = await r.client.chat.completions.create(**asking("?"), extra_body={"script": script})
                other = "target" if role == "draft" else "draft"  # nor has it here: the other one answers
                assert whole.choices[0].message.content == expected_answer(other, "?")
            await r.idle()

    asyncio.run(run())


def test_a_missing_done_is_made_good_when_the_answer_was_whole():
    async def run():
        async with rig(KEEP) as r:
            events = await events_of(r.http, asking("?", script={"draft": {"no_done": True}}))
            assert events[-1] == "[DONE]"

    asyncio.run(run())


def test_the_circuit_opens_probes_and_closes():
    async def run():
        async with rig(KEEP, circuit={"failures": 2, "open_s": 0.3}, retries={"attempts": 1}) as r:
            down = scripted(draft={"fail": 500})
            make = r.client.chat.completions.with_raw_response.create
            for _ in range(2):
                assert (await make(**asking("?"), **down)).headers["x-mmroute-reason"] == "fallback"
            started = r.draft.counts.started
            raw = await make(**asking("?"))
            assert (raw.headers["x-mmroute-route"], raw.headers["x-mmroute-reason"]) == ("target", "circuit_open")
            assert r.draft.counts.started == started
            with pytest.raises(openai.InternalServerError) as forced:
                await make(**{**asking("?"), "model": "draft"})
            assert (forced.value.status_code, forced.value.code) == (503, "circuit_open")
            await asyncio.sleep(0.35)
            for _ in range(2):
                assert (await make(**asking("?"))).headers["x-mmroute-route"] == "draft"
            assert r.gateway.upstreams["draft"].breaker.state == "closed"

    asyncio.run(run())


def test_both_models_down_is_one_error():
    async def run():
        async with rig(KEEP) as r:
            down = {"fail": 503}
            with pytest.raises(openai.InternalServerError) as lost:
                await r.client.chat.completions.create(**asking("?"), **scripted(draft=down, target=down))
            assert lost.value.body["type"] == "server_error"
            assert "127.0.0.1" not in lost.value.message  # where an upstream stands is nobody's business
            await r.idle()

    asyncio.run(run())


PHASES = {
    "while the draft rates": (KEEP, {"draft": {"first_s": 5}}, True),
    "before the target's first byte": (SEND, {"target": {"first_s": 5}}, True),
    "in the draft's stream": (KEEP, {"draft": {"gap_s": 0.03, "tokens": 400}}, True),
    "in the target's stream": (SEND, {"target": {"gap_s": 0.03, "tokens": 400}}, True),
    "in an answer that is not streamed": (SEND, {"target": {"gap_s": 0.03, "tokens": 400}}, False),
    "before an answer that is not streamed": (SEND, {"target": {"first_s": 5}}, False),
    "in the call that rates": (KEEP, {"draft": {"first_s": 5}}, "n"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_when_the_client_leaves_the_upstream_stops(phase):
    script, fault, stream = PHASES[phase]

    async def run():
        async with rig(script) as r:
            body = asking("?", script=fault, stream=stream is True, **({"n": 2} if stream == "n" else {}))

            async def read():
                async with r.http.stream("POST", "/v1/chat/completions", json=body) as reply:
                    async for _ in reply.aiter_raw():
                        pass

            reading = asyncio.create_task(read())
            while not any(c.running for c in r.counts()):
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.3)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await r.idle()
            assert sum(c.cancelled for c in r.counts()) >= 1
            assert r.gateway.book.totals == {"ok": 0, "error": 0, "gone": 1}
            assert not r.gateway.at_target

    asyncio.run(run())


WAITS = {
    "between two attempts": ({}, {"target": {"fail": 503, "retry_after": 1}}),
    "for a place": ({"limits": {"in_flight": 1, "queue_s": 20}}, {}),
    "for a batch": ({"policy": {"name": "microbatch", "max_n": 9, "max_wait_ms": 1500}}, {}),
}


@pytest.mark.parametrize("wait", WAITS)
def test_when_the_client_leaves_while_it_waits_nothing_is_called_for_it_any_more(wait):
    settings, fault = WAITS[wait]

    async def run():
        async with rig(SEND, **settings) as r:
            slow = asking("slow", model="draft", script={"draft": {"first_s": 1}})
            ahead = (
                [asyncio.create_task(r.http.post("/v1/chat/completions", json=slow))] if "limits" in settings else []
            )
            while len(r.gateway.tasks) < len(ahead):
                await asyncio.sleep(0.005)
            body = asking("?", script=fault)
            leaving = asyncio.create_task(r.http.post("/v1/chat/completions", json=body))
            while len(r.gateway.tasks) <= len(ahead):
                await asyncio.sleep(0.005)
            if fault:
                while not r.target.counts.failed:
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.3)
            before = r.draft.counts.started, r.target.counts.started
            leaving.cancel()
            await asyncio.gather(leaving, return_exceptions=True)
            await asyncio.gather(*ahead)
            await asyncio.sleep(1.5)  # the second attempt, the place, the batch: their time has come
            assert (r.draft.counts.started, r.target.counts.started) == before
            assert r.gateway.book.totals == {"ok": len(ahead), "error": 0, "gone": 1}
            assert (await r.http.post("/v1/chat/completions", json=asking("next"))).status_code == 200
            await r.idle()

    asyncio.run(run())


def test_a_silent_stream_is_kept_alive_and_a_too_silent_one_ended():
    async def run():
        async with rig(KEEP, timeouts={"keep_alive_s": 0.05, "between_bytes_s": 0.4}) as r:
            body = asking("?", stream=True, script={"draft": {"gap_s": 0.15, "tokens": 2}})
            reply = await r.http.post("/v1/chat/completions", json=body)
            assert ": keep-alive" in reply.text
            assert reply.text.rstrip().endswith("[DONE]")
            body["script"] = {"draft": {"gap_s": 0.0, "tokens": 2, "rating": "90\n"}, "target": {}}
            body = asking("?", stream=True, model="target", script={"target": {"gap_s": 0.6}})
            reply = await r.http.post("/v1/chat/completions", json=body)
            assert '"code": "timeout"' in reply.text
            await r.idle()

    asyncio.run(run())


def test_more_than_fits_waits_and_then_is_told_to_come_again():
    async def run():
        async with rig(KEEP, limits={"in_flight": 1, "queue": 1, "queue_s": 0.2}) as r:
            slow = asking("slow", script={"draft": {"first_s": 0.8}})
            running = asyncio.create_task(r.http.post("/v1/chat/completions", json=slow))
            while not r.draft.counts.running:
                await asyncio.sleep(0.005)
            replies = await asyncio.gather(*(r.http.post("/v1/chat/completions", json=asking("?")) for _ in range(3)))
            assert [reply.status_code for reply in replies] == [429] * 3
            assert all(reply.headers["retry-after"] == "1" for reply in replies)
            assert (await running).status_code == 200
            assert (await r.http.post("/v1/chat/completions", json=asking("?"))).status_code == 200

    asyncio.run(run())


def test_a_retry_budget_keeps_a_failing_server_from_being_flooded():
    async def run():
        async with rig(KEEP, retries={"share": 0.0, "backoff_s": 0.0}, circuit={"failures": 1000}) as r:
            for i in range(10):
                await r.client.chat.completions.create(**asking(f"q{i}"), **scripted(draft={"fail": 503}))
            assert r.draft.counts.started <= 10 + 3

    asyncio.run(run())
