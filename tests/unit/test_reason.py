"""The hop loop: a batch answers as its rows do alone, unrouted it writes what stock `generate` writes, traces add up.

Legend: B batch, N positions.
"""

import logging

import families
import pytest
import torch
from conversations import METHODS, STEPS, asked, ending_with, picture, routed_as
from dictation import dictated
from oracle import closed_later, masked_forward
from PIL import Image

import mmroute
from mmroute import hub, reason
from mmroute.backbones.images import prepare, user_message
from mmroute.cost import estimate_flops, estimate_kv_bytes, keep_shares, kv_bytes_per_slot
from mmroute.decoding import sample
from mmroute.errors import ConfigError, InputError
from mmroute.prune.base import Pruner


def cut(ids, ends):
    """A completion up to its first end, that included."""
    at = [i for i, value in enumerate(ids) if value in ends]
    return ids[: at[0] + 1] if at else ids


def costs(answer):
    flops, peak = estimate_flops(answer.trace), estimate_kv_bytes(answer.trace, "peak")
    return flops.prefill, flops.decode, flops.lm_head, peak, keep_shares(answer.trace)


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", families.NAMES)
def test_a_batch_gives_each_row_the_answer_and_the_trace_it_gets_alone(name, method, loaded):
    with routed_as(loaded(name), method) as routed:
        routed.full_trace = True
        batch = routed.answer_many(asked(), max_new_tokens=STEPS)
        for conversation, together in zip(asked(), batch, strict=True):
            alone = routed.answer_many([conversation], max_new_tokens=STEPS)[0]
            assert together.ids == alone.ids
            assert (together.text, together.hops, together.ar_steps) == (alone.text, alone.hops, alone.ar_steps)
            assert together.prompt_tokens == alone.prompt_tokens == sum(alone.trace.calls[0].new[0])
            assert costs(together) == costs(alone)
            if method == "pyramiddrop":  # its scores are computed on padding too, and each row is charged its part
                extra = [estimate_flops(a.trace).extra for a in (together, alone)]
                assert extra[0] >= extra[1] > 0
                for answer in (together, alone):
                    for call in answer.trace.calls:
                        for layer in call.layers:
                            layer.extra_flops = 0
            assert together.trace == alone.trace
            if method != "none":
                shares = keep_shares(alone.trace)
                assert shares["vision"] < 1 or method == "knorm"


@pytest.mark.parametrize("name", families.NAMES)
def test_unrouted_answers_are_what_stock_generate_writes(name, loaded):
    model = loaded(name)
    batch = prepare(model, model.processor, asked())
    stock = model.generate(**batch, max_new_tokens=STEPS, do_sample=False)[:, batch["input_ids"].shape[1] :]
    with mmroute.attach(model) as routed:
        answers = routed.answer_many(asked(), max_new_tokens=STEPS)
    assert [a.ids for a in answers] == stock.tolist()
    assert len({tuple(a.ids) for a in answers}) > 1
    assert [a.text for a in answers] == model.processor.tokenizer.batch_decode(stock, skip_special_tokens=True)


@pytest.mark.parametrize("method", ["none", "fastv"])
@pytest.mark.parametrize("name", families.NAMES)
def test_rows_that_end_leave_the_batch_and_change_nothing_for_the_others(name, method, loaded):
    model = loaded(name)
    with routed_as(model, method) as routed:
        options = {"max_new_tokens": 2 * STEPS, "temperature": 2.0}  # greedy random models repeat themselves
        whole = routed.answer_many(asked(), **options)
        ends = {whole[0].ids[2], whole[1].ids[5]}
        with ending_with(model, sorted(ends)):
            answers = routed.answer_many(asked(), **options)
    expected = [cut(a.ids, ends) for a in whole]
    assert [a.ids for a in answers] == expected
    assert [a.ar_steps for a in answers] == [len(ids) for ids in expected]
    assert [a.finished for a in answers] == [ids[-1] in ends for ids in expected]
    assert len({len(ids) for ids in expected}) > 1
    # The last token of a row is never entered: a row costs nothing after it has ended.
    assert [len(a.trace.calls) for a in answers] == [len(ids) for ids in expected]


