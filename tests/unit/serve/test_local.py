"""Models of this process: the streamed answer is the library's own, the draft's prefill is kept, leaving stops it."""

import asyncio
import json

import numpy as np
import pytest
from gateways import QUICK, as_openai, asking, serving
from httpx2 import AsyncClient
from PIL import Image

import mmroute
from mmroute import hub, recipe
from mmroute.gate.base import Rating
from mmroute.gate.prp import Prp
from mmroute.serve.gateway import Gateway, build_app
from mmroute.serve.local import SESSIONS, LocalUpstream
from mmroute.serve.session_raters import FirstToken
from mmroute.serve.settings import Settings, UpstreamSettings
from mmroute.serve.upstreams import Fault


class Fixed:
    """Rates as it is told, and counts the positions it has seen."""

    artifact, after = "fixed", 0

    def __init__(self, draft, target):
        self.value, self.seen = Rating(target - draft, draft, target), []

    def rate(self, session, logits):
        self.seen.append(session.ids.shape[1])
        return self.value

    def start(self, budget):
        return None


@pytest.fixture(scope="module")
def sample():
    task = hub.load("tasks", "maze")
    return task.messages(next(task.samples("test", 1)), "cot")


@pytest.fixture(scope="module")
def settings():
    return Settings(**{**QUICK, "timeouts": {"rating_s": 120}})


@pytest.fixture(scope="module")
def models(settings):
    """The bundled model, as a draft that is routed and as a target that is not; loaded once."""
    made = {
        "draft": LocalUpstream("draft", settings.draft, settings, Fixed(1, 0)),
        "target": LocalUpstream("target", settings.target, settings),
    }
    made["draft"].counterpart = made["target"]
    for model in made.values():
        model.start()
    yield made
    for model in made.values():
        asyncio.run(model.aclose())


async def spoken(reply):
    payloads = [p async for p in reply]
    assert payloads[-1] == b"[DONE]"
    chunks = [json.loads(p) for p in payloads[:-1]]
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    return text, chunks


