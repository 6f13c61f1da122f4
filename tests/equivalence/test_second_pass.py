"""A second pass through a layer: nothing at zero gain, a cache of its own, and nobody else disturbed."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import LAYERS, Case, grid
from oracle import masked_forward
from routing import Forced, Story, distance, play, scattered
from torch import Tensor

from mmroute import hub
from mmroute.deepen.base import Again, Deepener
from mmroute.deepen.uniform import Uniform
from mmroute.tokens import Tokens


class Chosen(Deepener):
    """Runs again what it is told, by layer, pass and logical column."""

    def __init__(self, masks: Sequence[Sequence[Tensor]], gain: float) -> None:
        super().__init__()
        self.masks, self.gain, self.max_depth = masks, gain, 2

    def acts(self, layer: int, num_layers: int) -> bool:
        return len(self.masks[layer]) > 0

    def again(self, x: Tensor, tokens: Tokens, ran: Tensor, sizes: Any, latents: Any, layer: int, depth: int) -> Again:
        mask = self.masks[layer][depth - 1].gather(1, tokens.position) & ran
        return Again(mask, mask.sum(1).tolist(), x.new_full((*x.shape[:2], 1), self.gain))


def _again(story: Story, masks: list[Tensor]) -> list[list[Tensor]]:
    """Two passes in layers 1 and 3, of half and of a quarter of what ran; single positions have none."""
    generator = torch.Generator().manual_seed(4)
    single = torch.cat([torch.full((e - s,), e - s == 1) for s, e in story.spans])
    out: list[list[Tensor]] = [[] for _ in masks]
    for layer in (1, 3):
        once = masks[layer] & ~single & (torch.rand(story.real.shape, generator=generator) < 0.5)
        out[layer] = [once, once & (torch.rand(story.real.shape, generator=generator) < 0.5)]
    return out


@grid()
def test_chunks_with_a_second_cache_equal_one_masked_forward(case: Case) -> None:
    story = case.story(observations=2, tail=2)
    masks = scattered(story, LAYERS, 0.7)
    again = _again(story, masks)
    want = masked_forward(case.model, case.family, story.whole, masks, again=again, gain=0.5)
    plain = masked_forward(case.model, case.family, story.whole, masks)
    with case.attached(Forced(masks), Chosen(again, 0.5)) as routed:
        told = play(routed.model, story, routed.new_cache())
        flat = routed.model(**story.whole, use_cache=False).logits
    assert distance(want, plain, story.real) > 0.01  # depth does something
    assert distance(told.all, want, story.real) < 1e-5
    assert distance(flat, want, story.real) < 1e-5
    for depth, cache in enumerate(told.cache.depth):
        want_lengths = [again[i][depth].sum(1).tolist() if again[i] else [] for i in range(LAYERS)]
        assert cache.lengths() == want_lengths


@grid(attn=("sdpa",), rows=("padded",))
@pytest.mark.parametrize("prune", [None, "random"])
def test_zero_gain_is_no_second_pass_bit_for_bit(case: Case, prune: str | None) -> None:
    pruner = None if prune is None else hub.load("prune", prune, vision_keep=0.4)
    batch = case.prompt
    with case.attached(pruner, strip_padding=True) as routed:
        want = routed.model(**batch).logits
    with case.attached(pruner, Uniform(deepen_tokens=4, gain=0.0)) as routed:
        out = routed.model(**batch)
    assert torch.equal(out.logits, want)
    assert out.past_key_values.depth[0].lengths()[1] == [4, 4, 4]


@grid(attn=("sdpa",), rows=("padded",))
def test_rows_of_the_stream_that_do_not_go_again_are_untouched(case: Case) -> None:
    batch = case.prompt
    with case.attached(None, strip_padding=True) as routed:
        before = routed.model(**batch, output_hidden_states=True).hidden_states
    with case.attached(None, Uniform(deepen_tokens=4, every=4)) as routed:  # layer 3 only
        after = routed.model(**batch, output_hidden_states=True).hidden_states
    same = (before[4] == after[4]).all(-1) & batch["attention_mask"].bool()
    assert same.sum(1).tolist() == [int(n) - 4 for n in batch["attention_mask"].sum(1)]
    assert all(torch.equal(a, b) for a, b in zip(before[:4], after[:4], strict=True))


@grid(attn=("sdpa",), rows=("padded",))
@pytest.mark.parametrize("action", ["skip", "drop"])
def test_hop_ids_in_one_call_deepen_as_hop_by_hop(case: Case, action: str) -> None:
    story = case.story(observations=2, tail=0)
    prune = hub.load("prune", "random", vision_keep=0.5, text_keep=0.7, once=action == "drop")
    with case.attached(prune, Uniform(deepen_tokens=3)) as routed:
        told = play(routed.model, story, routed.new_cache())
        once = routed.model(**story.whole, hop_ids=story.hop, use_cache=False).logits
        (call,) = routed.trace.calls
    assert distance(once, told.all, story.real) < 1e-5
    assert [layer.again for layer in call.layers] == [[], [9, 9, 9], [], [9, 9, 9], []]