def test_a_single_end_token_is_understood_too(loaded):
    model = loaded("llava")
    with mmroute.attach(model) as routed:
        free = routed.answer_many(asked()[:1], max_new_tokens=3)[0]
        with ending_with(model, free.ids[0]):
            assert routed.answer_many(asked()[:1], max_new_tokens=3)[0].ids == free.ids[:1]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "chameleon"])
def test_a_sample_depends_on_its_seed_and_not_on_the_batch(name, loaded):
    options = {"temperature": 1.2, "top_p": 0.9, "max_new_tokens": STEPS}
    with mmroute.attach(loaded(name)) as routed:
        batch = routed.answer_many(asked(), seed=5, **options)
        for i, conversation in enumerate(asked()):
            assert routed.answer_many([conversation], seed=5 + i, **options)[0].ids == batch[i].ids
        assert routed.answer_many(asked()[::-1], seed=[7, 6, 5], **options)[2].ids == batch[0].ids
        same = routed.answer_many([asked()[0]] * 4, seed=0, **options)
        assert len({tuple(a.ids) for a in same}) > 1
        cold = routed.answer_many(asked(), seed=5, temperature=1e-4, max_new_tokens=STEPS)
        assert [a.ids for a in cold] == [a.ids for a in routed.answer_many(asked(), max_new_tokens=STEPS)]


def test_top_p_samples_from_the_smallest_set_that_holds_that_share():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def drawn(top_p):
        return {int(sample(logits, 1.0, top_p, [torch.Generator().manual_seed(s)])) for s in range(200)}

    assert drawn(1.0) == {0, 1, 2, 3}
    assert drawn(0.8) == {0, 1}
    assert drawn(0.81) == {0, 1, 2}
    assert drawn(0.01) == {0}


# ---------------------------------------------------------------------- hops


class Forgetful(Pruner):
    """Runs everything; when a hop ends, every second slot it wrote is forgotten."""

    def rate(self, layer, num_layers, hop, modality):
        return None

    def scores(self, x, tokens, site):
        raise AssertionError("nothing is left out, so nobody may ask for scores")

    def close(self, slots, closing, layer):
        asked_for = slots.generated & (slots.hop == closing[:, None]) & ~slots.protected & slots.valid
        return slots.valid & ~(asked_for & (asked_for.cumsum(1) % 2 == 1))


SCRIPTS = ["ab\ncdefgh\nijk\nlmnopq", "abcdefghijklm\npqrs!", "\nab\n\ncdef!"]
"""What three rows are made to write; `!` ends."""


def letters(tokenizer, scripts=SCRIPTS):
    """Token ids of each script, a letter each."""
    return [tokenizer.backend_tokenizer.encode(script, add_special_tokens=False).ids for script in scripts]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_hops_are_cut_where_the_way_to_think_says(name, loaded, monkeypatch):
    model = loaded(name)
    tokenizer = model.processor.tokenizer
    with mmroute.attach(model) as routed, ending_with(model, tokenizer.convert_tokens_to_ids("!")):
        with dictated(monkeypatch, letters(tokenizer)):
            answers = routed.answer_many(asked(), max_new_tokens=20)
        assert [a.ids for a in answers] == letters(tokenizer)
        assert [a.hops for a in answers] == [
            ["ab", "\ncdefgh", "\nijk", "\nlmnopq"],
            ["abcdefghijklm", "\npqrs!"],
            ["\nab", "\n", "\ncdef!"],
        ]
        assert [a.finished for a in answers] == [False, True, True]
        assert [call.hop[0] for call in answers[2].trace.calls] == [0, 1, 1, 1, 2, 3, 3, 3, 3, 3]
        with dictated(monkeypatch, letters(tokenizer)):
            direct = routed.answer_many(asked(), think=hub.load("think", "direct"))
        assert [len(a.hops) for a in direct] == [1, 1, 1]
        assert [a.ar_steps for a in direct] == [16, 16, 10]


