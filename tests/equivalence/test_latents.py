"""Latent steps on a cache against the longest way there is: stock layers, everything before each step entered anew.

Legend: B batch, N columns, D hidden, A axes of a place.
"""

from dataclasses import dataclass
from typing import Any

import families
import pytest
import torch
from cases import Case
from cases import grid as grid_of_all
from routing import distance
from torch import Tensor
from transformers import DynamicCache

import mmroute
from mmroute import hub
from mmroute.cache import Chunk
from mmroute.errors import UnsupportedCall
from mmroute.rollout import Rollout, start
from mmroute.tokens import Modality

STEPS = 3
WITH_PLACES = [name for name in families.NAMES if name != "llava_next"]
"""Families whose image tokens all have a place; the other is refused (below)."""


def grid(names=WITH_PLACES, **options):
    return grid_of_all(names, **options)


def grids_of(case: Case, batch: dict[str, Tensor]) -> list[list[tuple[int, int]]]:
    """[row][image]."""
    flat, rows = case.family.image_grid(case.model, batch), len(batch["input_ids"])
    per = len(flat) // rows
    return [flat[b * per : (b + 1) * per] for b in range(rows)]


def roll(case: Case, routed: Any, think: Any, batch: dict[str, Tensor], counts: list[int] | None = None) -> Rollout:
    """Prompt and latent steps as answering takes them."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = case.family.positions(case.model, ids, mask, batch.get("image_grid_thw"))
    cache = routed.new_cache()
    cache.next = Chunk(watch=think.needs_row)
    h = routed.controller.base(**batch, position_ids=positions, past_key_values=cache, use_cache=True)
    mind = start(
        cache,
        think,
        hidden=h.last_hidden_state[:, -1],
        modality=cache.meta["modality"].long(),
        valid=mask.bool(),
        positions=positions if positions.ndim == 3 else positions[None],
        grids=grids_of(case, batch) if "pixel_values" in batch else [[]] * len(ids),
        seeds=torch.arange(len(ids)),
    )
    rollout = Rollout(routed, think, cache, mind, mask)
    rollout.run(counts)
    return rollout


@dataclass
class Naive:
    """One conversation without padding, step by step."""

    hidden: list[Tensor]
    rows: list[Tensor]
    """Attention on the image tokens, where the model gives maps."""
    chosen: list[list[int]]


def naive(case: Case, batch: dict[str, Tensor], K: int, steps: int, scale: float, weighted: bool) -> Naive:
    """Every step enters the whole sequence through the stock model; sets and weights by plain loops."""
    model, family = case.model, case.family
    text, seen = family.text_model(model), {}
    handles = [
        text.layers[0].register_forward_pre_hook(
            lambda m, args, kw: seen.update(x=args[0] if args else kw["hidden_states"]), with_kwargs=True
        ),
        text.register_forward_pre_hook(lambda m, args, kw: seen.update(text=kw), with_kwargs=True),
    ]
    ids, mask = batch["input_ids"], batch["attention_mask"]
    places = family.positions(model, ids, mask, batch.get("image_grid_thw"))
    maps = case.attn == "eager"
    out = family.base_model(model)(**batch, position_ids=places, use_cache=False, output_attentions=maps)
    for handle in handles:
        handle.remove()
    x, deep = seen["x"], family.deep(seen["text"])  # Qwen3-VL: features of the tower's inner layers
    image = torch.isin(ids[0], torch.tensor(family.vision_ids(model))).nonzero().flatten().tolist()
    visited: set[int] = set()
    found = Naive([out.last_hidden_state[0, -1]], [], [])
    next_place = int(places.max()) + 1
    for _ in range(steps):
        copies, carried = [], []
        if maps:
            row = torch.stack([a[0, :, -1].mean(0) for a in out.attentions]).mean(0)
            found.rows.append(row[image])
            free = sorted((i for i in image if i not in visited), key=lambda i, r=row: (-float(r[i]), i))
            picks = sorted(free[:K])
            visited |= set(picks)
            found.chosen.append([image.index(i) for i in picks])
            total = sum(float(row[i]) for i in picks)
            weights = [len(picks) * float(row[i]) / total if weighted else 1 for i in picks]
            copies = [x[:, i : i + 1] * w for i, w in zip(picks, weights, strict=True)]
            if deep is not None:
                carried = [deep[:, :, i : i + 1] * w for i, w in zip(picks, weights, strict=True)]
        z = found.hidden[-1][None, None] * scale
        x = torch.cat([x, *copies, z], 1)
        new = torch.arange(next_place, next_place + len(copies) + 1)
        next_place += len(copies) + 1
        places = torch.cat([places, new.expand(*places.shape[:-1], -1)], -1)
        full = torch.ones(1, x.shape[1], dtype=torch.long)
        if deep is not None:
            deep = torch.cat([deep, *carried, deep.new_zeros(len(deep), 1, 1, deep.shape[-1])], 2)
        out = text(
            inputs_embeds=x,
            attention_mask=full,
            position_ids=places,
            use_cache=False,
            output_attentions=maps,
            **({} if deep is None else family.carry(deep)),
        )
        found.hidden.append(out.last_hidden_state[0, -1])
    return found


@grid(attn=("eager",), rows=("one", "padded"))
@pytest.mark.parametrize("name", ["vedas", "ivtlr"])
def test_replayed_steps_on_a_cache_equal_entering_everything_anew(case: Case, name: str) -> None:
    batch = _two_images(case)
    think = hub.load("think", name, num_latents=STEPS, replay_tokens=9)
    counts = [STEPS, 1, 2][: len(case.pads)]
    with case.attached(think=think) as routed:
        rollout = roll(case, routed, think, batch, counts)
        scale = float(think.learned.scale)
    for b, steps in enumerate(counts):
        want = naive(case, families.slice_batch(batch, b), 9, steps, scale, name == "vedas")
        chosen = [[i for i in t.source[b].tolist() if i >= 0] for t in rollout.thoughts[:steps]]
        assert chosen == want.chosen
        assert len({i for step in chosen for i in step}) == sum(map(len, chosen)), "nothing is copied twice"
        assert distance(rollout.mind.hidden[b], want.hidden[-1]) < 1e-4  # eager on longer and longer sequences


def _two_images(case: Case) -> dict[str, Tensor]:
    """24 or 32 image tokens, so that the third step of 9 finds fewer on Qwen-VL."""
    pads = list(case.pads)
    return families.make_inputs(case.name, case.model, len(pads), pads, images=2)


@grid(attn=("sdpa",), rows=("one", "padded"))
def test_plain_steps_on_a_cache_equal_entering_everything_anew(case: Case) -> None:
    batch = case.prompt
    think = hub.load("think", "coconut", num_latents=STEPS)
    with case.attached(think=think) as routed:
        rollout = roll(case, routed, think, batch)
        scale = float(think.learned.scale)
    for b in range(len(case.pads)):
        want = naive(case, families.slice_batch(batch, b), 0, STEPS, scale, False)
        assert distance(rollout.mind.hidden[b], want.hidden[-1]) < 1e-5


@grid(attn=("sdpa",), rows=("one", "three"))
def test_steps_that_keep_everything_are_the_stock_loop_bit_for_bit(case: Case) -> None:
    batch, think = case.prompt, hub.load("think", "coconut", num_latents=STEPS)
    prune = hub.load("prune", "random", vision_keep=1.0, text_keep=1.0)
    with case.attached(prune, think=think) as routed:
        got = roll(case, routed, think, batch).mind.hidden
    mask, cache = batch["attention_mask"], DynamicCache(config=case.model.config.get_text_config(decoder=True))
    places = case.family.positions(case.model, batch["input_ids"], mask, batch.get("image_grid_thw"))
    base = case.family.base_model(case.model)
    h = base(**batch, position_ids=places, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
    top = places.amax(-1, keepdim=True)
    for step in range(1, STEPS + 1):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        at = (top.amax(0, keepdim=True) + step).expand(top.shape) if top.ndim == 3 else top + step
        h = h * think.learned.scale
        h = base(inputs_embeds=h, attention_mask=mask, position_ids=at, past_key_values=cache).last_hidden_state
    assert torch.equal(got, h[:, 0])


@grid(rows=("padded",))
def test_the_saliency_of_every_step_is_the_mean_of_eager_attention_maps(case: Case) -> None:
    batch = case.prompt
    think = hub.load("think", "ivtlr", num_latents=2, replay_tokens=3)
    with case.attached(think=think) as routed:
        rollout = roll(case, routed, think, batch)
        first = rollout.cache.trace.calls[0]
        assert all(layer.extra_flops > 0 for layer in first.layers), "what a row costs is counted"
    eager = Case(case.name, "eager", case.rows)
    for b in range(len(case.pads)):
        want = naive(eager, families.slice_batch(batch, b), 3, 2, float(think.learned.scale), False)
        assert distance(rollout.mind.row[b], want.rows[1]) < 1e-6


@grid(attn=("sdpa",), rows=("padded",))
@pytest.mark.parametrize("depth", [False, True])
@pytest.mark.parametrize("prune", [None, "random"])
def test_steps_on_a_cache_equal_one_pass_over_what_they_entered(case: Case, depth: bool, prune: str | None) -> None:
    batch = case.prompt
    think = hub.load("think", "vedas", num_latents=STEPS, replay_tokens=3)
    deepen = hub.load("deepen", "vedas", deepen_tokens=6, chunk_tokens=2) if depth else None
    pruner = hub.load("prune", prune, vision_keep=0.5) if prune else None
    with case.attached(pruner, deepen, think=think) as routed:
        generator = torch.Generator().manual_seed(2)
        for p in routed.parts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
        rollout = roll(case, routed, think, batch, [3, 1, 2])
        once = whole_pass(case, routed, rollout, batch)
    assert distance(once, rollout.mind.hidden) < 1e-5


def whole_pass(case: Case, routed: Any, rollout: Rollout, batch: dict[str, Tensor]) -> Tensor:
    """Each row's last state after one pass over prompt and thoughts."""
    cache = routed.new_cache()
    positions = case.family.positions(case.model, batch["input_ids"], batch["attention_mask"],
                                      batch.get("image_grid_thw"))  # fmt: skip
    cache.next = Chunk(watch=True)
    routed.controller.base(**batch, position_ids=positions, past_key_values=cache, use_cache=True)
    prompt, deep = cache.watched.entered, cache.watched.deep
    thoughts = rollout.thoughts
    if deep is not None:
        deep = torch.cat([deep, *(t.deep for t in thoughts)], 2)
    ids = batch["input_ids"]
    table, delimiters = routed.controller.table[ids], routed.controller.delimiters[ids]
    axes = positions if positions.ndim == 3 else positions[None]
    hop = [torch.zeros_like(table)] + [torch.full_like(t.modality, i) for i, t in enumerate(thoughts, 1)]
    places = torch.cat([axes, *(t.places for t in thoughts)], 2)
    once = routed.new_cache()
    once.next = Chunk(
        modality=torch.cat([table, *(t.modality for t in thoughts)], 1),
        protected=torch.cat([delimiters, *(torch.zeros_like(t.valid) for t in thoughts)], 1),
        hop=torch.cat(hop, 1),
        deep=deep,
    )
    whole = routed.controller.base(
        inputs_embeds=torch.cat([prompt, *(t.embeds for t in thoughts)], 1),
        attention_mask=rollout.mask,
        position_ids=places if positions.ndim == 3 else places[0],
        past_key_values=once,
    ).last_hidden_state
    last = (rollout.mask * torch.arange(rollout.mask.shape[1])).amax(1)
    return whole[torch.arange(len(whole)), last]


