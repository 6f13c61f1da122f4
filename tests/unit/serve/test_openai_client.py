"""The real `openai` client against the gateway: text, images, streams, usage, tools; over a socket and in process."""

import asyncio
import base64
import io
import json
from collections import Counter

import httpx2
import openai
import pytest
from gateways import asking, rig
from PIL import Image

from mmroute.bench.upstream import Script, expected_answer
from mmroute.serve.gateway import Gateway, build_app
from mmroute.serve.schema import assemble
from mmroute.serve.settings import Settings

KEEP, SEND = Script(rating="90\n"), Script(rating="09\n")


def picture(size=(8, 8), kind="PNG"):
    data = io.BytesIO()
    Image.new("RGB", size).save(data, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def seen(question, *urls):
    parts = [{"type": "image_url", "image_url": {"url": url, "detail": "low"}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


async def text_of(stream):
    return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])


@pytest.mark.parametrize(("script", "role"), [(KEEP, "draft"), (SEND, "target")])
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_is_the_models_own_and_the_headers_say_whose(script, role, stream):
    async def run():
        async with rig(script) as r:
            raw = await r.client.chat.completions.with_raw_response.create(**asking("where?"), stream=stream)
            answer = raw.parse()
            text = await text_of(answer) if stream else answer.choices[0].message.content
            assert text == expected_answer(role, "where?")
            told = {k.removeprefix("x-mmroute-"): v for k, v in raw.headers.items() if k.startswith("x-mmroute-")}
            assert (told["route"], told["reason"], told["policy"]) == (role, "rating", "threshold")
            assert told["model"] == {"draft": "small", "target": "large"}[role]
            assert float(told["score"]) == pytest.approx(
                float(told["target-rating"]) - float(told["draft-rating"]), abs=2e-4
            )
            assert told["attempts"] == {"draft": "1", "target": "2"}[role]
            if not stream:
                assert answer.model == told["model"]
                assert answer.usage.completion_tokens == 8  # the rating's three are not counted
                assert answer.choices[0].finish_reason == "stop"
                assert answer.choices[0].logprobs is None
            await r.idle()

    asyncio.run(run())


def test_a_rating_is_the_expectation_over_the_levels_and_a_digit_where_there_are_no_logprobs():
    async def run():
        for script, expected in ((KEEP, 0.7 * 9 / 9 + 0.3 * 9 / 9), (Script(rating="80\n"), 0.7 * 8 / 9 + 0.3 * 1)):
            async with rig(script) as r:
                reply = await r.http.post("/v1/route", json=asking("?"))
                assert reply.json()["draft_rating"] == pytest.approx(expected)
        async with rig(Script(rating="80\n", no_logprobs=True)) as r:
            assert (await r.http.post("/v1/route", json=asking("?"))).json()["draft_rating"] == pytest.approx(8 / 9)

    asyncio.run(run())


def test_route_decides_and_answers_nothing():
    async def run():
        async with rig(KEEP) as r:
            reply = (await r.http.post("/v1/route", json=asking("?"))).json()
            assert (reply["route"], reply["reason"], reply["threshold"]) == ("draft", "rating", 0.0)
            await r.idle()
            assert r.target.counts.started == 0
            assert r.draft.seen.total() + r.draft.counts.cancelled == 1

    asyncio.run(run())


def test_images_and_unknown_fields_reach_the_model_and_our_own_do_not():
    async def run():
        async with rig(KEEP) as r:
            url = picture()
            await r.client.chat.completions.create(
                model="auto",
                messages=seen("what?", url, picture((4, 4), "JPEG")),
                seed=7,
                extra_body={"top_k": 5, "mmroute": {"budget": 0.5}},
            )
            body = r.draft.bodies[-1]
            assert body["messages"][0]["content"][0] == {
                "type": "image_url",
                "image_url": {"url": url, "detail": "low"},
            }
            assert (body["top_k"], body["seed"], body["model"]) == (5, 7, "small")
            assert "mmroute" not in body

    asyncio.run(run())


def test_usage_in_a_stream_comes_only_if_asked_for_and_without_the_rating():
    async def run():
        async with rig(KEEP) as r:
            plain = [c async for c in await r.client.chat.completions.create(**asking("?"), stream=True)]
            assert all(c.usage is None and c.choices for c in plain)
            asked = await r.client.chat.completions.create(
                **asking("?"), stream=True, stream_options={"include_usage": True}
            )
            last = [c async for c in asked][-1]
            assert (last.choices, last.usage.completion_tokens, last.usage.total_tokens) == ([], 8, 18)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_the_client_asked_for_are_the_answers_alone(stream):
    async def run():
        async with rig(KEEP) as r:
            got = await r.client.chat.completions.create(**asking("?"), stream=stream, logprobs=True, top_logprobs=1)
            if stream:
                entries = [
                    e
                    for c in [c async for c in got]
                    for ch in c.choices
                    for e in (ch.logprobs.content if ch.logprobs else [])
                ]
            else:
                entries = got.choices[0].logprobs.content
            assert "".join(e.token for e in entries) == expected_answer("draft", "?")

    asyncio.run(run())


def test_a_token_limit_is_the_answers_and_makes_room_for_the_rating():
    async def run():
        async with rig(KEEP) as r:
            for name in ("max_tokens", "max_completion_tokens"):
                answer = await r.client.chat.completions.create(**asking("?"), **{name: 3})
                assert answer.choices[0].message.content == expected_answer("draft", "?", 3)
                assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)

    asyncio.run(run())


