"""Hops, second turns, latents and hop closes on one routed cache equal one uncached forward of everything."""

import copy
import threading
from typing import Any

import families
import pytest
import routing
import torch
from cases import LAYERS, Case, grid
from oracle import masked_forward
from routing import Forced, distance, play, scattered
from torch import Tensor

from mmroute import hub
from mmroute.cache import Chunk
from mmroute.prune.base import Keep, Pruner, Site
from mmroute.tokens import Modality, Tokens

SDPA = {"attn": ("sdpa",)}
QUIET = {"suppress_tokens": [families.IMAGE, families.IMAGE + 1], "do_sample": False}
LOGITS = {**QUIET, "return_dict_in_generate": True, "output_logits": True}


@grid(rows=("one", "padded"))
@pytest.mark.parametrize("policy", ["append", "progressive"])
def test_closed_hops_equal_a_mask_that_later_hops_feel(case: Case, policy: str) -> None:
    story = case.story(observations=3, tail=3)
    masks = scattered(story, LAYERS, 0.7)
    generator = torch.Generator().manual_seed(3)
    # hop h closes with its own stay set; progressive policies also trim what older hops left
    closes = [[torch.rand(story.real.shape, generator=generator) < 0.6 for _ in range(LAYERS)] for _ in range(3)]
    with case.attached(Forced(masks), prefix_tokens=0) as routed:
        cache = routed.new_cache()
        told = []
        for i, hop in enumerate(story.hops):
            if hop != cache.hop:
                cache.close_hop(_Close(closes[cache.hop], policy))
                cache.start_hop(hop)
            told.append(routed.model(**story.chunk(i), past_key_values=cache).logits)
    protected = cache.meta["protected"].bool()
    columns = torch.arange(story.real.shape[1])
    visible = [torch.ones(*story.real.shape, len(columns), dtype=torch.bool) for _ in range(LAYERS)]
    for hop in range(3):
        end = max(e for (_, e), h in zip(story.spans, story.hops, strict=True) if h == hop)
        own = story.hop == hop if policy == "append" else columns < end
        for see, stays in zip(visible, closes[hop], strict=True):
            see &= (columns < end)[:, None] | (stays | protected | ~own)[:, None, :]
    want = masked_forward(case.model, case.family, story.whole, masks, visible)
    assert distance(torch.cat(told, 1), want, story.real) < 1e-5
    assert [c.hop for c in cache.trace.closes] == [[h] * len(case.pads) for h in range(3)]
    assert cache.trace.closes[-1].after < cache.trace.closes[-1].before


class _Close(Forced):
    """Closes with given masks, the closing hop only or everything."""

    def __init__(self, stays: list[Tensor], policy: str) -> None:
        super().__init__(stays, stays=stays)
        self.policy = policy

    def close(self, slots: Any, closing: Tensor, layer: int) -> Tensor:
        stays = super().close(slots, closing, layer)
        return stays if self.policy == "progressive" else stays | (slots.hop != closing[:, None])


class _Capped(Forced):
    """Everything runs; behind each call layers that hold more than 12 of a row are cut to random ones of it."""

    cap = 12

    def trim(self, slots: Any, layer: int) -> Tensor:
        score = torch.rand(slots.position.shape, generator=torch.Generator().manual_seed(layer))
        rank = score.masked_fill(~slots.valid, 2.0).argsort(1).argsort(1)
        return rank < self.cap


@grid(rows=("one", "padded"), **SDPA)
def test_a_capped_cache_equals_a_mask_that_later_calls_feel(case: Case) -> None:
    story = case.story(observations=2, tail=3)
    masks = [story.real] * LAYERS
    with case.attached(_Capped(masks)) as routed:
        routed.full_trace = True
        played = play(routed.model, story, routed.new_cache())
    columns = torch.arange(story.real.shape[1])
    visible = [torch.ones(*story.real.shape, len(columns), dtype=torch.bool) for _ in range(LAYERS)]
    for close in played.cache.trace.closes:
        end = story.spans[close.at_call - 1][1]
        for see, held in zip(visible, close.held, strict=True):
            stays = torch.zeros_like(story.real)
            for row, slots in enumerate(held):
                stays[row, slots] = True
            see &= (columns < end)[:, None] | (stays | (columns >= end))[:, None, :]
    assert max(map(max, played.cache.lengths())) <= 12
    assert not visible[0].all()
    want = masked_forward(case.model, case.family, story.whole, masks, visible)
    assert distance(played.all, want, story.real) < 1e-5


