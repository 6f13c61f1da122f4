"""Answers behind latent steps: a batch as its rows alone, counted honestly, sampled and searched as stock would.

Legend: B batch, N positions.
"""

from contextlib import contextmanager

import families
import pytest
import torch
from conversations import picture

import mmroute
from mmroute import hub, session
from mmroute.backbones.images import prepare, user_message
from mmroute.errors import ConfigError, UnsupportedCall
from mmroute.session import Session
from mmroute.tokens import Modality
from mmroute.trace import Trace

STEPS = 5


def asked():
    """Prompts of different lengths, with one, two and one image; grids that are not square."""
    return [
        user_message("where is the red ball, please?", [picture(0)]),
        user_message("which?", [picture(1, (30, 50)), picture(2, (60, 30))]),
        user_message("how many balls?", [picture(3, (48, 90))]),
    ]


@contextmanager
def thinking(model, name="vedas", depth=True, **options):
    think = hub.load("think", name, **{"num_latents": 3, "max_new_tokens": STEPS, **options})
    deepen = hub.load("deepen", "vedas", deepen_tokens=6, scale_init=0.3) if depth else None
    prune = hub.load("prune", "random", vision_keep=0.6) if depth == "prune" else None
    with mmroute.attach(model, think=think, deepen=deepen, prune=prune) as routed:
        yield routed


@pytest.mark.parametrize("depth", [True, False, "prune"])
@pytest.mark.parametrize("name", [name for name in families.NAMES if name != "llava_next"])  # refused, test_latents.py
def test_each_conversation_is_answered_as_it_is_alone(name, depth, loaded):
    with thinking(loaded(name), depth=depth, replay_tokens=6) as routed:
        together = routed.answer_many(asked(), temperature=0.9, seed=[4, 5, 6])
        for i, conversation in enumerate(asked()):
            alone = routed.answer_many([conversation], temperature=0.9, seed=[4 + i])[0]
            got = together[i]
            assert (got.ids, got.latents, got.ar_steps) == (alone.ids, alone.latents, alone.ar_steps)
            assert got.trace.replayed == alone.trace.replayed
            assert got.trace.token_forwards == alone.trace.token_forwards
            assert [c.start for c in got.trace.calls] == [c.start for c in alone.trace.calls]


@pytest.mark.parametrize("name", ["vedas", "ivtlr", "coconut", "pause"])
def test_every_step_and_every_position_is_counted(name, loaded):
    options = {"replay_tokens": 4} if name in ("vedas", "ivtlr") else {}
    with thinking(loaded("qwen2_5_vl"), name, **options) as routed:
        answer = routed.answer_many(asked()[:1])[0]
    copies = 4 if options else 0
    assert answer.latents == 3
    assert answer.ar_steps == 3 + len(answer.ids)
    assert answer.trace.token_forwards == answer.prompt_tokens + 3 * (copies + 1) + len(answer.ids) - 1
    assert [c.kind for c in answer.trace.calls] == ["prefill"] + ["decode"] * (3 + len(answer.ids) - 1)
    assert [sum(c.new[0]) for c in answer.trace.calls[1:4]] == [copies + 1] * 3
    assert all(c.new[0][Modality.LATENT] == 1 for c in answer.trace.calls[1:4])
    assert [r["hop"] for r in answer.trace.replayed] == ([1, 2, 3] if options else [])
    seen = [c for r in answer.trace.replayed for c in r["columns"]]
    assert len(set(seen)) == len(seen) == 3 * copies
    assert Trace.from_json(answer.trace.to_json()) == answer.trace


@pytest.mark.parametrize("depth", [False, True])
def test_the_papers_setting_enters_325_positions(depth, loaded, monkeypatch):
    """220 of the prompt, 3 latents with 32 copies each, 7 answer tokens of which the last enters nothing."""
    model = loaded("qwen2_5_vl")
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    boards = [picture(i, (48, 48)) for i in range(3)]  # 36 tokens each, so that 96 can be copied

    def asked_in(letters):
        return [user_message("a" * letters, boards)]

    with thinking(model, depth=depth, replay_tokens=32, max_new_tokens=7) as routed:
        empty, one = (prepare(model, routed.processor, asked_in(n))["input_ids"].shape[1] for n in (1, 2))
        assert one == empty + 1, "a letter is a token"
        prompt = asked_in(1 + 220 - empty)
        answer = routed.answer_many(prompt)[0]
    assert answer.prompt_tokens == 220
    assert [len(r["columns"]) for r in answer.trace.replayed] == [32] * 3
    assert (answer.latents, len(answer.ids), answer.ar_steps) == (3, 7, 10)
    assert answer.trace.token_forwards == 325 == 220 + 3 * (32 + 1) + 7 - 1