SHAPED = (
    {"n": 2},
    {"response_format": {"type": "json_object"}},
    {"stop": "\n"},
    {"logit_bias": {"5": 1}},
    {"tool_choice": "required"},
)


def test_a_request_that_shapes_its_output_is_rated_by_a_call_of_its_own():
    async def run():
        async with rig(KEEP) as r:
            for shaped in SHAPED:
                answer = await r.client.chat.completions.create(**asking("?"), **shaped)
                assert answer.choices[0].message.content == expected_answer("draft", "?")
                rate, real = r.draft.bodies[-2:]
                assert rate["max_tokens"] == 2
                assert not shaped.keys() & rate.keys()
                assert shaped.items() <= real.items()
                assert "chat_template_kwargs" not in real

    asyncio.run(run())


def test_rate_call_and_a_continued_turn_are_modes():
    async def run():
        async with rig(SEND, mode="rate_call") as r:
            answer = await r.client.chat.completions.create(**asking("?"))
            assert answer.choices[0].message.content == expected_answer("target", "?")
            assert [b.get("stream") for b in r.draft.bodies] == [False]
        async with rig(KEEP, rating_prefix="continue") as r:
            await r.client.chat.completions.create(**asking("?"))
            body = r.draft.bodies[0]
            assert body["messages"][-1] == {"role": "assistant", "content": "<rate>"}
            assert body["continue_final_message"] is True

    asyncio.run(run())


NAMES = (
    ("draft", {}, "draft", "forced"),
    ("large", {}, "target", "forced"),
    ("prp", {"mmroute": {"force": "target"}}, "target", "forced"),
    ("auto-b0", {}, "draft", "rating"),
    ("auto-b1.0", {}, "target", "rating"),
    ("auto-t0.95", {}, "draft", "rating"),
    ("router-prp-0.05", {}, "draft", "rating"),
    ("auto-b0.0", {"mmroute": {"budget": 1}}, "target", "rating"),
)


def test_a_models_name_can_say_how_to_route():
    async def run():
        async with rig(KEEP) as r:
            for model, extra, role, reason in NAMES:
                before = r.draft.counts.started
                body = {**asking("?"), "model": model}
                raw = await r.client.chat.completions.with_raw_response.create(**body, extra_body=extra)
                assert (raw.headers["x-mmroute-route"], raw.headers["x-mmroute-reason"]) == (role, reason), model
                asked = r.draft.counts.started - before
                assert asked == (reason != "forced" or role == "draft"), model

    asyncio.run(run())