@grid(rows=("padded",), **SDPA)
def test_only_rows_that_close_lose_slots_and_protected_ones_stay(case: Case) -> None:
    story = case.story(observations=1, tail=3)
    masks = [story.real] * LAYERS
    nothing = Forced(masks, stays=[torch.zeros_like(story.real)] * LAYERS)
    with case.attached(nothing, prefix_tokens=2) as routed:
        cache = play(routed.model, story, routed.new_cache()).cache
        before = cache.lengths()
        cache.close_hop(nothing, [1, -1, -1])
        protected = cache.meta["protected"].bool() & story.real
        for layer, n in zip(cache.layers, before, strict=True):
            assert layer.lengths == [int(protected[0].sum()), *n[1:]]
            assert torch.equal(layer.pos[0, : layer.n[0]].long(), protected[0].nonzero().flatten())


@grid(rows=("padded",), attn=("sdpa", "eager"))
def test_hop_ids_in_one_call_equal_hop_by_hop(case: Case) -> None:
    story = case.story(observations=2, tail=2)
    prune = hub.load("prune", "random", vision_keep=0.4, text_keep=0.6)
    generated = torch.cat([torch.full((e - s,), e - s == 1) for s, e in story.spans]).expand_as(story.real)
    with case.attached(prune) as routed:
        told = play(routed.model, story, routed.new_cache()).all
        once = routed.model(**story.whole, hop_ids=story.hop, generated=generated, use_cache=False).logits
    assert distance(once, told, story.real) < 1e-5


class Threshold(Pruner):
    """Prompts by hash; a generated position skips a layer by the sign of one of its numbers."""

    syncs = True

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        return 0.5

    def scores(self, x: Tensor, tokens: Tokens, site: Site) -> Tensor:
        return -tokens.position.float()

    def decode(self, x: Tensor, tokens: Tokens, site: Site) -> Keep:
        mask = x[..., site.layer] > 0
        return Keep(mask, [[int(k), 0, 0] for k in mask[:, 0]])


@grid()
def test_threshold_decode_equals_masking(case: Case) -> None:
    batch = case.prompt
    N = batch["input_ids"].shape[1]
    with case.attached(Threshold()) as routed:
        routed.full_trace = True
        out = routed.generate(**batch, max_new_tokens=10, **LOGITS)
        calls = routed.trace.calls
    masks = [torch.zeros_like(out.sequences).bool() for _ in range(LAYERS)]
    for call in calls:
        for mask, layer in zip(masks, call.layers, strict=True):
            for row, columns in enumerate(layer.kept):
                mask[row, columns] = True
    counted = [sum(layer.ran[b][0] for call in calls[1:] for layer in call.layers) for b in range(len(case.pads))]
    assert 0 < sum(counted) < 9 * LAYERS * len(case.pads)
    assert counted == [sum(int(m[b, N:].sum()) for m in masks) for b in range(len(case.pads))]
    assert out.past_key_values.lengths() == [m.sum(1).tolist() for m in masks]
    full = torch.cat([batch["attention_mask"], torch.ones_like(out.sequences[:, N:])], 1)
    whole = {**batch, "input_ids": out.sequences, "attention_mask": full}
    want = masked_forward(case.model, case.family, whole, masks)
    assert max(distance(a, want[:, N - 1 + i]) for i, a in enumerate(out.logits)) < 1e-5


