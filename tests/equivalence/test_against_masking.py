"""Leaving positions out of a layer gives the numbers that masking them gives, whatever the batch looks like."""

import copy
import itertools

import families
import pytest
import routing
import torch
from cases import LAYERS, Case, grid
from oracle import masked_forward
from routing import Forced, distance, nested, play, scattered

import mmroute
from mmroute import hub
from mmroute.tokens import Modality

MASKS = {"skip": scattered, "drop": nested}
NOT_WRITTEN = [families.IMAGE, families.IMAGE + 1]
"""Placeholders of images and videos, which a random model may write and no checkpoint does."""
GREEDY = {
    "max_new_tokens": 5,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
    "suppress_tokens": NOT_WRITTEN,
}


@grid()
@pytest.mark.parametrize("action", ["skip", "drop"])
def test_story_in_chunks_equals_one_masked_forward(case: Case, action: str) -> None:
    story = case.story(observations=2, tail=3)
    masks = MASKS[action](story, LAYERS)
    want = masked_forward(case.model, case.family, story.whole, masks)
    with case.attached(Forced(masks, action), prefix_tokens=0) as routed:
        told = play(routed.model, story, routed.new_cache())
    assert distance(told.all, want, story.real) < 1e-5
    assert told.cache.lengths() == [mask.sum(1).tolist() for mask in masks]


@grid()
def test_story_in_one_call_equals_one_masked_forward(case: Case) -> None:
    story = case.story()
    masks = scattered(story, LAYERS)
    masks[2] = torch.zeros_like(masks[2])  # a layer that nobody runs
    want = masked_forward(case.model, case.family, story.whole, masks)
    with case.attached(Forced(masks)) as routed:
        without = routed.model(**story.whole, use_cache=False).logits
        cached = routed.model(**story.whole)
    assert distance(without, want, story.real) < 1e-5
    assert torch.equal(cached.logits, without)
    assert cached.past_key_values.lengths()[2] == [0] * len(case.pads)


@grid()
@pytest.mark.parametrize("action", ["skip", "drop"])
def test_generated_tokens_equal_those_of_masked_forwards(case: Case, action: str) -> None:
    """Prompt routed by hashed scores, generated positions run everywhere; checked token by token."""
    prune = hub.load("prune", "random", vision_keep=0.4, text_keep=0.7, start_layer=1, once=action == "drop")
    batch = case.prompt
    N = batch["input_ids"].shape[1]
    with case.attached(prune) as routed:
        routed.full_trace = True
        out = routed.generate(**batch, **GREEDY)
        kept = _kept(routed.trace, out.sequences.shape, 0)
    full = torch.cat([batch["attention_mask"], torch.ones_like(out.sequences[:, N:])], 1)
    whole = {**batch, "input_ids": out.sequences, "attention_mask": full}
    want = masked_forward(case.model, case.family, whole, [mask | (torch.arange(len(mask[0])) >= N) for mask in kept])
    assert max(distance(a, want[:, N - 1 + i]) for i, a in enumerate(out.logits)) < 1e-5
    want[..., NOT_WRITTEN] = float("-inf")
    assert torch.equal(out.sequences[:, N:], want[:, N - 1 : -1].argmax(-1))
    if action == "drop":
        assert all(not (b & ~a).any() for a, b in itertools.pairwise(kept))


def _kept(trace: routing.Any, shape: tuple[int, int], call: int) -> list[torch.Tensor]:
    masks = []
    for layer in trace.calls[call].layers:
        mask = torch.zeros(shape, dtype=torch.bool)
        for row, columns in enumerate(layer.kept):
            mask[row, columns] = True
        masks.append(mask)
    return masks


@grid(rows=("padded",))
@pytest.mark.parametrize("name", ["random", "fastv"])
def test_row_in_a_padded_batch_is_the_row_alone(case: Case, name: str) -> None:
    prune = hub.load("prune", name, vision_keep=0.4)
    batch = case.prompt
    with case.attached(prune) as routed:
        together = routed.model(**batch)
        for row, pad in enumerate(case.pads):
            alone = routed.model(**families.slice_batch(batch, row))
            assert distance(together.logits[row, pad:], alone.logits[0]) < 1e-5
            lengths = [layer[row] for layer in together.past_key_values.lengths()]
            assert lengths == [layer[0] for layer in alone.past_key_values.lengths()]


@grid(attn=("sdpa",), rows=("padded",))
def test_rows_of_very_different_length_skip_and_decode_alone(case: Case) -> None:
    batch = families.make_inputs(case.name, case.model, 4, [0, 50, 3, 27], after=60)
    prune = hub.load("prune", "random", vision_keep=0.3, text_keep=0.5)
    with case.attached(prune) as routed:
        together = routed.generate(**batch, **GREEDY)
        for row in range(4):
            alone = routed.generate(**families.slice_batch(batch, row), **GREEDY)
            assert torch.equal(together.sequences[row, -5:], alone.sequences[0, -5:])
            assert max(distance(a[row], b[0]) for a, b in zip(together.logits, alone.logits, strict=True)) < 1e-5