@pytest.mark.parametrize("name", ["vedas", "coconut"])
def test_no_latents_is_answering_directly(name, loaded):
    model = loaded("llava")
    with thinking(model, name, depth=False, num_latents=0) as routed:
        got = routed.answer_many(asked())
    with mmroute.attach(model) as routed:
        want = routed.answer_many(asked(), think=hub.load("think", "direct", max_new_tokens=STEPS))
    assert [a.ids for a in got] == [a.ids for a in want]
    assert [a.ar_steps for a in got] == [len(a.ids) for a in want]


def test_the_head_ends_a_thought_where_it_would_write_the_answer(loaded, monkeypatch):
    model = loaded("qwen2_vl")
    with thinking(model, depth=False, replay_tokens=2, num_latents=6, stop="head") as routed:
        family, said = type(routed.family), []
        head = family.head
        monkeypatch.setattr(family, "head", lambda *args: said.append(head(*args).argmax(-1).tolist()) or head(*args))
        monkeypatch.setattr(session, "stop_id", lambda routed, think: -1)  # no word: all steps are taken
        whole = routed.answer_many(asked())
        said = said[1:7]  # before them the prompt's
        monkeypatch.setattr(session, "stop_id", lambda routed, think: said[1][0])
        ended = routed.answer_many(asked())
    want = [next((t for t, row in enumerate(said, 1) if row[b] == said[1][0]), 6) for b in range(3)]
    assert [a.latents for a in whole] == [6] * 3
    assert [a.latents for a in ended] == want
    assert min(want) <= 2
    assert len(set(want)) > 1, "rows end at different times"
    assert [a.ar_steps - len(a.ids) for a in ended] == want
    assert [a.trace.token_forwards for a in ended] == [
        a.prompt_tokens + 3 * n + len(a.ids) - 1 for a, n in zip(ended, want, strict=True)
    ]


def test_a_cue_that_the_vocabulary_cannot_write_is_refused(loaded):
    silent = thinking(loaded("llava"), "coconut", stop="head", answer_cue="")
    with silent as routed, pytest.raises(ConfigError, match=r"think\.answer_cue '' is no word of this vocabulary"):
        routed.answer_many(asked()[:1])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
@pytest.mark.parametrize("ends", [[], [70, 90, 110, 130, 150, 170, 190]])
def test_beams_find_what_stock_beams_find(name, ends, loaded):
    model = loaded(name)
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = ends or None
    try:
        with thinking(model, depth=False, num_latents=0) as routed:
            got = routed.answer_many(asked(), num_beams=3)
            alone = [routed.answer_many([c], num_beams=3)[0].ids for c in asked()]
        for ids, conversation in zip([a.ids for a in got], asked(), strict=True):
            batch = prepare(model, model.processor, [conversation])
            stock = model.generate(**batch, max_new_tokens=STEPS, num_beams=3, do_sample=False)
            written = stock[0, batch["input_ids"].shape[1] :].tolist()
            assert ids == written
        assert [a.ids for a in got] == alone
    finally:
        model.generation_config.eos_token_id = before


def test_beams_go_on_from_latents_and_are_no_worse_than_greedy(loaded):
    model = loaded("qwen2_5_vl")
    with thinking(model, replay_tokens=4) as routed:
        greedy, beams = (routed.answer_many(asked(), num_beams=n) for n in (1, 4))
        again = [routed.answer_many([c], num_beams=4)[0] for c in asked()]
    assert [b.ids for b in beams] == [a.ids for a in again]
    assert [b.latents for b in beams] == [3] * 3
    assert all(len(b.ids) == len(g.ids) for b, g in zip(beams, greedy, strict=True))
    assert beams[0].trace.token_forwards > greedy[0].trace.token_forwards, "every beam is counted"
    with thinking(model) as routed, pytest.raises(ConfigError, match="num_beams >= 1 is needed, and above 1 no temp"):
        routed.answer_many(asked(), num_beams=2, temperature=1.0)


def test_two_sessions_in_turns_are_as_one_after_the_other(loaded):
    model = loaded("qwen3_vl")
    with thinking(model, replay_tokens=3) as routed, torch.no_grad():
        think = routed.think

        def begin(i):
            session = Session(routed)
            session.append(prepare(model, routed.processor, asked()[i : i + 1]), think=think)
            return session

        one, two = begin(0), begin(1)
        first, second = one.think(think, [0]), two.think(think, [1])
        turns = one.step(first.argmax(-1)), two.step(second.argmax(-1))
        for i, (before, after) in enumerate(zip((first, second), turns, strict=True)):
            session = begin(i)
            assert torch.equal(session.think(think, [i]), before)
            assert torch.equal(session.step(before.argmax(-1)), after)
            with pytest.raises(UnsupportedCall, match="an observation behind latent steps"):
                session.append(prepare(model, routed.processor, asked()[:1]))
