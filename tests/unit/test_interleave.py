"""Thoughts with pictures and boxes: what enters is what one pass over everything sees, alone, in a batch, routed too.

Legend: B batch, N positions, V vocabulary.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from dictation import dictated
from oracle import closed_later, masked_forward
from PIL import Image

import mmroute
from mmroute import backbones, hub
from mmroute.backbones.images import prepare, user_message
from mmroute.cost import estimate_kv_bytes, kv_bytes_per_slot
from mmroute.errors import ConfigError, UnsupportedCall
from mmroute.session import Session
from mmroute.tokens import Modality

SIZE = 16
"""Codes of a picture of the tiny Chameleon, and cells of one of the tiny LLaVA's."""
CONTEXTS = ["accumulate", "markov2"]


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    models = {}

    def get(name):
        if name not in models:
            models[name] = mmroute.load(tiny_folder(name))
            models[name].generation_config.eos_token_id = -1  # nothing ends by itself
        return models[name]

    return get


def picture(seed, size=(48, 48)):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def asked():
    return [
        user_message("where is the red ball?", [picture(0)]),
        user_message("which?", [picture(1)]),
        user_message("how many?", [picture(2)]),
    ]


def random_dare(routed, **rates):
    """Routers that are not zero."""
    generator = torch.Generator().manual_seed(3)
    pruner = routed.controller.pruner
    with torch.no_grad():
        for name, parameter in pruner.named_parameters():
            if not name.endswith("beta"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    pruner.export()


@contextmanager
def attached(model, method="none", **options):
    pruner = None
    if method == "dare":
        pruner = hub.load("prune", "dare", first_layer=1, cutoff_layer=2, vision_keep=0.5, text_keep=0.7, **options)
    elif method != "none":
        pruner = hub.load("prune", method, **options)
    with mmroute.attach(model, prune=pruner) as routed:
        if method == "dare":
            random_dare(routed)
        yield routed


# ---------------------------------------------------------------------- pictures


def scripts(model):
    """What three rows write: words and pictures, of different lengths and numbers; None stands for a picture."""
    canvas = backbones.of(model).canvas(model, model.processor)
    drawn = torch.Generator().manual_seed(5)
    letters = model.processor.tokenizer.backend_tokenizer
    out = []
    for parts in (("go right", None, "up", None, "so: C"), (None, None, "yes"), ("no picture at all",)):
        ids = []
        for part in parts:
            if part is None:
                codes = [canvas.codes[int(i)] for i in torch.randint(len(canvas.codes), (SIZE,), generator=drawn)]
                ids += [canvas.begin, *codes, canvas.end]
            else:
                ids += letters.encode(part, add_special_tokens=False).ids
        out.append(ids)
    return canvas, out


def in_view(ids, canvas, context):
    """What of the written ids later ones see: all, or the words and the last whole picture in its place."""
    if context == "accumulate":
        return list(ids)
    ends = [i + 1 for i, value in enumerate(ids) if value == canvas.end]
    if not ends:
        return list(ids)
    start = ends[-1] - SIZE - 2
    drawn = {canvas.begin, canvas.end, *canvas.codes}
    return [value for value in ids[:start] if value not in drawn] + list(ids[start:])


def allowed(ids, canvas, family, model):
    """Which ids may come behind the written ones."""
    begun = [i for i, value in enumerate(ids) if value == canvas.begin]
    since = len(ids) - 1 - begun[-1] if begun else SIZE + 1
    mask = torch.zeros(model.config.vocab_size, dtype=torch.bool)
    if since > SIZE:
        mask[:] = True
        mask[[*family.vision_ids(model), canvas.end]] = False
    elif since == SIZE:
        mask[canvas.end] = True
    else:
        mask[list(canvas.codes)] = True
    return mask


@torch.no_grad()
@pytest.mark.parametrize("context", CONTEXTS)
def test_each_choice_is_made_from_what_a_stock_pass_over_the_context_gives(context, loaded, monkeypatch):
    model = loaded("chameleon")
    family = backbones.of(model)
    canvas, texts = scripts(model)
    think = hub.load("think", "image", context=context)
    with attached(model) as routed, dictated(monkeypatch, texts) as seen:
        answer = routed.answer_many(asked()[:1], think=think, max_new_tokens=len(texts[0]))[0]
    prompt = prepare(model, model.processor, asked()[0])
    start = prompt["input_ids"].shape[1]
    for t, got in enumerate(seen[0]):
        view = in_view(texts[0][:t], canvas, context)
        ids = torch.cat([prompt["input_ids"], torch.tensor([view], dtype=torch.long)], 1)
        h = model.model(input_ids=ids, pixel_values=prompt["pixel_values"], use_cache=False).last_hidden_state
        want, may = model.lm_head(h[0, -1]), allowed(texts[0][:t], canvas, family, model)
        torch.testing.assert_close(got[may], want[may], rtol=0, atol=1e-5)
        assert (got[~may] == float("-inf")).all()
    assert answer.ids == texts[0]
    assert answer.prompt_tokens == start
    assert answer.text == "go rightupso: C"
    assert answer.hops == ["go right", "up", "so: C"]
    assert [len(p) for p in answer.pictures] == [SIZE, SIZE]
    assert answer.pictures[1] == texts[0][-5 - SIZE - 1 : -6]


@torch.no_grad()
@pytest.mark.parametrize("method", [pytest.param("none", marks=pytest.mark.slow), "dare"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_drawing_row_gets_alone_what_it_gets_in_a_batch(context, method, loaded, monkeypatch):
    model = loaded("chameleon")
    _, texts = scripts(model)
    limit = min(map(len, texts[:2]))
    texts = [text if len(text) >= limit else [*text, *texts[2][: limit - len(text)]] for text in texts]
    texts[2] = (texts[2] * 4)[:limit]
    think = hub.load("think", "image", context=context)
    with attached(model, method, **({"variant": "lh"} if method == "dare" else {})) as routed:
        with dictated(monkeypatch, texts) as together:
            batch = routed.answer_many(asked(), think=think, max_new_tokens=limit)
        for i, conversation in enumerate(asked()):
            with dictated(monkeypatch, texts) as alone:
                answer = routed.answer_many([conversation], think=think, max_new_tokens=limit, seed=i)[0]
            torch.testing.assert_close(torch.stack(alone[i]), torch.stack(together[i]), rtol=0, atol=1e-5)
            assert answer.trace == batch[i].trace
            assert answer.pictures == batch[i].pictures
    assert [len(a.pictures) for a in batch] == [1, 2, 0]
    if method == "dare":
        written = [call for call in batch[1].trace.calls[1:] if call.new[0][Modality.VISION]]
        assert written, "written codes are vision"
        evicted = [close.before[-1] != close.after[-1] for close in batch[1].trace.closes]
        assert any(evicted)
        again = [call for call in batch[1].trace.calls[1:] if call.kind == "prefill"]
        assert len(again) == (2 if context == "markov2" else 0)
        for call in again:  # entered anew, the picture is ranked as a prompt's is
            assert call.new[0][Modality.VISION] == SIZE
            assert call.layers[1].ran[0][Modality.VISION] < SIZE


@torch.no_grad()
def test_what_is_forgotten_might_never_have_entered(loaded):
    model = loaded("chameleon")
    batch = prepare(model, model.processor, asked())
    words = torch.tensor([[120, 121, 122], [123, 124, 125], [126, 127, 128]])
    more = {"input_ids": torch.tensor([[130, 131], [132, 133], [134, 135]])}
    more["attention_mask"] = torch.ones_like(more["input_ids"])
    with attached(model, "dare") as routed:
        sessions = [Session(routed), Session(routed)]
        for session in sessions:
            session.append(batch)
        wrote = sessions[0]
        prompt = wrote.ids.shape[1]
        for i in range(3):
            wrote.step(words[:, i], [1, 1, 1])
        before = wrote.cache.lengths()
        wrote.forget([True, False, True], prompt, [1, 1, 1])
        assert [
            [b - a for b, a in zip(x, y, strict=True)] for x, y in zip(before, wrote.cache.lengths(), strict=True)
        ] == [[3, 0, 3]] * 3
        got, want = (session.append({**more}, hops=[1, 1, 1]) for session in sessions)
        lengths = [session.cache.lengths() for session in sessions]
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]], rtol=0, atol=1e-6)
    assert (got[1] - want[1]).abs().max() > 1e-3, "a row that forgot nothing saw what it wrote"
    assert [[layer[b] for b in (0, 2)] for layer in lengths[0]] == [[layer[b] for b in (0, 2)] for layer in lengths[1]]
    assert wrote.cache.trace.closes[-1].hop == [1, -1, 1]


