"""Options by likelihood are those of a plain forward for each of them, whatever shares a batch or a cache."""

import pytest
import torch
from benchmarks import place
from made import picture

from mmroute import cost, hub
from mmroute.backbones.images import prepare
from mmroute.bench import answers, items
from mmroute.bench.likelihood import option_likelihoods
from mmroute.errors import ConfigError, InputError
from mmroute.recipe import equip, read
from mmroute.session import Session
from mmroute.tasks.base import Card
from mmroute.tasks.hub._public import Public

OPTIONS = (["red", "a pale blue one", "green"], ["left of it", "right"], ["no", "yes it is", "none", "all of them"])
ROUTES = {
    "none": [],
    "random": ["prune.vision_keep=0.5", "prune.text_keep=0.7"],
    "snapkv": ["prune.vision_keep=0.4"],
    "direct": ["deepen.name=uniform"],
}


class Three(Public):
    """Items with different numbers of options, pictures and words."""

    name = "three"
    card = Card(("x/three",), {"test": 3}, "MIT", "likelihood", "accuracy", 0.3)
    sources = ()
    categories = ()

    def samples(self, split, n=None, offset=0):
        return iter([self.sample({}, split, i) for i in range(3)][:n])

    def sample(self, row, split, number):
        images = [picture(number + i) for i in range(1 + number % 2)]
        question = " ".join(["Which is it?"] * (number + 1))
        return self.make(split, number, question=question, images=images, options=OPTIONS[number], answer="B")


def asked_of(routed, samples):
    task = Three()
    (asked,) = items.Prompts(samples, len(samples)).batches(routed, task, hub.load("think", "direct"))
    return asked


def ids_of(model, sample):
    return [model.processor.tokenizer(c.text, add_special_tokens=False)["input_ids"] for c in sample.choices]


def naive_stock(model, sample):
    """Each option behind the prompt in a forward of its own, of a model that is attached to nothing."""
    out = []
    for ids in ids_of(model, sample):
        batch = dict(prepare(model, model.processor, [Three().messages(sample, "question")]))
        tail = torch.tensor([ids])
        batch["input_ids"] = torch.cat([batch["input_ids"], tail], 1)
        for key, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
            if key in batch:
                batch[key] = torch.cat([batch[key], torch.full_like(tail, fill)], 1)
        logs = model(**batch).logits[0].float().log_softmax(-1)[-len(ids) - 1 : -1]
        out.append(float(logs.gather(1, tail.T).mean()))
    return out


def naive_routed(routed, sample):
    """The same, option by option and word by word on a cache of its own."""
    out = []
    for ids in ids_of(routed, sample):
        session = Session(routed, reserve=len(ids))
        logits = session.append(asked_of(routed, [sample]).batch)
        logs = []
        for word in ids:
            logs.append(float(logits[0].float().log_softmax(-1)[word]))
            logits = session.step(torch.tensor([word]), [1])
        out.append(sum(logs) / len(logs))
    return out


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava", "chameleon"])
@torch.no_grad()
def test_likelihoods_are_those_of_the_stock_model_option_by_option(family, loaded):
    model, samples = loaded(family), list(Three().samples("test"))
    expected = [naive_stock(model, sample) for sample in samples]
    with equip(model, read("direct")) as (routed, _):
        found, _ = option_likelihoods(routed, asked_of(routed, samples), [ids_of(routed, s) for s in samples])
    assert [len(values) for values in found] == [3, 2, 4]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
        assert len(set(theirs)) == len(theirs)


@pytest.mark.parametrize("recipe", ROUTES)
@torch.no_grad()
def test_a_routed_prompt_is_shared_by_options_as_if_each_had_its_own(recipe, loaded):
    model, samples = loaded("qwen2_5_vl"), list(Three().samples("test"))
    with equip(model, read(recipe, ROUTES[recipe])) as (routed, _):
        expected = [naive_routed(routed, sample) for sample in samples]
        found, _ = option_likelihoods(routed, asked_of(routed, samples), [ids_of(routed, s) for s in samples])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=2e-5)
    stock = naive_stock(model, samples[0])
    assert (found[0] == pytest.approx(stock, abs=2e-5)) == (recipe == "none")  # the routes do something


def test_answers_and_costs_are_those_of_single_items(loaded):
    samples, recipe = list(Three().samples("test")), read("random", ROUTES["random"])
    alone, together = (answers.answer_items(loaded("qwen2_5_vl"), recipe, Three(), samples, batch) for batch in (1, 3))
    assert [a.text for a in alone.answers] == [a.text for a in together.answers]
    assert all(a.text in each for a, each in zip(together.answers, OPTIONS, strict=True))
    assert [s.scorer for s in together.scores] == ["likelihood"] * 3
    for one, other in zip(alone.answers, together.answers, strict=True):
        assert cost.estimate_flops(one.trace) == cost.estimate_flops(other.trace)
        assert cost.estimate_kv_bytes(one.trace) == cost.estimate_kv_bytes(other.trace)
        assert (one.ar_steps, one.prompt_tokens) == (1, other.prompt_tokens)
    spent = cost.estimate_flops(together.answers[2].trace)
    assert spent.prefill > spent.decode > 0


@pytest.fixture
def tiny():
    import mmroute

    return mmroute.load("tiny")


def test_the_best_option_is_right_and_what_the_vocabulary_cannot_tell_apart_is_no_answer(tiny):
    samples = [
        Three().make("test", i, question="task: maze", images=[picture(1)], options=listed, answer=0)
        for i, listed in enumerate([["left", "right", "up"], ["quokka", "wombat"]])
    ]
    found = answers.answer_items(tiny, read("direct"), Three(), samples, 2)
    told, lost = found.scores
    assert told.parsed
    assert told.correct == float(found.answers[0].text == "left")
    assert (lost.parsed, lost.prediction, lost.correct) == (False, None, 0.0)


def test_what_options_cannot_answer_is_refused(tiny):
    (sample, *_) = Three().samples("test")
    with pytest.raises(ConfigError, match=r"bare question; use --set think.name=direct"):
        answers.answer_items(tiny, read("latent"), Three(), [sample], 1)
    open_ended = Three().make("test", 0, question="How many?", images=[picture(1)], answer="3")
    with pytest.raises(InputError, match="has 0 options, likelihoods compare two or more"):
        answers.answer_items(tiny, read("direct"), Three(), [open_ended], 1)


def test_a_card_or_a_setting_says_how_a_benchmark_is_answered(tmp_path):
    place(tmp_path, "scienceqa", 0)
    task = hub.load("tasks", "scienceqa", data_root=str(tmp_path), protocol="likelihood")
    (sample, *_) = task.samples("test")
    (message,) = items.messages(None, task, sample, hub.load("think", "text"))
    assert message["content"][-1]["text"] == "Look at the animals.\nWhich is a mammal?"
    protocols = {name: hub.load("tasks", name).protocol for name in ("scienceqa", "clevr4", "maze")}
    assert protocols == {"scienceqa": "generate", "clevr4": "likelihood", "maze": "generate"}
    with pytest.raises(ConfigError, match="protocol"):
        hub.load("tasks", "scienceqa", protocol="guess")