@grid(rows=("one", "three"), **SDPA)
def test_second_turn_with_a_new_image_through_generate(case: Case) -> None:
    first, second = case.prompt, families.make_hop(case.name, case.model, len(case.pads))
    prune = hub.load("prune", "random", vision_keep=0.4, text_keep=0.7)
    with case.attached(prune) as routed:
        one = routed.generate(**first, max_new_tokens=4, **LOGITS)
        cache = one.past_key_values
        answer = one.sequences[:, first["input_ids"].shape[1] :]
        said = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
        whole = families.join(case.name, first, said, second)
        ids, mask = whole["input_ids"], whole["attention_mask"]
        positions = case.family.positions(case.model, ids, mask, whole.get("image_grid_thw"))
        manual, start = cache.fork(), cache.seen
        cache.start_hop(1)
        manual.start_hop(1)
        images = {k: second[k] for k in ("pixel_values", "image_grid_thw", "image_sizes") if k in second}
        types = {"mm_token_type_ids": whole["mm_token_type_ids"]} if case.name.startswith("qwen") else {}
        two = routed.generate(
            input_ids=ids,
            attention_mask=mask,
            position_ids=case.family.generate_positions(positions, mask),
            past_key_values=cache,
            max_new_tokens=4,
            **images,
            **types,
            **LOGITS,
        )
        top = positions.amax(0) if positions.ndim == 3 else positions
        step = (top.amax(1) + 1)[:, None]
        types = {k: v[:, start:] for k, v in types.items()}
        call: dict[str, Any] = {"input_ids": ids[:, start:], "position_ids": positions[..., start:], **images, **types}
        for i, logits in enumerate(two.logits):
            out = routed.model(**call, attention_mask=mask, past_key_values=manual)
            assert distance(out.logits[:, -1], logits) < 1e-5
            token = two.sequences[:, ids.shape[1] + i, None]
            mask = torch.cat([mask, torch.ones_like(token)], 1)
            call = {
                "input_ids": token,
                "position_ids": (step + i).expand(3, -1, -1) if positions.ndim == 3 else step + i,
            }
    assert two.past_key_values.lengths() == manual.lengths()


