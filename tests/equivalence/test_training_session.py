"""Training hop by hop on a differentiable cache is one teacher-forced pass: loss and gradients."""

from collections.abc import Iterator

import families
import pytest
import torch
from rig import LAYERS, RAGGED, attached, backbone_gradients, far, labels, relative, router, stock
from teacher import closing_session, conversation
from torch.nn.functional import cross_entropy

from mmroute.deepen.uniform import Uniform
from mmroute.engine.train import GrowingCache
from mmroute.errors import UnsupportedCall
from mmroute.prune.knorm import KNorm

BATCHES = [pytest.param(1, None, id="one"), pytest.param(3, RAGGED, id="ragged")]
NAME = "qwen2_5_vl"


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Gradients stay on here."""
    return


def _loss(logits, talk):
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels(talk.whole)[:, 1:].flatten())


def _gradients(routed, loss):
    loss.backward()
    parts = {n: p.grad.clone() for n, p in routed.parts.named_parameters() if p.grad is not None}
    return backbone_gradients(routed.model), parts


def _one_pass(name, talk, executor, **options):
    with attached(name, executor=executor, **options) as routed:
        loss = _loss(routed.model(**talk.whole, hop_ids=talk.hop, generated=talk.generated).logits, talk)
        return loss, *_gradients(routed, loss)


def _hop_by_hop(name, talk, checkpointed=False, **options):
    with attached(name, **options) as routed:
        if checkpointed:
            routed.model.activation_checkpointing_enable()
        logits, cache = closing_session(routed, talk, routed.new_cache(differentiable=True))
        loss = _loss(logits, talk)
        found = loss, *_gradients(routed, loss), cache
        if checkpointed:
            routed.model.activation_checkpointing_disable()
            routed.model.disable_input_require_grads()
    return found


@pytest.mark.parametrize(("B", "pads"), BATCHES)
@pytest.mark.parametrize("name", families.EACH)
def test_hop_by_hop_is_one_pass(name, B, pads):
    talk = conversation(name, stock(name), B, pads)
    wanted, backbone, parts = _one_pass(name, talk, "physical", prune=router())
    loss, found, routers, cache = _hop_by_hop(name, talk, prune=router())
    assert isinstance(cache, GrowingCache)
    assert not cache.layers[1].score.requires_grad, "stored scores decide at hop close; a graph through them is waste"
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-6)
    assert relative(found, backbone) < 1e-5
    assert far(routers, parts) < 1e-5 * max(float(p.abs().max()) for p in parts.values())


@pytest.mark.parametrize("name", families.EACH)
def test_so_it_is_when_hops_are_compressed(name):
    talk = conversation(name, stock(name), 3, RAGGED)
    wanted, backbone, _ = _one_pass(name, talk, "dense", prune=router(compresses=True))
    loss, found, _, cache = _hop_by_hop(name, talk, prune=router(compresses=True))
    assert cache.trace.closes[1].after != cache.trace.closes[1].before, "nothing was evicted"
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-6)
    assert relative(found, backbone) < 1e-5


@pytest.mark.parametrize("deepen", [None, Uniform(deepen_tokens=3)], ids=["plain", "deepened"])
def test_checkpointing_a_session_changes_nothing(deepen):
    talk = conversation(NAME, stock(NAME), 3, RAGGED)
    ways = [_hop_by_hop(NAME, talk, on, prune=router(compresses=True), deepen=deepen) for on in (False, True)]
    (loss, found, parts, cache), (again, other, routers, second) = ways
    assert torch.equal(loss, again)
    assert far(found, other) == 0
    assert far(parts, routers) == 0
    assert cache.lengths() == second.lengths()
    if deepen is not None:
        assert any(map(sum, cache.depth[0].lengths()))


def test_second_passes_of_a_session_are_those_of_one_pass():
    talk = conversation(NAME, stock(NAME), 3, RAGGED)
    options = {"prune": router(), "deepen": Uniform(deepen_tokens=3)}
    wanted, backbone, _ = _one_pass(NAME, talk, "physical", **options)
    loss, found, _, _ = _hop_by_hop(NAME, talk, **options)
    torch.testing.assert_close(loss, wanted, rtol=0, atol=1e-6)
    assert relative(found, backbone) < 1e-5


def test_a_session_that_evicts_after_the_layer_trains():
    talk = conversation(NAME, stock(NAME), 3, RAGGED)
    with attached(NAME, prune=KNorm(vision_keep=0.4)) as routed, torch.no_grad():
        wanted, plain = closing_session(routed, talk, routed.new_cache())
    with attached(NAME, prune=KNorm(vision_keep=0.4)) as routed:
        logits, cache = closing_session(routed, talk, routed.new_cache(differentiable=True))
        assert torch.equal(logits.detach(), wanted)
        assert cache.lengths() == plain.lengths()
        assert cache.live_bytes() == plain.live_bytes()
        gradients, _ = _gradients(routed, _loss(logits, talk))
    assert all(g.isfinite().all() for g in gradients.values())
    assert gradients["model.language_model.layers.0.self_attn.v_proj.weight"].abs().max() > 0


def test_two_continuations_of_one_prompt_add_their_gradients():
    prompt = families.make_inputs(NAME, stock(NAME), 2)
    ids = torch.tensor([[120, 130, 140], [150, 160, 170]])
    mask = torch.cat([prompt["attention_mask"], torch.ones_like(ids)], 1)

    def tail(routed, cache, ids):
        place = torch.arange(30, 33).expand(3, 2, -1)
        return routed.model(ids, attention_mask=mask, position_ids=place, past_key_values=cache).logits.square().mean()

    with attached(NAME, prune=router()) as routed:
        separate = []
        for given in (ids, ids + 5):
            cache = routed.new_cache(differentiable=True)
            routed.model(**prompt, past_key_values=cache)
            tail(routed, cache, given).backward()
            separate.append(backbone_gradients(routed.model))
        cache = routed.new_cache(differentiable=True)
        routed.model(**prompt, past_key_values=cache)
        twin = cache.fork()
        (tail(routed, cache, ids) + tail(routed, twin, ids + 5)).backward()
        shared = backbone_gradients(routed.model)
        assert cache.seen == twin.seen
        assert len(cache.trace.calls) == len(twin.trace.calls) == 2
    assert relative(shared, {n: separate[0][n] + separate[1][n] for n in shared}) < 1e-5


def test_a_cache_written_in_place_is_refused_in_training():
    with attached(NAME, prune=router()) as routed, pytest.raises(UnsupportedCall, match="differentiable=True"):
        routed.model(**families.make_inputs(NAME, stock(NAME)), past_key_values=routed.new_cache())


def test_cropping_a_session_leaves_the_graph_whole():
    prompt = families.make_inputs(NAME, stock(NAME))
    with attached(NAME, prune=router()) as routed:
        cache = routed.new_cache(differentiable=True)
        loss = routed.model(**prompt, past_key_values=cache).logits.square().mean()
        cache.crop(-4)
        loss.backward()  # an in-place crop would have torn it
        assert cache.lengths()[0] == [prompt["input_ids"].shape[1] - 4]
        assert len(cache.layers) == LAYERS