@pytest.mark.parametrize("role", ["draft", "target"])
def test_the_streamed_answer_is_the_one_the_library_gives(models, sample, role):
    used = models[role].settings
    with recipe.equip(used.model, recipe.read(used.recipe)) as (routed, think):
        wanted = routed.answer_many([sample], think=think)[0]
        drawn = routed.answer_many([sample], think=think, temperature=1.5, seed=[3], max_new_tokens=12)[0]

    async def run():
        text, chunks = await spoken(await models[role].open({"messages": as_openai(sample)}, True, "one"))
        assert text == wanted.text
        usage = chunks[-1]["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (wanted.prompt_tokens, wanted.ar_steps)
        body = {"messages": as_openai(sample), "temperature": 1.5, "seed": 3, "max_tokens": 12}
        assert (await spoken(await models[role].open(body, True, "two")))[0] == drawn.text

    asyncio.run(run())


def test_a_kept_draft_reads_its_prompt_once_and_answers_as_if_ungated(models, sample):
    async def run():
        plain, _ = await spoken(await models["draft"].open({"messages": as_openai(sample)}, True, "plain"))
        reply = models["draft"].begin({"messages": as_openai(sample)}, "gated", park=True)
        assert await reply.rated() == Rating(-1, 1, 0)
        before = models["draft"].steps
        reply.resume()
        text, chunks = await spoken(reply)
        assert text == plain
        # One prefill; after it one step for each token but the last, which ends the answer.
        assert models["draft"].steps - before == chunks[-1]["usage"]["completion_tokens"] - 1
        assert reply.report["flops"] > reply.prefill_flops > 0
        assert reply.report["flops_target"] > reply.report["flops"]  # the draft is routed, the target is not

    asyncio.run(run())


def test_a_rating_after_some_tokens_comes_before_them_and_the_answer_stays(models, sample):
    async def run():
        draft = models["draft"]
        before, rater = draft.rater, Fixed(1, 0)
        plain, _ = await spoken(await draft.open({"messages": as_openai(sample)}, True, "plain"))
        prompt = rater.after
        for after in (3, 500):  # 500: the answer is over before
            draft.rater, rater.after, rater.seen = rater, after, []
            reply = draft.begin({"messages": as_openai(sample)}, "late", park=True)
            assert await reply.rated() == Rating(-1, 1, 0)
            written = rater.seen[0] - reply.prompt_tokens
            assert written == 3 if after == 3 else 3 < written < 500
            assert reply._job.out.empty()  # its text waits for the route
            reply.resume()
            text, _ = await spoken(reply)
            assert text == plain
        draft.rater, rater.after = before, prompt

    asyncio.run(run())


def test_sessions_take_turns_and_each_gets_its_own_answer(models):
    task = hub.load("tasks", "maze")
    many = [task.messages(s, "cot") for s in task.samples("test", SESSIONS + 2)]

    async def run():
        alone = [(await spoken(await models["target"].open({"messages": as_openai(m)}, True, "a")))[0] for m in many]
        replies = [await models["target"].open({"messages": as_openai(m)}, True, "b") for m in many]
        together = await asyncio.gather(*(spoken(reply) for reply in replies))
        assert [text for text, _ in together] == alone
        assert len(set(alone)) > 1

    asyncio.run(run())


def test_leaving_stops_the_steps(models, sample):
    async def run():
        model = models["target"]
        for park in (False, True):
            reply = model.begin({"messages": as_openai(sample)}, "left", park=park)
            if park:
                await reply.rated() if model.rater else None
            stream = aiter(reply)
            if not park:
                await anext(stream)
                await anext(stream)
            await reply.aclose()
            await asyncio.sleep(0.3)
            steps = model.steps
            await asyncio.sleep(0.3)
            assert model.steps == steps

    asyncio.run(run())


def test_stop_sequences_end_an_answer_and_do_not_show(models, sample):
    async def run():
        whole, _ = await spoken(await models["target"].open({"messages": as_openai(sample)}, True, "w"))
        stop = whole[len(whole) // 2 :][:6]
        text, chunks = await spoken(
            await models["target"].open({"messages": as_openai(sample), "stop": [stop, "never"]}, True, "s")
        )
        assert text == whole[: whole.index(stop)]
        finish = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
        assert finish[-1] == "stop"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"n": 2}, 400),
        ({"max_tokens": 0, "max_completion_tokens": -1}, 400),
        ({"temperature": -1}, 400),
        ({"top_p": 3}, 400),
    ],
    ids=str,
)
def test_what_a_local_model_does_not_do_is_refused(models, sample, change, status):
    async def run():
        with pytest.raises(Fault) as refused:
            await spoken(await models["target"].open({"messages": as_openai(sample), **change}, True, "x"))
        assert (refused.value.status, refused.value.ours) == (status, True)
        text, _ = await spoken(await models["target"].open({"messages": as_openai(sample)}, True, "after"))
        assert text  # the worker lives on

    asyncio.run(run())


@pytest.mark.parametrize("odd", [{"max_tokens": 10**12}, {"seed": 10**30, "temperature": 1.0}, {"temperature": 1e-300}])
def test_what_is_beyond_any_model_is_answered_within_what_it_can(models, sample, odd):
    async def run():
        text, chunks = await spoken(await models["target"].open({"messages": as_openai(sample), **odd}, True, "x"))
        assert text
        assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]][-1] == "stop"

    asyncio.run(run())


def test_an_answer_ends_where_the_model_can_read_no_further(models):
    async def run():
        room = models["target"].routed.model.config.get_text_config(decoder=True).max_position_embeddings
        long = [{"role": "user", "content": "start " * (room - 20)}]
        body = {"messages": long, "max_tokens": 50}
        _, chunks = await spoken(await models["target"].open(body, True, "x"))
        assert chunks[-1]["usage"]["total_tokens"] == room + 1  # its last token is written and not read
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"

    asyncio.run(run())