@grid(rows=("one", "padded"), **SDPA)
@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_latents_on_a_cache_equal_one_forward(case: Case, keep: float) -> None:
    """Three latent chunks, each two replayed image embeddings and the last hidden state; then an answer token."""
    batch, B = case.prompt, len(case.pads)
    positions = case.family.positions(
        case.model, batch["input_ids"], batch["attention_mask"], batch.get("image_grid_thw")
    )
    embedded, deep = _embedded(case, batch)
    generator = torch.Generator().manual_seed(11)
    prune = hub.load("prune", "random", vision_keep=keep, text_keep=keep)
    with case.attached(prune, strip_padding=True) as routed:
        routed.full_trace = True
        base, cache = routed.model.model, routed.new_cache()
        h = base(**batch, position_ids=positions, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
        embed = routed.model.get_input_embeddings()
        mask, top = batch["attention_mask"], positions.amax(0) if positions.ndim == 3 else positions
        nxt, chunks, places = top.amax(1, keepdim=True) + 1, [], []
        for hop in range(1, 4):
            cache.start_hop(hop)
            replay = embed(torch.full((B, 2), 200 + hop))
            chunk = torch.cat([replay, h], 1)
            if deep is not None:  # what Qwen3-VL's tower adds later goes along with the copies, not with the latent
                carried = torch.randn(len(deep), B, 3, deep.shape[-1], generator=generator)
                carried[:, :, -1] = 0
                deep = torch.cat([deep, carried], 2)
            cache.next = Chunk(
                modality=torch.tensor([[1, 1, 2]]).expand(B, -1), deep=None if deep is None else deep[:, :, -3:]
            )
            mask = torch.cat([mask, mask.new_ones(B, 3)], 1)
            place = nxt + torch.arange(3)
            place = place.expand(3, -1, -1) if positions.ndim == 3 else place
            nxt = nxt + 3
            chunks.append(chunk)
            places.append(place)
            out = base(inputs_embeds=chunk, attention_mask=mask, position_ids=place, past_key_values=cache)
            h = out.last_hidden_state[:, -1:]
        told = routed.model.lm_head(h)
        kept = [torch.zeros_like(mask).bool() for _ in range(LAYERS)]
        for call in routed.trace.calls:
            for layer, keeps in zip(call.layers, kept, strict=True):
                for row, columns in enumerate(layer.kept):
                    keeps[row, columns] = True
        bos = torch.full((B, 1), 7)
        answer = routed.generate(
            input_ids=bos,
            attention_mask=torch.cat([mask, mask.new_ones(B, 1)], 1),
            position_ids=torch.cat([nxt[None], nxt.expand(3, -1, -1)]) if positions.ndim == 3 else nxt,
            past_key_values=cache,
            max_new_tokens=2,
            **LOGITS,
        )
    whole = {
        "inputs_embeds": torch.cat([embedded, *chunks, embed(bos)], 1),
        "attention_mask": torch.cat([mask, mask.new_ones(B, 1)], 1),
        "position_ids": torch.cat([positions, *places, nxt.expand(3, -1, -1) if positions.ndim == 3 else nxt], -1),
    }
    kept = [torch.cat([keeps, torch.ones(B, 1, dtype=torch.bool)], 1) for keeps in kept]
    if deep is not None:
        given = case.family.carry(torch.nn.functional.pad(deep, (0, 0, 0, 1)))
        text = case.family.text_model(case.model)
        handle = text.register_forward_pre_hook(lambda module, args, kw: (args, {**kw, **given}), with_kwargs=True)
    want = masked_forward(case.model, case.family, whole, kept)
    if deep is not None:
        handle.remove()
    words = want[:, -2] > torch.finfo(want.dtype).min  # Chameleon writes no image tokens
    assert distance(told[:, 0], want[:, -2], words) < 1e-5
    assert distance(answer.logits[0], want[:, -1]) < 1e-5


def _embedded(case: Case, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Prompt embeddings with the image features in place, and what the tower adds to them later."""
    seen: list[Any] = []
    text = case.family.text_model(case.model)
    handles = [
        text.register_forward_pre_hook(lambda module, args, kw: seen.append(case.family.deep(kw)), with_kwargs=True),
        text.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0])),
    ]
    case.model(**batch)
    for handle in handles:
        handle.remove()
    return seen[1], seen[0]


@grid(rows=("padded",), **SDPA)
def test_interleaved_sessions_equal_one_after_the_other(case: Case) -> None:
    a = case.story(observations=1, tail=3)
    b = routing.tell(case.name, case.model, case.family, case.pads, observations=1, tail=3, seed=9)
    prune = hub.load("prune", "fastv", vision_keep=0.4, start_layer=1)
    with case.attached(prune) as routed:
        alone = [play(routed.model, s, routed.new_cache()).all for s in (a, b)]
        caches = [routed.new_cache(), routed.new_cache()]
        mixed: list[list[Tensor]] = [[], []]
        for i in range(len(a.spans)):
            for out, story, cache in zip(mixed, (a, b), caches, strict=True):
                out += play(routed.model, story, cache, chunks=range(i, i + 1)).logits
    assert all(torch.equal(torch.cat(m, 1), s) for m, s in zip(mixed, alone, strict=True))


@grid(rows=("padded",), **SDPA)
def test_two_threads_on_one_model_do_not_meet(case: Case) -> None:
    stories = [
        routing.tell(case.name, case.model, case.family, case.pads, observations=1, tail=2, seed=s) for s in (1, 9)
    ]
    prune = hub.load("prune", "fastv", vision_keep=0.4, start_layer=1)
    out: dict[int, Tensor] = {}
    with case.attached(prune) as routed:
        alone = [play(routed.model, s, routed.new_cache()).all for s in stories]

        def run(i: int) -> None:
            with torch.no_grad():
                out[i] = play(routed.model, stories[i], routed.new_cache()).all

        threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(out[i], alone[i]) for i in range(2))


@grid(rows=("padded",), **SDPA)
def test_copy_of_an_attached_model_lives_its_own_life(case: Case) -> None:
    batch, prune = case.prompt, hub.load("prune", "fastv", vision_keep=0.4, start_layer=1)
    stock = case.model(**batch).logits
    with case.attached(prune) as routed:
        want = routed.model(**batch).logits
        twin = copy.deepcopy(routed.model)
        assert torch.equal(twin(**batch).logits, want)
        handle = twin.__dict__["_mmroute"]
        assert handle.model is twin
        assert handle.parts is twin.mmroute is not routed.parts
        handle.detach()
        assert torch.equal(twin(**batch).logits, stock)
        assert torch.equal(routed.model(**batch).logits, want)
        zeroed = copy.deepcopy(routed.model)
        for parameter in zeroed.parameters():
            parameter.zero_()
        assert not torch.equal(zeroed(**batch).logits, want)
        assert torch.equal(routed.model(**batch).logits, want)