@torch.no_grad()
@pytest.mark.parametrize("name", families.NAMES)
def test_what_a_closed_hop_forgets_is_what_masking_hides_from_later_hops(name, loaded, monkeypatch):
    model = loaded(name)
    tokenizer = model.processor.tokenizer
    end, ids = tokenizer.convert_tokens_to_ids("!"), letters(tokenizer)
    with mmroute.attach(model, prune=Forgetful()) as routed, ending_with(model, end):
        with dictated(monkeypatch, ids):
            alone = [routed.answer_many([c], max_new_tokens=20, seed=i)[0] for i, c in enumerate(asked())]
        with dictated(monkeypatch, ids) as seen:
            answers = routed.answer_many(asked(), max_new_tokens=20)
    for row, conversation in enumerate(asked()):
        prompt = prepare(model, model.processor, conversation)
        assert answers[row].trace == alone[row].trace
        entered = torch.tensor([ids[row][:-1]])
        batch = {**prompt, "input_ids": torch.cat([prompt["input_ids"], entered], 1)}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if "mm_token_type_ids" in batch:
            batch["mm_token_type_ids"] = (batch["input_ids"] == model.config.image_token_id).long()
        start = prompt["input_ids"].shape[1]
        hop, stays, forgotten = story(SCRIPTS[row][:-1], start)
        visible = closed_later(hop, stays)
        stock = masked_forward(model, routed.family, batch, [None] * 3, [visible] * 3)[0, start - 1 :]
        blind = masked_forward(model, routed.family, batch, [None] * 3)[0, start - 1 :]
        got = torch.stack(seen[row])
        torch.testing.assert_close(got, stock, rtol=0, atol=1e-5)
        assert row == 1 or (got - blind).abs().max() > 1e-3
        closes = answers[row].trace.closes
        assert [close.hop[0] for close in closes] == list(range(1, len(forgotten) + 1))
        assert [[b[0] - a[0] for b, a in zip(c.before, c.after, strict=True)] for c in closes] == [
            [n] * 3 for n in forgotten
        ]
        held = start + len(ids[row]) - 1 - sum(forgotten)
        assert estimate_kv_bytes(answers[row].trace) == held * 3 * kv_bytes_per_slot(answers[row].trace.shape)


def story(script, start):
    """Hop of every position, which of them stay once their hop has ended, and how many each ended hop loses."""
    hops = [0] * start
    for i, letter in enumerate(script):
        hops.append(1 if i == 0 else hops[-1] + (letter == "\n"))
    stays, forgotten = [True] * start, []
    for h in range(1, hops[-1] + 1):
        written = [i for i, hop in enumerate(hops) if hop == h]
        free = written[2:]  # the first two of a hop are protected
        lost = set(free[::2]) if h < hops[-1] else set()
        stays += [i not in lost for i in written]
        forgotten += [len(lost)] if h < hops[-1] else []
    return torch.tensor([hops]), torch.tensor([stays]), forgotten


def test_the_first_positions_of_every_hop_are_protected(loaded, monkeypatch):
    model = loaded("qwen2_5_vl")
    caches = []
    with (
        mmroute.attach(model, prune=Forgetful(), prefix_tokens=2) as routed,
        dictated(monkeypatch, letters(model.processor.tokenizer, ["abcdefg\nijklm"])),
    ):
        new = routed.new_cache
        monkeypatch.setattr(routed, "new_cache", lambda: caches.append(new()) or caches[-1])
        answer = routed.answer_many(asked()[:1], max_new_tokens=13)[0]
    written = caches[0].meta["protected"][0, answer.prompt_tokens :].tolist()
    assert written == [1, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0]


# ---------------------------------------------------------------------- one question


def test_one_question_is_the_conversation_it_stands_for(loaded, tmp_path):
    model = loaded("qwen2_5_vl")
    picture(0).save(tmp_path / "a.png")
    think = hub.load("think", "direct", max_new_tokens=5)
    cue = think.cues[0]
    with mmroute.attach(model) as routed:
        expected = routed.answer_many([user_message(f"where? {cue}", [picture(0)])], think=think)[0]
        for images in (tmp_path / "a.png", str(tmp_path / "a.png"), picture(0), [picture(0)]):
            assert routed.answer("where?", images, think=think).ids == expected.ids
        assert routed.answer(f"where? {cue}", picture(0), think=think).ids == expected.ids
        blocks = [
            {"type": "text", "text": "is"},
            {"type": "image", "image": picture(0)},
            {"type": "text", "text": "like"},
            {"type": "image", "image": picture(1)},
            {"type": "text", "text": f"? {cue}"},
        ]
        marked = routed.answer("is <image> like <image> ?", [picture(0), picture(1)], think=think)
        assert marked.ids == routed.answer_many([[{"role": "user", "content": blocks}]], think=think)[0].ids
        assert marked.prompt_tokens > expected.prompt_tokens


