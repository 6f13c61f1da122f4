"""Learned depth on whole models: chunks with a second cache equal one pass, and what is zero changes nothing."""

import families
import pytest
import torch
from cases import LAYERS, Case, grid
from routing import distance, play

import mmroute
from mmroute import hub
from mmroute.engine import saving


def depth(name="vedas", seed=0, **options):
    return hub.load("deepen", name, **{"deepen_tokens": 5, "seed": seed, **options})


def draw(routed, seed=0):
    """Parts that are not zero, so that every mistake shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in routed.parts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)


@grid()
@pytest.mark.parametrize("options", [{}, {"max_depth": 2, "layers": [0, 1, 4], "schedule": "cosine"}])
def test_segments_told_one_by_one_equal_all_in_one_pass(case: Case, options: dict) -> None:
    story = case.story(observations=2, tail=0)
    with case.attached(None, depth(**options)) as routed:
        draw(routed)
        told = play(routed.model, story, routed.new_cache())
        once = routed.model(**story.whole, hop_ids=story.hop, use_cache=False).logits
    with case.attached(None, strip_padding=True) as routed:
        plain = routed.model(**story.whole, use_cache=False).logits
    assert distance(plain, once, story.real) > 0.05, "depth does something"
    assert distance(told.all, once, story.real) < 1e-5


@grid(rows=("padded",))
@pytest.mark.parametrize("prune", [None, "random"])
def test_new_parts_leave_the_model_as_it_is(case: Case, prune: str | None) -> None:
    pruner = None if prune is None else hub.load("prune", prune, vision_keep=0.4)
    with case.attached(pruner, strip_padding=True) as routed:
        want = routed.model(**case.prompt).logits
    with case.attached(pruner, depth()) as routed:
        out = routed.model(**case.prompt)
    assert torch.equal(out.logits, want)
    assert [layer.again for layer in routed.trace.calls[0].layers] == [[], [5, 5, 5], [], [5, 5, 5], []]


@grid(attn=("sdpa",), rows=("padded",))
def test_who_is_not_chosen_is_untouched_and_a_row_alone_chooses_the_same(case: Case) -> None:
    batch = case.prompt
    with case.attached(None, strip_padding=True) as routed:
        before = routed.model(**batch, output_hidden_states=True).hidden_states
    with case.attached(None, depth(layers=[3])) as routed:
        draw(routed)
        out = routed.model(**batch, output_hidden_states=True)
        alone = routed.model(**families.slice_batch(batch, 1)).logits
    same = (before[4] == out.hidden_states[4]).all(-1) & batch["attention_mask"].bool()
    assert same.sum(1).tolist() == [int(n) - 5 for n in batch["attention_mask"].sum(1)]
    real = batch["attention_mask"][1].bool()
    assert distance(alone[0], out.logits[1, real]) < 1e-5


@grid(attn=("sdpa",), rows=("padded",))
@pytest.mark.parametrize("name", ["vedas", "random"])
def test_what_was_learned_is_saved_and_comes_back(case: Case, name: str, tmp_path) -> None:
    with case.attached(None, depth(name)) as routed:
        draw(routed)
        want = routed.model(**case.prompt).logits
        routed.save_pretrained(tmp_path)
    with case.attached(None, depth(name)) as routed:
        saving.load(routed, tmp_path)
        assert torch.equal(routed.model(**case.prompt).logits, want)
        model = routed.model
    with mmroute.from_pretrained(tmp_path, base=model) as routed:
        assert routed.controller.deepener.num_layers == LAYERS
        assert torch.equal(routed.model(**case.prompt).logits, want)
