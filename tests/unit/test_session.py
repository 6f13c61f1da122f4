"""Sessions on a cache: what is entered piece by piece is one forward of everything, and sessions do not mix.

Legend: B batch, N positions.
"""

import families
import pytest
import torch
from conversations import METHODS, asked, picture, routed_as
from oracle import masked_forward

from mmroute.backbones.images import prepare, user_message
from mmroute.session import Session
from mmroute.trace import Trace


def observation(model, images):
    """A turn in the middle of a conversation, rows with different numbers of images."""
    turns = [user_message(f"now {len(row)}", row) for row in images]
    return prepare(model, model.processor, turns)


@torch.no_grad()
@pytest.mark.parametrize("method", ["none", "random"])
@pytest.mark.parametrize("name", families.NAMES)
def test_an_observation_on_the_cache_equals_one_forward_of_everything(name, method, loaded):
    model = loaded(name)
    first = prepare(model, model.processor, asked()[:2])
    pictures = [[picture(7, (30, 50)), picture(8)], [picture(9)]]
    second = observation(model, pictures)
    with routed_as(model, method) as routed:
        routed.full_trace = True
        session = Session(routed)
        got = [session.append(first)]
        words = torch.tensor([[70, 71], [72, 73], [74, 75]])
        got += [session.step(ids, [1, 1]) for ids in words[:2]]
        got.append(session.append(second, hops=[1, 1]))
        got.append(session.step(words[2], [1, 1]))
        calls = session.cache.trace.calls
        traces = [session.trace_of(row) for row in range(2)]
    widths = torch.tensor([first["input_ids"].shape[1], 1, 1, second["input_ids"].shape[1], 1])
    ends = (widths.cumsum(0) - 1).tolist()
    whole = {"input_ids": torch.cat([first["input_ids"], words[:2].T, second["input_ids"], words[2:].T], 1)}
    real = torch.ones(2, 1, dtype=torch.long)
    whole["attention_mask"] = torch.cat([first["attention_mask"], real, real, second["attention_mask"], real], 1)
    for key in ("pixel_values", "image_grid_thw", "image_sizes"):
        if key in first:
            whole[key] = interleaved(first, second, key, [1, 2], [2, 1])
    if "mm_token_type_ids" in first:
        whole["mm_token_type_ids"] = (whole["input_ids"] == model.config.image_token_id).long()
    keep = []
    for layer in range(3):
        mask = torch.zeros(whole["input_ids"].shape, dtype=torch.bool)
        for call in calls:
            for row, kept in enumerate(call.layers[layer].kept):
                mask[row, kept] = True
        keep.append(mask)
    logits = masked_forward(model, routed.family, whole, keep)
    for step, end in zip(got, ends, strict=True):
        torch.testing.assert_close(step, logits[:, end], rtol=0, atol=1e-5)
    assert [call.kind for call in calls] == ["prefill", "decode", "decode", "prefill", "decode"]
    assert [call.hop for call in calls] == [[0, 0], [1, 1], [1, 1], [1, 1], [1, 1]]
    for row, trace in enumerate(traces):  # columns of one conversation count its own positions
        own = int(whole["attention_mask"][row].sum())
        assert trace.calls[-1].start == own - 1
        assert trace.calls[-1].layers[0].kept == [[own - 1]]
        assert Trace.from_json(trace.to_json()) == trace


def interleaved(first, second, key, images, more):
    """Image tensors of two segments in the order of the rows: row 0's of both, then row 1's of both."""
    if key == "pixel_values" and "image_grid_thw" in first:
        parts = [list(b[key].split(b["image_grid_thw"].prod(-1).tolist())) for b in (first, second)]
    else:
        parts = [list(b[key].split(1)) for b in (first, second)]
    out = []
    for a, b in zip(images, more, strict=True):
        out += [parts[0].pop(0) for _ in range(a)] + [parts[1].pop(0) for _ in range(b)]
    return torch.cat(out)


@torch.no_grad()
def test_two_sessions_on_one_model_do_not_mix(loaded):
    model = loaded("qwen2_5_vl")
    prompts = [prepare(model, model.processor, c) for c in asked()]

    def go_on(session, i):
        return session.step(torch.tensor([80 + i]), [1])

    with routed_as(model, "random") as routed:
        apart = []
        for i in (0, 1):
            session = Session(routed)
            apart.append([session.append(prompts[i]), go_on(session, i), go_on(session, i)])
        both = [Session(routed), Session(routed)]
        turns = [[both[i].append(prompts[i]) for i in (0, 1)]]
        turns += [[go_on(both[i], i) for i in (1, 0)][::-1], [go_on(both[i], i) for i in (0, 1)]]
    for i in (0, 1):
        assert all(torch.equal(turn[i], expected) for turn, expected in zip(turns, apart[i], strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_words_written_at_once_are_words_written_one_by_one(method, loaded):
    """Rows bring two words and one; no hop is closed between them."""
    words = torch.tensor([[11, 12], [0, 13]])
    with routed_as(loaded("qwen2_5_vl"), method) as routed, torch.no_grad():
        batch = prepare(routed.model, routed.processor, asked()[:2])
        session = Session(routed)
        session.append(batch)
        got = session.write(words, torch.tensor([[1, 1], [0, 1]]), [1, 1])
        for row, spoken in enumerate(([11, 12], [13])):
            alone = Session(routed)
            alone.append(prepare(routed.model, routed.processor, [asked()[row]]))
            for place, word in enumerate(spoken, start=2 - len(spoken)):
                want = alone.step(torch.tensor([word]), [1])
                torch.testing.assert_close(got[row, place], want[0], rtol=0, atol=1e-4)
            assert [n[row] for n in session.cache.lengths()] == [n[0] for n in alone.cache.lengths()]