def test_the_longest_completion_is_the_thinkers_unless_given(loaded):
    with mmroute.attach(loaded("llava")) as routed:
        for options, steps in (({}, 3), ({"max_new_tokens": 2}, 2)):
            think = hub.load("think", "text", max_new_tokens=3)
            answer = routed.answer("where?", picture(), think=think, **options)
            assert (answer.ar_steps, answer.finished) == (steps, False)
        assert routed.answer_many([]) == []


@pytest.mark.parametrize(
    ("question", "images", "message"),
    [
        ("", 1, "the question is empty"),
        (" \n", 1, "the question is empty"),
        ("<image>", 1, "the question is empty"),
        ("where?", 0, "no image given"),
        ("where <image>?", 2, r"2 images given, the question marks 1 places"),
        ("where <image> <image>?", 1, r"1 images given, the question marks 2 places"),
    ],
)
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_a_question_that_cannot_be_asked_says_why(name, question, images, message, loaded):
    with mmroute.attach(loaded(name)) as routed, pytest.raises(InputError, match=message):
        routed.answer(question, [picture(i) for i in range(images)])


def test_two_images_where_the_template_has_one_are_refused(loaded, monkeypatch):
    model = loaded("llava")
    single = "<image>\n{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(model.processor, "chat_template", single)
    with mmroute.attach(model) as routed:
        with pytest.raises(InputError, match="2 images where the prompt has 1 place "):
            routed.answer("where?", [picture(), picture(1)])
        with pytest.raises(InputError, match="2 images where the prompt has 1 place "):
            routed.answer_many([user_message("where?", [picture(), picture(1)])])


def test_an_image_that_cannot_be_used_is_refused_before_anything_runs(loaded, tmp_path):
    (tmp_path / "half.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with mmroute.attach(loaded("llava")) as routed:
        for bad, message in (
            (tmp_path / "half.png", "half.png. cannot be read"),
            (picture(0, (1, 1)), "1 x 1 px; allowed"),
            (Image.new("L", (20_000, 150)), "20000 x 150 px; allowed"),
        ):
            with pytest.raises(InputError, match=message):
                routed.answer("where?", bad)
        assert routed.trace is None


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}],
)
def test_settings_out_of_range_are_named_with_what_is_allowed(options, loaded):
    with mmroute.attach(loaded("llava")) as routed, pytest.raises(ConfigError, match="temperature >= 0 and top_p in"):
        routed.answer("where?", picture(), **options)


def test_another_number_of_seeds_than_conversations_is_refused(loaded):
    with mmroute.attach(loaded("llava")) as routed, pytest.raises(InputError, match="seed has 2 entries for 3"):
        routed.answer_many(asked(), seed=[1, 2])


def test_a_model_without_its_processor_says_what_is_missing():
    model = families.make("llava", layers=1)
    with mmroute.attach(model) as routed:
        for ask in (lambda: routed.answer("where?", picture()), lambda: routed.answer_many(asked())):
            with pytest.raises(ConfigError, match=r"answering needs a processor; use mmroute\.load"):
                ask()


def test_a_closed_vocabulary_gets_the_cue_it_can_write_and_a_warning(loaded, monkeypatch, caplog):
    model = loaded("qwen2_5_vl")
    known = {"where", "cot:", "direct:"}

    class Closed:
        unk_token_id = 0

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [int(word in known) for word in text.split()]}

    with mmroute.attach(model) as routed:
        monkeypatch.setattr(reason, "processor_of", lambda routed: type("P", (), {"tokenizer": Closed()})())
        with caplog.at_level(logging.WARNING):
            assert reason._cued(routed, "where", hub.load("think", "text")) == "where cot:"
            assert not caplog.records
            assert reason._cued(routed, "<image> where elephant", hub.load("think", "direct")).endswith("direct:")
    assert "does not know: elephant" in caplog.text
