"""A draft that writes its ratings, served by one gateway and read by another through the chat API alone."""

import asyncio
import contextlib
import json

import httpx2
import numpy as np
import pytest
import torch
from gateways import QUICK, as_openai, serving
from pairs import write_pair

from mmroute import hub
from mmroute.backbones.load import load
from mmroute.bench.upstream import ScriptedUpstream
from mmroute.errors import CheckpointMismatch, ConfigError
from mmroute.gate.prp import Prp
from mmroute.serve.gateway import Gateway, build_app
from mmroute.serve.settings import Settings
from mmroute.tasks._mixture import Part, draw_mixture
from mmroute.train.prompts import Prompts, chats_of
from mmroute.train.prp_config import PrpConfig
from mmroute.train.tokens import answers_of, fit_tokens

MIX = [Part(task="frozenlake:nano", share=1), Part(task="maze:nano", share=1)]
LONGEST = 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The gate on its draft, whose folder is beside `rater`, and questions."""
    folder = tmp_path_factory.mktemp("written")
    write_pair(folder)
    gate = Prp(form="tokens", calibration="none").bind(load(folder / "draft", dtype="float32"))
    chats = chats_of(gate.model, draw_mixture(MIX, 48, "val"), hub.load("think", "text"))
    is_maze = np.arange(48) % 2
    y, held = np.stack([1 - is_maze, np.full(48, 0.8)], 1), np.arange(48) % 4 == 0
    config = PrpConfig(batch=12, max_epochs=20, patience=20, warmup=3, lr_draft=1e-2)
    fit_tokens(gate, chats, answers_of(gate, chats, LONGEST), y, y, ~held, held, config)
    gate.model.processor.chat_template = gate.reader.template
    gate.facts = {"quantiles": np.linspace(-1, 1, 101).tolist()}
    for part in (gate.model, gate.model.processor):
        part.save_pretrained(folder / "tuned")
    gate.save(folder / "rater")
    return gate, folder, chats[:6]


@contextlib.asynccontextmanager
async def behind_http(folder, **settings):
    """A gateway whose draft is the tuned folder behind another gateway; the target is scripted."""
    inner = Settings(
        draft={"model": str(folder / "tuned"), "served": "small"},
        target={"model": str(folder / "tuned"), "served": "unused"},
        policy={"name": "always", "route": "draft"},
    )
    async with serving(build_app(inner)) as draft, serving(ScriptedUpstream("target")) as target:
        given = {"draft": {"url": f"{draft}/v1", "model": "small"}, "target": {"url": f"{target}/v1", "model": "large"}}
        outer = Settings(**{**given, **QUICK, "timeouts": {"rating_s": 120}, **settings})
        async with serving(build_app(outer)) as url, httpx2.AsyncClient(base_url=url, timeout=60) as http:
            yield http, draft


def text_of(reply):
    return reply.json()["choices"][0]["message"]["content"]


async def streamed(http, body):
    text, usage = "", None
    async with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as reply:
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                text += "".join(c["delta"].get("content") or "" for c in chunk["choices"])
                usage = chunk.get("usage") or usage
    return text, usage


@pytest.mark.parametrize("logprobs", [True, False])
def test_a_kept_answer_is_the_drafts_own_without_its_rating(trained, logprobs):
    gate, folder, chats = trained
    decode = gate.model.processor.tokenizer.decode
    wrote = answers_of(gate, chats, LONGEST, is_asked=True)
    raw = gate.ratings(Prompts.read(gate.model, chats).probs(gate), 20)

    async def run():
        async with behind_http(folder, policy={"name": "threshold", "threshold": 9}, peek_logprobs=logprobs) as (
            http,
            _,
        ):
            for i, chat in enumerate(chats):
                body = {"model": "auto", "messages": as_openai(chat), "max_tokens": LONGEST}
                reply = await http.post("/v1/chat/completions", json=body)
                assert reply.status_code == 200, reply.text
                told = {k.removeprefix("x-mmroute-"): v for k, v in reply.headers.items()}
                assert (told["route"], told["reason"]) == ("draft", "rating")
                whole = decode(wrote[i], skip_special_tokens=True)
                assert text_of(reply) == whole
                seen = reply.json()["usage"]["completion_tokens"]
                assert seen == len(wrote[i])
                assert await streamed(http, body) == (whole, None)
                asked = {**body, "stream_options": {"include_usage": True}}
                assert (await streamed(http, asked))[1]["completion_tokens"] == len(wrote[i])
                tolerance = 1e-4 if logprobs else 1.0  # one of ten levels tells less than their distribution
                assert float(told["draft-rating"]) == pytest.approx(raw.draft[i], abs=tolerance)
                if not logprobs:
                    assert float(told["draft-rating"]) * 9 == pytest.approx(raw.draft_probs[i].argmax(), abs=1e-4)

    asyncio.run(run())


def test_others_ask_the_same_server_and_see_no_rating(trained):
    gate, folder, chats = trained
    plain = answers_of(gate, chats[:2], LONGEST)

    async def run():
        async with behind_http(folder) as (_, draft), httpx2.AsyncClient(base_url=draft, timeout=60) as http:
            for chat, ids in zip(chats[:2], plain, strict=True):
                body = {"model": "small", "messages": as_openai(chat), "max_tokens": LONGEST}
                body |= {"logprobs": True, "top_logprobs": 3}
                reply = await http.post("/v1/chat/completions", json=body)
                whole = gate.model.processor.tokenizer.decode(ids, skip_special_tokens=True)
                assert text_of(reply) == whole
                entries = reply.json()["choices"][0]["logprobs"]["content"]
                assert "".join(e["token"] for e in entries) == whole
                assert all(e["logprob"] == e["top_logprobs"][0]["logprob"] for e in entries)  # greedy
                assert {len(e["top_logprobs"]) for e in entries} == {3}
            bad = await http.post("/v1/chat/completions", json={**body, "top_logprobs": 21})
            assert (bad.status_code, "top_logprobs is 0 to 20" in bad.text) == (400, True)

    asyncio.run(run())


def test_a_call_of_its_own_rates_where_the_answer_cannot_begin_with_one(trained):
    gate, folder, chats = trained
    (ids,) = answers_of(gate, chats[:1], LONGEST)
    raw = gate.ratings(Prompts.read(gate.model, chats[:1]).probs(gate), 20)

    async def run():
        async with behind_http(folder, policy={"name": "threshold", "threshold": 9}) as (http, _):
            body = {"model": "auto", "messages": as_openai(chats[0]), "max_tokens": LONGEST, "stop": ["3 4 5"]}
            reply = await http.post("/v1/chat/completions", json=body)
            assert text_of(reply) == gate.model.processor.tokenizer.decode(ids, skip_special_tokens=True)
            told = {k.removeprefix("x-mmroute-"): float(v) for k, v in reply.headers.items() if k.endswith("-rating")}
            assert told == pytest.approx({"draft-rating": raw.draft[0], "target-rating": raw.target[0]}, abs=1e-4)

    asyncio.run(run())


def test_the_artifact_calibrates_what_a_server_says_and_knows_the_first_threshold(trained, tmp_path):
    gate, folder, chats = trained
    raw = gate.ratings(Prompts.read(gate.model, chats[:1]).probs(gate), 20)
    calibrated = Prp(form="tokens").bind(gate.model)
    r = np.linspace(0.05, 0.95, 200)
    calibrated.calibrate([r, r], [(r > 0.3).astype(float), (r > 0.7).astype(float)])
    calibrated.facts = {"quantiles": np.linspace(-3, 3, 101).tolist()}
    artifact = calibrated.save(tmp_path / "rater")
    wanted = calibrated.ratings(Prompts.read(gate.model, chats[:1]).probs(gate), 20)
    assert abs(wanted.draft[0] - raw.draft[0]) > 0.01

    async def run():
        policy = {"name": "budget", "budget": 0.25}
        async with behind_http(folder, policy=policy, rater=tmp_path / "rater") as (http, _):
            reply = (await http.post("/v1/route", json={"model": "auto", "messages": as_openai(chats[0])})).json()
            assert reply["draft_rating"] == pytest.approx(wanted.draft[0], abs=1e-4)
            assert reply["score"] == pytest.approx(wanted.score[0], abs=1e-4)
            assert reply["threshold"] == pytest.approx(1.5)
            assert reply["artifact"] == f"prp:{artifact}"

    asyncio.run(run())


def test_an_artifact_that_no_server_can_write_is_refused(trained, tmp_path):
    gate, folder, _ = trained
    server = {
        "draft": {"url": "http://127.0.0.1:1/v1", "model": "s"},
        "target": {"url": "http://127.0.0.1:2/v1", "model": "l"},
    }
    Prp().bind(gate.model).save(tmp_path / "suffix")
    with pytest.raises(ConfigError, match=r"gate\.form=tokens"):
        Gateway(Settings(**server, rater=tmp_path / "suffix"))
    with pytest.raises(ConfigError, match="num_ratings is 1"):
        Gateway(Settings(**server, rater=folder / "rater", num_ratings=1))
    with pytest.raises(CheckpointMismatch, match="not a rater"):
        Gateway(Settings(**server, rater=tmp_path / "none"))


def test_the_pair_of_a_rating_and_its_newline_is_what_the_draft_learned(trained):
    gate, _, chats = trained
    with torch.no_grad():
        probs = Prompts.read(gate.model, chats).probs(gate)
    assert not probs.isnan().any()
