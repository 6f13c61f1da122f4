"""Answers collected in batches are those given alone, and their figures are those of the model that wrote them."""

from typing import Any

import numpy as np
import pytest
import torch

from mmroute import cost, hub
from mmroute.backbones.images import prepare
from mmroute.backbones.load import load
from mmroute.engine.attach import attach
from mmroute.gate.base import Question
from mmroute.reason import answer_many
from mmroute.tasks._mixture import Part, draw_mixture
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.collect import collect, prompt_hash
from mmroute.train.folder import write_folder
from mmroute.train.prompts import chats_of
from mmroute.train.questions import ask
from mmroute.train.rollouts import _answer_from, roll_out
from mmroute.train.small_model import Shape, build

SMALL = Shape(hidden=64, layers=2, heads=2, kv_heads=1, mlp=64, vision_hidden=32, vision_heads=2, vision_mlp=32)
MIX = [Part(task="frozenlake:nano", share=1), Part(task="maze:nano", share=1)]
LONGEST = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("small") / "model"
    write_folder(folder, build(SMALL, VOCABULARY, 0), "", {})
    return load(folder, dtype="float32")


@pytest.fixture(scope="module")
def chats(model: Any) -> list:
    return chats_of(model, draw_mixture(MIX, 6, "test"), hub.load("think", "text"))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_its_singles(model: Any, chats: list, temperature: float) -> None:
    seeds = list(range(40, 46))
    with attach(model) as routed:
        given = {"max_new_tokens": LONGEST, "temperature": temperature}
        batched, _ = roll_out(routed, chats, seeds=seeds, **given)
        singles = [roll_out(routed, [chat], seeds=[s], **given)[0][0] for chat, s in zip(chats, seeds, strict=True)]
        answers = answer_many(routed, chats, seed=seeds, max_new_tokens=LONGEST, temperature=temperature)
    for one, other, plain in zip(batched, singles, answers, strict=True):
        assert one.ids == other.ids == plain.ids
        assert one.stats == pytest.approx(other.stats, abs=1e-4)
        np.testing.assert_allclose(one.prefill.last, other.prefill.last, atol=1e-4)
        np.testing.assert_allclose(one.prefill.mean, other.prefill.mean, atol=1e-4)
        assert one.flops - one.prefill_flops == other.flops - other.prefill_flops


def test_figures_are_those_of_one_pass_over_the_whole_answer(model: Any, chats: list) -> None:
    with attach(model) as routed:
        (wrote,), _ = roll_out(routed, chats[:1], max_new_tokens=LONGEST)
        trace = answer_many(routed, chats[:1], max_new_tokens=LONGEST)[0].trace
    batch = dict(prepare(model, model.processor, chats[:1]))
    prompt = batch["input_ids"].shape[1]
    ids = torch.cat([batch.pop("input_ids"), torch.tensor([wrote.ids])], 1)
    batch["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    mask = torch.ones_like(ids)
    with torch.no_grad():
        logits = model(input_ids=ids, **batch | {"attention_mask": mask}).logits[0, prompt - 1 : -1]
    logp = logits.log_softmax(-1)
    lp = logp.gather(1, torch.tensor(wrote.ids)[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    best = logp.topk(2).values
    want = {
        "lp_mean": lp.mean(), "lp_min": lp.min(), "ent_mean": entropy.mean(), "ent_max": entropy.max(),
        "margin": (best[:, 0] - best[:, 1]).mean(),
    }  # fmt: skip
    for name, value in want.items():
        assert wrote.stats[name] == pytest.approx(float(value), abs=1e-4), name
    assert wrote.prompt_tokens == prompt
    counted = cost.estimate_flops(trace)
    tower = wrote.prefill_flops - counted.prefill - 2 * SMALL.hidden * len(VOCABULARY)
    assert tower > 0  # what the vision tower takes, beside the text model
    assert wrote.flops == pytest.approx(counted.total + tower)


def test_the_answer_begins_behind_the_last_word_answer(model: Any) -> None:
    tokenizer = model.processor.tokenizer
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = encode("start r1c1 . s1 up r0c1 ice answer: hole_fall")
    assert tokenizer.decode(ids[_answer_from(tokenizer, ids) :]) == "hole_fall"
    assert _answer_from(tokenizer, encode("s1 up r0c1")) == 2
    assert _answer_from(tokenizer, encode("answer:")) == 0


def test_an_answer_cut_at_the_longest_length_is_wrong(model: Any) -> None:
    items = draw_mixture(MIX, 4, "test")
    think = hub.load("think", "text", max_new_tokens=2)
    with attach(model) as routed:
        rows = collect(routed, "draft", "m", items, think=think).rows
    assert {row.finish_reason for row in rows} == {"length"}
    assert {row.correct for row in rows} == {0.0}


def test_samples_are_rows_of_their_own_and_prompts_are_told_apart(model: Any) -> None:
    items = draw_mixture(MIX, 4, "test")
    assert len({prompt_hash(item) for item in items}) == 4
    think = hub.load("think", "text", max_new_tokens=6)
    with attach(model) as routed:
        found = collect(routed, "draft", "m", items, think=think, samples=3, temperature=1.0, batch=5)
        again = collect(routed, "draft", "m", items, think=think, samples=3, temperature=1.0, batch=12)
    assert [(row.query_id, row.sample) for row in found.rows] == [(i.sample.id, s) for i in items for s in range(3)]
    assert [row.stats for row in found.rows] == [pytest.approx(row.stats, abs=1e-4) for row in again.rows]
    assert len(found.seen) == 4
    assert found.asked == 12


def test_a_question_besides_is_answered_by_the_options_probabilities_and_charged(model: Any, chats: list) -> None:
    with attach(model) as routed:
        said = ask(routed, Question("p", "free wall", ("A", "B")), chats, ["start"] * 6, batch=4)
        alone = ask(routed, Question("p", "free wall", ("A", "B")), chats[5:], ["start"])
        other = ask(routed, Question("p", "free wall", ("B", "A")), chats[5:], ["start"])
        before = ask(routed, Question("p", "free wall", ("A", "B"), after_answer=False), chats[5:], ["start"])
        assert ask(routed, Question("p", "Is this right?", ("A", "B")), chats, ["start"] * 6) is None
        number = ask(routed, Question("n", "free wall"), chats[:2], ["start"] * 2)
        drawn = ask(routed, Question("p", "free wall", ("A", "B"), draws=8), chats, ["start"] * 6, batch=4)
        again = ask(routed, Question("p", "free wall", ("A", "B"), draws=8), chats[2:], ["start"] * 4)
        many = ask(routed, Question("p", "free wall", ("A", "B"), draws=20_000), chats[5:], ["start"])
    assert drawn is not None and again is not None and many is not None
    assert drawn[2:] == again
    assert all(8 * share == int(8 * share) for share, _ in drawn)
    assert many[0][0] == pytest.approx(alone[0][0], abs=0.02)  # a standard error is .0035
    assert drawn[5][1] == many[0][1] == alone[0][1]  # all of them from one reading
    assert said is not None and alone is not None and other is not None and before is not None and number is not None
    assert said[5] == pytest.approx(alone[0], abs=1e-5)
    assert alone[0][0] + other[0][0] == pytest.approx(1)
    assert before[0][1] < alone[0][1]  # the answer was not read
    assert all(0 <= reply <= 100 for reply, _ in number)
