"""DARE with routers that are not zero: what is left out is masked out, one pass is hop by hop, kept all is stock."""

from collections.abc import Iterator

import families
import pytest
import torch
from oracle import closed_later, masked_forward
from rig import RAGGED, attached, backbone_gradients, labels, relative, stock
from routing import distance, play, tell
from teacher import closing_session, conversation
from torch.nn.functional import cross_entropy

import mmroute
from mmroute import backbones
from mmroute.prune.dare import Dare

POLICIES = ["append", "progressive"]
NAME = "qwen2_5_vl"


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Gradients stay on here; tests that need none say so."""
    return


def dare(**options):
    """First layer 1 of 4, cutoff 3, no threshold behind it: that one is for training only."""
    return Dare(
        **{"first_layer": 1, "cutoff_layer": 3, "hard_threshold": 1e-4, "vision_keep": 0.5, "text_keep": 0.7, **options}
    )


def draw(routed, seed=0, falling=True):
    """Random routers, and rates that fall with hops so that mixing hops up cannot go unseen."""
    generator = torch.Generator().manual_seed(seed)
    pruner = routed.controller.pruner
    with torch.no_grad():
        for name, p in pruner.named_parameters():
            if name.endswith("beta"):
                p.copy_(-0.7 * torch.arange(1, p.shape[1] + 1).expand_as(p) if falling else torch.zeros_like(p))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if "weight" in name else 0.5))
    pruner.export()
    return pruner


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("name", families.EACH)
def test_leaving_out_equals_masking_with_real_routers(name, carry):
    model = stock(name)
    batch = families.make_inputs(name, model, 3, RAGGED)
    with attached(name, training=False, prune=dare(carry=carry)) as routed, torch.no_grad():
        draw(routed)
        routed.full_trace = True
        out = routed.model(**batch, use_cache=True)
        call = routed.trace.calls[0]
        lengths = out.past_key_values.lengths()
    masks = []
    for index, layer in enumerate(call.layers):
        mask = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
        for row, columns in enumerate(layer.kept):
            mask[row, columns] = True
        masks.append(mask)
        assert mask.sum(1).tolist() == lengths[index]
    assert masks[3].sum() < masks[1].sum() < masks[0].sum()
    real = batch["attention_mask"].bool()
    expected = masked_forward(model, backbones.of(model), batch, masks)
    torch.testing.assert_close(out.logits[real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("scope", ["skip", "drop"])
@pytest.mark.parametrize("name", families.EACH)
def test_one_dense_pass_over_three_hops_is_hop_by_hop_inference(name, scope, policy):
    talk = conversation(name, stock(name), 3, RAGGED)
    options = {"prune": dare(cache_policy=policy, scope=scope), "executor": "dense"}
    with attached(name, **options) as routed:
        draw(routed)
        one = routed.model(**talk.whole, hop_ids=talk.hop, generated=talk.generated).logits.detach()
        shares = {i: keep.alive is not None for i, keep in routed.controller.aux.items()}
        routed.model.eval()
        with torch.no_grad():
            logits, cache = closing_session(routed, talk)
    assert all(shares.values())
    assert any(close.after != close.before for close in cache.trace.closes), "nothing was evicted"
    real = talk.whole["attention_mask"].bool()
    assert distance(one, logits, real) < 1e-5


@pytest.mark.parametrize("name", families.EACH)
def test_backbone_gradients_of_both_executors_agree(name):
    talk = conversation(name, stock(name), 3, RAGGED)
    batch = talk.whole

    def gradients(executor):
        with attached(name, prune=dare(text_keep=1.0, cache_policy="append"), executor=executor) as routed:
            draw(routed)
            out = routed.model(**batch, hop_ids=talk.hop, generated=talk.generated).logits
            loss = cross_entropy(out[:, :-1].flatten(0, 1), labels(batch)[:, 1:].flatten())
            loss.backward()
            return loss.detach(), backbone_gradients(routed.model)

    (dense, wanted), (physical, found) = gradients("dense"), gradients("physical")
    torch.testing.assert_close(dense, physical, rtol=0, atol=1e-6)
    assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("name", families.EACH)
def test_trained_routers_that_keep_everything_change_nothing(name):
    model = stock(name)
    batch = families.make_inputs(name, model, 3, RAGGED)
    kinds = [{"do_sample": False}, {"do_sample": False, "num_beams": 3}]
    with torch.no_grad():
        expected = model(**batch).logits
        written = [model.generate(**batch, max_new_tokens=5, **kind) for kind in kinds]
        with attached(name, training=False, prune=dare(vision_keep=1.0, text_keep=1.0)) as routed:
            draw(routed)
            assert torch.equal(routed.model(**batch).logits, expected)
            for kind, before in zip(kinds, written, strict=True):
                assert torch.equal(routed.generate(**batch, max_new_tokens=5, **kind), before)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_closed_hop_is_a_mask_that_later_hops_see(policy):
    model, family = stock(NAME), backbones.of(stock(NAME))
    story = tell(NAME, model, family, RAGGED, observations=2)
    with mmroute.attach(model, prune=dare(cache_policy=policy)) as routed, torch.no_grad():
        pruner = draw(routed)
        routed.full_trace = True
        played = play(routed.model, story, routed.new_cache(), close=pruner)
        calls, closes = played.cache.trace.calls, played.cache.trace.closes
        held = [layer.pos[:, : max(layer.lengths)].tolist() for layer in played.cache.layers]
    assert closes[1].after != closes[1].before
    keep = [torch.zeros_like(story.real) for _ in range(4)]
    for call in calls:
        for index, layer in enumerate(call.layers):
            for row, columns in enumerate(layer.kept):
                keep[index][row, columns] = True
    if policy == "append":  # two closes that each evict their own hop are one visibility
        stays = [torch.zeros_like(story.real) for _ in range(4)]
        for index, rows in enumerate(held):
            for row, columns in enumerate(rows):
                stays[index][row, [c for c in columns if c >= 0]] = True
        visible = [closed_later(story.hop, mask) for mask in stays]
        expected = masked_forward(model, family, story.whole, keep, visible)
        assert distance(played.all, expected, story.real) < 1e-5
    else:  # evicted never return
        for before, after in zip(closes[0].after, closes[1].before, strict=True):
            assert all(b <= a for b, a in zip(before, after, strict=True))


@pytest.mark.parametrize("bound", [{"kv_positions": 12}, {"kv_bytes": 12 * 4 * 2 * 2 * 16 * 4}], ids=str)
def test_a_capped_cache_never_holds_more_than_its_bound_and_goes_on_writing(bound):
    model = stock(NAME)
    batch = families.make_inputs(NAME, model, 3, RAGGED)
    with mmroute.attach(model, prune=dare(cache_policy="capped", **bound)) as routed, torch.no_grad():
        pruner = draw(routed)
        shape = routed.controller.shape
        each = 2 * shape.kv_heads * shape.head_dim * shape.itemsize * shape.layers
        cap = bound.get("kv_positions") or bound["kv_bytes"] // each
        assert pruner.cap == cap
        cache, most = routed.new_cache(), []
        hook = model.register_forward_hook(lambda *_: most.append(max(map(max, cache.lengths()))))
        written = routed.generate(**batch, past_key_values=cache, max_new_tokens=2 * cap, eos_token_id=[])
        hook.remove()
    assert len(most) == 2 * cap
    assert cap - 3 <= max(most) <= cap < batch["input_ids"].shape[1]
    assert cache.live_bytes() <= 3 * cap * each
    assert cache.get_seq_length() == written.shape[1] - 1


def test_a_later_word_never_changes_an_earlier_logit():
    talk = conversation(NAME, stock(NAME), 3, RAGGED)
    changed = {k: v.clone() for k, v in talk.whole.items()}
    last = changed["input_ids"].shape[1] - 2
    changed["input_ids"][:, last] = 101 + changed["input_ids"][:, last] % 50
    with attached(NAME, prune=dare(), executor="dense") as routed:
        draw(routed)
        one, other = (
            routed.model(**b, hop_ids=talk.hop, generated=talk.generated).logits for b in (talk.whole, changed)
        )
    assert torch.equal(one[:, :last], other[:, :last])
    assert not torch.equal(one[:, last:], other[:, last:])