def test_the_first_token_rates_by_how_sure_it_is():
    import torch

    sure, unsure = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0]])
    assert FirstToken().rate(None, unsure).draft == pytest.approx(1 / 3)
    assert FirstToken().rate(None, sure).draft > 0.99
    assert FirstToken().rate(None, sure).score < FirstToken().rate(None, unsure).score


def test_a_trained_rater_rates_the_session_and_leaves_the_answer_as_it_was(models, settings, sample, tmp_path):
    draft = models["draft"]
    artifact = Prp().bind(draft.routed.model).save(tmp_path / "rater")

    async def run():
        before = draft.rater
        wanted, _ = await spoken(await draft.open({"messages": as_openai(sample)}, True, "plain"))
        given = settings.model_copy(update={"rater": tmp_path / "rater"})
        gateway = Gateway(settings, upstreams=dict(models), reread=lambda: given)
        assert await gateway.reload()
        assert gateway.live.artifact == draft.artifact == f"prp:{artifact}"
        reply = draft.begin({"messages": as_openai(sample)}, "rated", park=True)
        rating = await reply.rated()
        assert rating.draft == rating.target == pytest.approx(0.5)  # fresh weights tell nothing apart
        reply.resume()
        assert (await spoken(reply))[0] == wanted
        trained = draft.rater
        (tmp_path / "rater" / "rater.json").write_text("{")
        assert not await gateway.reload()  # a broken artifact changes nothing
        assert draft.rater is trained
        assert gateway.live.artifact == f"prp:{artifact}"
        draft.rater = before

    asyncio.run(run())


@pytest.mark.parametrize(("rating", "role"), [((1, 0), "draft"), ((0, 1), "target")])
def test_the_gateway_rates_on_the_session_and_tells_what_ran(models, settings, sample, rating, role):
    async def run():
        models["draft"].rater = rater = Fixed(*rating)
        gateway = Gateway(settings, upstreams=dict(models))
        gateway.aclose = lambda: asyncio.sleep(0)  # the models outlive it
        async with serving(build_app(settings, gateway)) as url, AsyncClient(base_url=url, timeout=60) as http:
            body = {"model": "auto", "messages": as_openai(sample), "mmroute": {"debug": True}}
            reply = await http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            assert reply.headers["x-mmroute-route"] == role
            assert reply.json()["model"] == models[role].name
            told = reply.json()["mmroute"]
            assert told["run"]["view"]["grid"] == [10, 10]
            kept = told["run"]["view"]["kept"]
            assert (len(kept[-1]) < len(kept[0])) == (role == "draft")  # `schedule` prunes, the target does not
            assert len(rater.seen) == 1
            stats = (await http.get("/stats")).json()
            assert stats["cost"]["unit"] == "GFLOPs"
            share = stats["cost"]["cost"] / stats["cost"]["always_target"]
            assert share < 1 if role == "draft" else share > 1  # who is sent on has paid for the rating too
            bad = {"model": "auto", "messages": asking("x")["messages"], "tools": [{"type": "function"}]}
            assert (await http.post("/v1/chat/completions", json=bad)).status_code == 400
            example = (await http.get("/example?task=frozenlake&n=3")).json()
            assert example["images"][0].startswith("data:image/png;base64,")
            assert "<image>" in example["question"]
            assert (await http.get("/example?task=secret")).status_code == 404
            assert not gateway.tasks

    asyncio.run(run())


def test_any_family_serves_from_its_folder(tiny_folder, settings):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    folder = tiny_folder("llava")
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "where?"}]}]
    with mmroute.attach(mmroute.load(folder)) as routed:
        wanted = routed.answer_many([messages], max_new_tokens=6)[0].text
    model = LocalUpstream("draft", UpstreamSettings(model=str(folder), served="llava"), settings, FirstToken())
    model.start()

    async def run():
        text, _ = await spoken(await model.open({"messages": as_openai(messages), "max_tokens": 6}, True, "x"))
        assert text == wanted
        await model.aclose()

    asyncio.run(run())