def test_a_models_name_can_say_what_success_must_be_worth():
    async def run():
        for prices, weight, route in (({}, 0.5, "target"), ({}, 0.99, "draft"), ({"price_out": 0.9}, 0.99, "target")):
            of = {"draft": {"price_in": 0, **prices}, "target": {"price_in": 0, "price_out": 1}} if prices else {}
            async with rig(SEND, of=of, policy={"name": "threshold", "threshold": 9}) as r:
                answer = (await r.http.post("/v1/route", json={**asking("?"), "model": f"auto-l{weight}"})).json()
                gap = 1 - prices.get("price_out", 0.0)  # in units of the target's price
                assert (answer["route"], answer["reason"]) == (route, "rating")
                assert answer["threshold"] == pytest.approx(weight * gap)

    asyncio.run(run())


def test_a_request_routes_itself_even_where_the_policy_never_asks():
    async def run():
        async with rig(SEND, policy={"name": "always", "route": "draft"}) as r:
            for model, route, reason in (("auto", "draft", "always"), ("auto-t0.1", "target", "rating")):
                answer = (await r.http.post("/v1/route", json={**asking("?"), "model": model})).json()
                assert (answer["route"], answer["reason"]) == (route, reason)
            asks = [r.http.post("/v1/route", json={**asking(f"q{i}"), "model": "auto-b0.5"}) for i in range(60)]
            routes = [reply.json()["route"] for reply in await asyncio.gather(*asks)]
            assert 10 < routes.count("target") < 50

    asyncio.run(run())


def test_headers_set_what_the_body_leaves_open():
    async def run():
        async with rig(KEEP) as r:
            make = r.client.chat.completions.with_raw_response.create
            raw = await make(**asking("?"), extra_headers={"x-mmroute-force": "target", "x-request-id": "mine-1"})
            assert (raw.headers["x-mmroute-reason"], raw.headers["x-request-id"]) == ("forced", "mine-1")
            raw = await make(
                **asking("?"), extra_headers={"x-mmroute-budget": "1"}, extra_body={"mmroute": {"budget": 0}}
            )
            assert raw.headers["x-mmroute-route"] == "draft"
            raw = await make(**asking("?"), extra_headers={"x-mmroute-debug": "true"})
            assert json.loads(raw.text)["mmroute"]["reason"] == "rating"

    asyncio.run(run())


def test_models_are_listed():
    async def run():
        async with rig() as r:
            names = [m.id async for m in r.client.models.list()]
            assert names == ["auto", "draft", "target", "small", "large"]

    asyncio.run(run())


@pytest.mark.parametrize("missing", ["vision", "tools", "json_mode"])
def test_a_request_goes_only_where_it_can_be_served(missing):
    wants = {
        "vision": {"messages": seen("?", picture())},
        "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        "json_mode": {"response_format": {"type": "json_object"}},
    }[missing]

    async def run():
        async with rig(KEEP, of={"draft": {missing: False}}) as r:
            raw = await r.client.chat.completions.with_raw_response.create(**{**asking("?"), **wants})
            assert (raw.headers["x-mmroute-route"], raw.headers["x-mmroute-reason"]) == ("target", "capability")
            assert r.draft.counts.started == 0
            with pytest.raises(openai.BadRequestError):
                await r.client.chat.completions.create(**{**asking("?"), **wants, "model": "draft"})
        async with rig(KEEP, of={role: {missing: False} for role in ("draft", "target")}) as r:
            with pytest.raises(openai.BadRequestError, match="no model here"):
                await r.client.chat.completions.create(**{**asking("?"), **wants})

    asyncio.run(run())


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


def test_a_budget_is_kept_over_many_requests():
    async def run():
        async with rig(policy={"name": "budget", "budget": 0.3, "window": 32, "warmup": 8}) as r:
            gate = asyncio.Semaphore(16)

            async def one(i):
                async with gate:
                    return (await r.http.post("/v1/route", json=asking(f"q{i}"))).json()["route"]

            routes = await asyncio.gather(*(one(i) for i in range(120)))
            assert 0.2 <= routes.count("target") / 120 <= 0.4

    asyncio.run(run())