@grid(attn=("sdpa",), rows=("padded",))
def test_every_row_thinks_as_it_does_alone(case: Case) -> None:
    batch = _two_images(case)
    think = hub.load("think", "vedas", num_latents=STEPS, replay_tokens=9)
    with case.attached(think=think, deepen=hub.load("deepen", "vedas", scale_init=0.3, deepen_tokens=5)) as routed:
        together = roll(case, routed, think, batch, [1, 3, 2])
        for b, steps in enumerate([1, 3, 2]):
            alone = roll(case, routed, think, families.slice_batch(batch, b), [steps])
            assert distance(alone.mind.hidden[0], together.mind.hidden[b]) < 1e-5
            assert alone.mind.left == [together.mind.left[b] if steps == 3 else alone.mind.left[0]]


@pytest.mark.parametrize("exhausted", ["shrink", "reset", "stop"])
@grid(attn=("sdpa",), rows=("padded",))
def test_a_used_up_image_gives_neither_nan_nor_empty_tokens(case: Case, exhausted: str) -> None:
    batch = case.prompt  # 16 image tokens
    think = hub.load("think", "vedas", num_latents=4, replay_tokens=7, on_exhausted=exhausted)
    with case.attached(think=think) as routed:
        rollout = roll(case, routed, think, batch)
    taken = [t.valid[0].sum().item() - 1 for t in rollout.thoughts]
    assert taken == {"shrink": [7, 7, 2, 0], "reset": [7, 7, 7, 7], "stop": [7, 7, 0, 0]}[exhausted]
    for t in rollout.thoughts:
        assert t.embeds[t.valid].isfinite().all()
        assert (t.embeds[t.valid].abs().amax(-1) > 0).all()
    assert rollout.mind.hidden.isfinite().all()


@grid(attn=("sdpa",), rows=("padded",))
def test_more_tokens_than_the_image_has_and_no_image_at_all(case: Case) -> None:
    think = hub.load("think", "vedas", num_latents=2, replay_tokens=50)
    with case.attached(think=think) as routed:
        many = roll(case, routed, think, case.prompt)
        assert [t.valid[0].sum().item() for t in many.thoughts] == [17, 1]
        batch = families.make_inputs(case.name, case.model, 3, list(case.pads), images=0)
        none = roll(case, routed, think, batch)
        assert [t.valid.shape[1] for t in none.thoughts] == [1, 1]
        assert none.mind.hidden.isfinite().all()
        modality = many.cache.meta["modality"][0, many.mask[0].bool()]
        assert (modality == int(Modality.LATENT)).sum() == 2


@pytest.mark.parametrize("name", ["vedas", "ivtlr"])
def test_replay_is_refused_where_image_tokens_have_no_place(name: str) -> None:
    with pytest.raises(UnsupportedCall, match="lie in no grid"):
        mmroute.attach(families.make("llava_next"), think=hub.load("think", name))