@torch.no_grad()
def test_dare_on_written_pictures_is_the_mask_of_what_it_kept(loaded, monkeypatch):
    model = loaded("chameleon")
    _, texts = scripts(model)
    text, think = texts[0], hub.load("think", "image")
    with attached(model, "dare", variant="lh", cache_policy="append") as routed:
        routed.full_trace = True
        with dictated(monkeypatch, [text]) as seen:
            answer = routed.answer_many(asked()[:1], think=think, max_new_tokens=len(text))[0]
    prompt = prepare(model, model.processor, asked()[0])
    start = prompt["input_ids"].shape[1]
    ids = torch.cat([prompt["input_ids"], torch.tensor([text[:-1]])], 1)
    whole = {**prompt, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    keep = [torch.zeros_like(ids, dtype=torch.bool) for _ in range(3)]
    for call in answer.trace.calls:
        for mask, layer in zip(keep, call.layers, strict=True):
            mask[0, layer.kept[0]] = True
    stays = [mask.clone() for mask in keep]
    for close in answer.trace.closes:
        end = start + sum(sum(c.new[0]) for c in answer.trace.calls[1 : close.at_call])
        for mask, held in zip(stays, close.held, strict=True):
            left = torch.zeros(ids.shape[1], dtype=torch.bool)
            left[held[0]] = True
            mask[0, :end] &= left[:end]
    hop = torch.tensor([[0] * start + [call.hop[0] for call in answer.trace.calls[1:]]])
    family = backbones.of(model)
    family.unlock_images(model)
    want = masked_forward(model, family, whole, keep, [closed_later(hop, mask) for mask in stays])[0, start - 1 :]
    family.lock_images(model)
    got = torch.stack(seen[0])
    may = got != float("-inf")
    torch.testing.assert_close(got[may], want[may], rtol=0, atol=1e-5)
    assert any(close.before != close.after for close in answer.trace.closes)
    held = sum(int(mask.sum()) for mask in stays)
    assert estimate_kv_bytes(answer.trace) == held * kv_bytes_per_slot(answer.trace.shape)


def test_a_model_that_chooses_itself_draws_whole_pictures_and_no_codes_among_words(loaded):
    model = loaded("chameleon")
    canvas, _ = scripts(model)
    with torch.no_grad():
        before = model.lm_head.weight[canvas.begin].clone()
        model.lm_head.weight[canvas.begin] *= 12  # so that it begins pictures now and then
    with attached(model) as routed:
        options = {"think": hub.load("think", "image", context="markov2"), "temperature": 1.0, "max_new_tokens": 90}
        answers = routed.answer_many(asked()[:2], **options)
        stock = model(**prepare(model, model.processor, asked()[0])).logits
    with torch.no_grad():
        model.lm_head.weight[canvas.begin] = before
    assert (stock[..., list(canvas.codes)] == torch.finfo(stock.dtype).min).all(), "the model itself stays locked"
    assert sum(len(answer.pictures) for answer in answers) >= 2
    for answer in answers:
        found, ids = [], list(answer.ids)
        while canvas.begin in ids:
            at = ids.index(canvas.begin)
            assert not set(ids[:at]) & {canvas.end, *canvas.codes}
            drawn = ids[at + 1 : at + 1 + SIZE]
            assert set(drawn) <= set(canvas.codes)
            ids = ids[at + 1 + SIZE :]
            if ids:  # else the limit cut it
                assert ids.pop(0) == canvas.end
                found.append(drawn)
        assert answer.pictures == found
        assert "IMGIMG" not in answer.text


def test_who_cannot_draw_says_so(loaded):
    think = hub.load("think", "image")
    with attached(loaded("llava")) as routed, pytest.raises(UnsupportedCall, match="writes text only"):
        routed.answer_many(asked()[:1], think=think)
    with attached(loaded("chameleon")) as routed:
        with pytest.raises(ConfigError, match="leave num_beams and observations out"):
            routed.answer_many(asked()[:1], think=think, num_beams=2)
        known = routed.model.config.vocabulary_map
        bracket = known.pop("<eoss>")
        try:
            with pytest.raises(ConfigError, match="vocabulary_map lacks <eoss>"):
                routed.answer_many(asked()[:1], think=think, max_new_tokens=1)
        finally:
            known["<eoss>"] = bracket


# ---------------------------------------------------------------------- boxes

TOLD = [
    "A <coor> 0.1,0.30,0.6,0.7 </coor> B <coor> 0,0,1,0.25 </coor> no",
    "<coor> 0.9,0.1,0.2,0.7 </coor> <coor>0.5,0.5,0.6,0.6</coor> here",
    "nothing is named",
]
"""The first box of the second row holds nothing."""


def spelled(model):
    letters = model.processor.tokenizer.backend_tokenizer
    return [letters.encode(text, add_special_tokens=False).ids for text in TOLD]


def cells(x1, y1, x2, y2):
    """Cells of a 4 x 4 grid that a box touches, one by one."""
    return [
        4 * row + column
        for row in range(4)
        for column in range(4)
        if row / 4 < y2 and (row + 1) / 4 > y1 and column / 4 < x2 and (column + 1) / 4 > x1
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_features_under_a_box_enter_as_in_one_pass_over_everything(name, loaded, monkeypatch):
    model = loaded(name)
    family, texts = backbones.of(model), spelled(model)
    with attached(model) as routed, dictated(monkeypatch, texts[:1]) as seen:
        answer = routed.answer_many(asked()[:1], think=hub.load("think", "boxes"), max_new_tokens=len(texts[0]))[0]
    prompt = prepare(model, model.processor, asked()[0])
    (grid,) = family.image_features(model, prompt)
    table = model.get_input_embeddings()
    start = table(prompt["input_ids"])
    start[prompt["input_ids"] == model.config.image_token_id] = grid
    rows, places = list(start[0]), []
    boxes = {TOLD[0].index("</coor>") + 6: (0.1, 0.3, 0.6, 0.7), TOLD[0].rindex("</coor>") + 6: (0.0, 0.0, 1.0, 0.25)}
    for i, value in enumerate(texts[0]):
        places.append(len(rows) - 1)  # where what comes next is chosen
        rows.append(table.weight[value])
        if i in boxes:
            rows += list(grid[cells(*boxes[i])])
    h = model.model(inputs_embeds=torch.stack(rows)[None], use_cache=False).last_hidden_state[0]
    want = family.head(model, h[places])
    torch.testing.assert_close(torch.stack(seen[0]), want, rtol=0, atol=1e-5)
    assert answer.boxes == list(boxes.values())
    assert answer.ids == texts[0]
    assert len(answer.hops) == 3
    assert answer.hops[1].startswith(" B ")
    first = prompt["input_ids"][0].tolist().index(model.config.image_token_id)
    assert [r["columns"] for r in answer.trace.replayed] == [[first + c for c in cells(*box)] for box in boxes.values()]
    entered = [call.new[0] for call in answer.trace.calls[1:] if call.kind == "prefill"]
    assert entered == [[0, len(cells(*box)), 0] for box in boxes.values()]


@torch.no_grad()
@pytest.mark.parametrize("method", [pytest.param("none", marks=pytest.mark.slow), "dare"])
def test_a_looking_row_gets_alone_what_it_gets_in_a_batch(method, loaded, monkeypatch):
    model = loaded("llava")
    texts, think = spelled(model), hub.load("think", "boxes")
    limit = 62
    texts = [(text * 6)[:limit] for text in texts]
    with attached(model, method, **({"variant": "lh"} if method == "dare" else {})) as routed:
        with dictated(monkeypatch, texts) as together:
            batch = routed.answer_many(asked(), think=think, max_new_tokens=limit)
        for i, conversation in enumerate(asked()):
            with dictated(monkeypatch, texts) as alone:
                answer = routed.answer_many([conversation], think=think, max_new_tokens=limit, seed=i)[0]
            torch.testing.assert_close(torch.stack(alone[i]), torch.stack(together[i]), rtol=0, atol=1e-5)
            assert answer.trace == batch[i].trace
            assert answer.boxes == batch[i].boxes
    assert [len(answer.boxes) for answer in batch] == [2, 1, 0]
    if method == "dare":
        inserted = [call for call in batch[0].trace.calls[1:] if call.kind == "prefill"]
        assert sum(call.layers[1].ran[0][Modality.VISION] for call in inserted) < sum(
            call.new[0][Modality.VISION] for call in inserted
        )


@torch.no_grad()
@pytest.mark.parametrize(("name", "way"), [("chameleon", "image"), ("llava", "boxes")])
def test_dare_that_keeps_everything_changes_no_choice(name, way, loaded, monkeypatch):
    model = loaded(name)
    texts = scripts(model)[1] if way == "image" else spelled(model)
    think, found = hub.load("think", way), []
    for prune in (None, hub.load("prune", "dare", first_layer=1, vision_keep=1.0, text_keep=1.0)):
        with mmroute.attach(model, prune=prune) as routed:
            if prune is not None:
                random_dare(routed)
            with dictated(monkeypatch, texts[:1]) as seen:
                routed.answer_many(asked()[:1], think=think, max_new_tokens=len(texts[0]))
        found.append(torch.stack(seen[0]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_features_are_refused_where_positions_have_a_row_and_a_column(loaded):
    with attached(loaded("qwen2_5_vl")) as routed, pytest.raises(UnsupportedCall, match="use llava"):
        routed.answer_many(asked()[:1], think=hub.load("think", "boxes"), max_new_tokens=1)