def test_micro_batches_keep_their_share_and_wait_only_so_long():
    async def run():
        async with rig(policy={"name": "microbatch", "budget": 0.5, "max_n": 4, "max_wait_ms": 30}) as r:
            asks = [r.http.post("/v1/route", json=asking(f"q{i}")) for i in range(8)]
            routes = [reply.json()["route"] for reply in await asyncio.gather(*asks)]
            assert routes.count("target") == 4
            alone = await r.http.post("/v1/route", json=asking("alone"))  # nobody else comes: it is not kept waiting
            assert alone.json()["reason"] == "rating"

    asyncio.run(run())


def test_a_shadow_policy_decides_and_does_not_act():
    async def run():
        async with rig(KEEP, policy={"name": "threshold", "threshold": 0, "shadow": True}) as r:
            told = (await r.http.post("/v1/route", json=asking("?"))).json()
            assert (told["route"], told["shadow"]) == ("target", "draft")

    asyncio.run(run())


def test_the_client_works_in_process_without_a_socket():
    async def run():
        async with rig(KEEP) as r:
            transport = httpx2.ASGITransport(build_app(r.gateway.settings, r.gateway))
            inner = httpx2.AsyncClient(transport=transport, base_url="http://inside")
            async with openai.AsyncOpenAI(base_url="http://inside/v1", api_key="none", http_client=inner) as client:
                answer = await client.chat.completions.create(**asking("in?"))
                assert answer.choices[0].message.content == expected_answer("draft", "in?")
                stream = await client.chat.completions.create(**asking("in?"), stream=True)
                assert await text_of(stream) == expected_answer("draft", "in?")

    asyncio.run(run())


def test_assembling_joins_texts_and_calls_by_index():
    calls = [{"index": 0, "id": "c1", "function": {"name": "look", "arguments": '{"at"'}}]
    more = [{"index": 0, "function": {"arguments": ": 3}"}}]
    deltas = [
        {"role": "assistant", "content": "a", "reasoning_content": "x"},
        {"content": "b", "reasoning_content": "y"},
    ]
    chunks = [{"id": "1", "model": "m", "choices": [{"index": 0, "delta": d}]} for d in deltas]
    chunks += [{"choices": [{"index": 0, "delta": {"tool_calls": c}}]} for c in (calls, more)]
    chunks += [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
        {"choices": [], "usage": {"total_tokens": 3}},
    ]
    whole = assemble(chunks)
    message = whole["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("ab", "xy")
    assert message["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 3}'}}
    ]
    assert (whole["choices"][0]["finish_reason"], whole["usage"]["total_tokens"]) == ("tool_calls", 3)


def test_keys_are_asked_for_and_compared():
    import hashlib
    import tempfile
    from pathlib import Path

    async def run():
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "keys"
            file.write_text(f"# ours\nann:{hashlib.sha256(b'secret').hexdigest()}\n")
            async with rig(KEEP, api_keys_file=file) as r:
                with pytest.raises(openai.AuthenticationError):
                    await r.client.chat.completions.create(**asking("?"))
                good = r.client.with_options(api_key="secret")
                assert (await good.chat.completions.create(**asking("?"))).choices
                assert r.draft.counts.started == 1
                for path, status in (
                    ("/stats", 401),
                    ("/v1/models", 401),
                    ("/health", 200),
                    ("/ready", 200),
                    ("/metrics", 200),
                    ("/", 200),
                ):
                    assert (await r.http.get(path)).status_code == status, path

    asyncio.run(run())


def test_two_gateways_may_live_in_one_process():
    settings = Settings(
        draft={"url": "http://127.0.0.1:1/v1", "model": "a"}, target={"url": "http://127.0.0.1:1/v1", "model": "b"}
    )
    one, two = Gateway(settings), Gateway(settings)
    one.book.attempt("draft", "200")
    assert b'code="200"' not in two.book.metrics({}, None)
    for gateway in (one, two):
        asyncio.run(gateway.aclose())