@grid(attn=("sdpa",))
def test_ties_go_to_the_lowest_column_in_every_batch_and_cached(case: Case) -> None:
    story = case.story(observations=1, tail=0)
    with case.attached(routing.Constant(), prefix_tokens=0) as routed:
        routed.full_trace = True
        play(routed.model, story, routed.new_cache())
        chunked = [_kept(routed.trace, story.real.shape, call)[0] for call in range(2)]
        routed.model(**story.whole, hop_ids=story.hop, use_cache=False)
        (whole,) = {tuple(map(tuple, layer.kept)) for layer in routed.trace.calls[0].layers}
    kept = chunked[0] | chunked[1]
    assert [columns == mask.nonzero().flatten().tolist() for columns, mask in zip(whole, kept, strict=True)]
    vision = story.whole["input_ids"] == families.IMAGE
    for row in range(len(case.pads)):
        for h, mask in enumerate(chunked):
            columns = (vision[row] & (story.hop[row] == h)).nonzero().flatten()
            assert torch.equal(mask[row, columns].nonzero().flatten(), torch.arange(-(-len(columns) // 2)))


@grid(attn=("sdpa",), rows=("padded",))
def test_later_positions_never_change_earlier_segments(case: Case) -> None:
    story = case.story(observations=1, tail=1)
    with case.attached(routing.Longest()) as routed:
        cache = routed.new_cache()
        before = play(routed.model, story, cache, chunks=range(1)).all
        stored = [(layer.keys.clone(), list(layer.n)) for layer in cache.layers]
        play(routed.model, story, cache, chunks=range(1, 3))
        for layer, (keys, n) in zip(cache.layers, stored, strict=True):
            for row, length in enumerate(n):
                assert torch.equal(layer.keys[row, :, :length], keys[row, :, :length])
        changed = {**story.whole, "input_ids": story.whole["input_ids"].clone()}
        changed["input_ids"][:, -3:] = 111
        once, twice = (routed.model(**w, hop_ids=story.hop, use_cache=False).logits for w in (story.whole, changed))
    end = story.spans[0][1]
    assert torch.equal(once[:, :end][story.real[:, :end]], twice[:, :end][story.real[:, :end]])
    assert before.shape[1] == end


@grid(attn=("sdpa",))
def test_protected_positions_stay_inside_the_count(case: Case) -> None:
    batch = case.prompt
    prune = hub.load("prune", "random", vision_keep=0.4, text_keep=0.6)
    with case.attached(prune, prefix_tokens=3) as routed:
        routed.full_trace = True
        out = routed.model(**batch)
        call = routed.trace.calls[0]
    valid = batch["attention_mask"].bool()
    vision = (batch["input_ids"] == families.IMAGE) & valid
    for layer in call.layers:
        for row, columns in enumerate(layer.kept):
            first = case.pads[row]
            assert {first, first + 1, first + 2, valid.shape[1] - 1} <= set(columns)
            n, v = int(valid[row].sum()), int(vision[row].sum())
            want = [-(-6 * (n - v) // 10), -(-4 * v // 10)]  # ceil; protection alone never exceeds it here
            assert [layer.ran[row][m] for m in (Modality.TEXT, Modality.VISION)] == want
            assert len(columns) == sum(want)
    cache = out.past_key_values
    _, K, _, E = cache.layers[0].keys.shape
    assert cache.live_bytes() == sum(sum(layer.stored) for layer in call.layers) * 2 * K * E * 4
    assert cache.live_bytes() <= cache.allocated_bytes()


@grid(attn=("sdpa",), rows=("padded",))
def test_bfloat16_is_finite_and_keeps_as_many(case: Case) -> None:
    batch = case.prompt
    half = copy.deepcopy(case.model).to(torch.bfloat16)
    prune = hub.load("prune", "fastv", vision_keep=0.4, start_layer=1)
    with case.attached(prune) as routed:
        want = routed.model(**batch).past_key_values.lengths()
    with mmroute.attach(half, prune=hub.load("prune", "fastv", vision_keep=0.4, start_layer=1)) as routed:
        batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
        out = routed.generate(**batch, **GREEDY)
    assert all(torch.isfinite(logits).all() for logits in out.logits)
    assert [[n - 4 for n in layer] for layer in out.past_key_values.lengths()] == want
    assert out.past_key_values.layers[0].keys.dtype == torch.bfloat16
