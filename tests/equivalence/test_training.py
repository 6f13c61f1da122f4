"""Training is what inference is: executors, hops under teacher forcing, and gradients against the stock model's."""

import copy
from collections.abc import Iterator

import families
import pytest
import torch
from gates import of_queries, softmax_times_gate
from learned import LinearRouter
from rig import LAYERS, RAGGED, attached, backbone_gradients, labels, relative, router, stock
from teacher import closing_session, conversation

import mmroute
from mmroute import backbones
from mmroute.deepen.uniform import Uniform
from mmroute.engine import gated

BATCHES = [pytest.param(1, None, id="one"), pytest.param(3, RAGGED, id="ragged")]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """Gradients stay on here."""
    return


def _train(routed, batch, **extra):
    out = routed.model(**batch, **extra, labels=labels(batch))
    out.loss.backward()
    return out, backbone_gradients(routed.model)


def _dense_is_physical(name, attn, B, pads, choose, **parts):
    batch = families.make_inputs(name, stock(name), B, pads)
    with attached(name, attn, prune=router(**choose), executor="dense", **parts) as routed:
        dense, wanted = _train(routed, batch)
        ran = [layer.ran for layer in routed.trace.calls[0].layers][-1]
    with attached(name, attn, prune=router(**choose), executor="physical", **parts) as routed:
        physical, gradients = _train(routed, batch)
        assert routed.trace.calls[0].layers[-1].ran == ran
    real = batch["attention_mask"].bool()
    assert ran[0][1] < 16, "nothing was pruned"
    torch.testing.assert_close(dense.loss, physical.loss, rtol=0, atol=1e-6)
    torch.testing.assert_close(dense.logits[real], physical.logits[real], rtol=0, atol=1e-5)
    assert relative(gradients, wanted) < 1e-5


@pytest.mark.parametrize(
    ("attn", "B", "pads"),
    [
        pytest.param("sdpa", 1, None, id="sdpa-one"),
        pytest.param("sdpa", 3, RAGGED, id="sdpa-ragged"),
        pytest.param("eager", 1, None, id="eager-one", marks=pytest.mark.slow),  # the ragged batch goes through eager
        pytest.param("eager", 3, RAGGED, id="eager-ragged"),
    ],
)
@pytest.mark.parametrize("name", families.EACH)
def test_the_dense_executor_trains_what_the_physical_one_does(name, attn, B, pads):
    _dense_is_physical(name, attn, B, pads, {})


@pytest.mark.parametrize("name", families.EACH)
@pytest.mark.parametrize("choose", [{"reads_row": True}, {"scope": "drop", "every": 2}], ids=["row", "drop"])
def test_so_it_does_with_attention_rows_and_with_drops(name, choose):
    _dense_is_physical(name, "sdpa", 3, RAGGED, choose)


@pytest.mark.parametrize("name", families.EACH)
def test_so_it_does_with_second_passes(name):
    _dense_is_physical(name, "sdpa", 3, RAGGED, {}, deepen=Uniform(deepen_tokens=4))


@pytest.mark.parametrize(("B", "pads"), BATCHES)
@pytest.mark.parametrize("name", families.EACH)
def test_training_at_keep_one_is_stock_training(name, B, pads):
    batch = families.make_inputs(name, stock(name), B, pads)
    model = stock(name).train()
    model(**batch, labels=labels(batch), use_cache=False).loss.backward()
    wanted = backbone_gradients(model)
    ways = {
        "padding stripped": {"strip_padding": True},
        "physical": {"prune": router(vision_keep=1, text_keep=1), "executor": "physical", "strip_padding": True},
        "dense": {"prune": router(vision_keep=1, text_keep=1), "executor": "dense", "strip_padding": True},
    }
    for way, options in ways.items():
        with attached(name, **options) as routed:
            _, gradients = _train(routed, batch)
            assert routed.trace is not None, f"{way}: the stock path ran"
            assert bool(routed.controller.aux) == ("prune" in options)
        assert relative(gradients, wanted) < 1e-5, way


@pytest.mark.parametrize("compresses", [False, True], ids=["keep", "compress"])
@pytest.mark.parametrize(("B", "pads"), BATCHES)
@pytest.mark.parametrize("name", families.EACH)
def test_a_teacher_forced_pass_over_three_hops_is_hop_by_hop_inference(name, B, pads, compresses):
    talk = conversation(name, stock(name), B, pads)
    with attached(name, prune=router(compresses=compresses), training=False) as routed:
        wanted, cache = closing_session(routed, talk)
    if compresses:
        assert cache.trace.closes[1].after != cache.trace.closes[1].before, "nothing was evicted"
    real = talk.whole["attention_mask"].bool()
    executors = ["dense"] if compresses else ["dense", "physical"]
    for executor in executors:
        with attached(name, prune=router(compresses=compresses), executor=executor) as routed:
            out = routed.model(**talk.whole, hop_ids=talk.hop, generated=talk.generated)
        torch.testing.assert_close(out.logits[real], wanted[real], rtol=0, atol=1e-5)


def test_what_hop_ids_and_generated_say_matters():
    """The equality above could hold if both sides ignored them."""
    name = "qwen2_5_vl"
    talk = conversation(name, stock(name), 1, None)
    said = {"hop_ids": talk.hop, "generated": talk.generated}
    with attached(name, prune=router(compresses=True)) as routed:
        full = routed.model(**talk.whole, **said).logits
        for missing in said:
            rest = {key: value for key, value in said.items() if key != missing}
            assert (routed.model(**talk.whole, **rest).logits - full).abs().max() > 1e-3


@pytest.mark.parametrize("executor", ["dense", "physical"])
def test_router_gradients_reach_pruned_positions_in_the_dense_executor_only(executor):
    name = "qwen2_5_vl"
    batch = families.make_inputs(name, stock(name), 3, RAGGED)
    with attached(name, prune=router(), executor=executor) as routed:
        # As many collators do it: a row's first token is a target too, so the padding before it is read.
        targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = routed.model(**batch, labels=targets).loss
        aux = routed.controller.aux
        for keep in aux.values():
            keep.logits.retain_grad()
        loss.backward()
        # Nobody reads what the last layer leaves at a pruned position: its own gate is the only way there.
        for layer in (1, 2):
            keep, gradient = aux[layer], aux[layer].logits.grad
            protected = keep.z.detach() == 1
            free = (gradient != 0) | ~keep.mask
            assert (gradient[keep.mask & free & protected] != 0).any(), "kept positions learn nothing"
            pruned = ~keep.mask & batch["attention_mask"].bool()
            assert (gradient[pruned] != 0).all() == (executor == "dense")
            assert (gradient[~batch["attention_mask"].bool()] == 0).all(), "padding has a say"
        for row in routed.parts.prune.rows.values():
            assert row.weight.grad.abs().max() > 0


class _Shifted(LinearRouter):
    """Its gates of layer 1 are moved by hand, away from 0 and 1."""

    shift: torch.Tensor

    def keep(self, x, tokens, site):
        keep = super().keep(x, tokens, site)
        keep.z = keep.mask.float() + (self.shift if site.layer == 1 else 0)
        return keep


def _half_open(query, key, value, gate, scaling):
    return softmax_times_gate(query, key, value, of_queries(gate), scaling).transpose(1, 2)


@pytest.mark.parametrize("scope", ["skip", "drop"])
def test_the_gradient_of_a_gate_is_its_effect(scope, monkeypatch):
    """Finite differences of half-open gates; under `drop` a gate acts in every layer behind the one that chose."""
    name = "qwen2_5_vl"
    batch = families.make_inputs(name, stock(name), 1)
    pruner = _Shifted(hidden=families.HIDDEN, layers=LAYERS, every=LAYERS, scope=scope, vision_keep=0.5)
    with attached(name, prune=pruner, executor="dense") as routed:

        def loss(shift):
            pruner.shift = shift
            return routed.model(**batch, labels=labels(batch)).loss

        origin = torch.zeros(1, batch["input_ids"].shape[1], requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(origin), origin)
        mask = routed.controller.aux[1].mask[0]
        monkeypatch.setattr(gated, "attend", _half_open)
        checked = [*torch.nonzero(~mask)[:4, 0].tolist(), *torch.nonzero(mask)[5:8, 0].tolist()]
        for column in checked:
            step = torch.zeros_like(origin)
            step[0, column] = 4e-3
            moved = (loss(step) - loss(-step)) / 8e-3 if mask[column] else (loss(step) - loss(0 * step)) / 4e-3
            assert moved.item() == pytest.approx(gradient[0, column].item(), rel=0.1, abs=2e-4), column
        assert gradient[0, checked].abs().max() > 5e-3
        if scope == "drop":  # half open, a gate lets half of every later layer's update through as well
            pruner.shift = 0.5 * torch.nn.functional.one_hot(torch.tensor([checked[0]]), origin.shape[1])
            states = routed.model(**batch, output_hidden_states=True).hidden_states
            assert all((states[i + 1] - states[i])[0, checked[0]].abs().max() > 1e-3 for i in (1, 2))


def test_written_positions_learn_from_what_later_hops_lose():
    name = "qwen2_5_vl"
    talk = conversation(name, stock(name), 3, RAGGED)
    first = talk.generated & (talk.hop == 1)
    last = talk.generated & (talk.hop == 2)
    for compresses in (True, False):
        with attached(name, prune=router(compresses=compresses), executor="dense") as routed:
            loss = routed.model(
                **talk.whole, labels=labels(talk.whole), hop_ids=talk.hop, generated=talk.generated
            ).loss
            keep = routed.controller.aux[2]
            keep.logits.retain_grad()
            loss.backward()
            free = first & (keep.logits.grad != 0)
            assert bool(free.any()) == compresses
            assert (keep.logits.grad[last] == 0).all(), "the last hop never closes"


def test_losses_of_the_pruner_reach_the_trainer():
    name = "qwen2_5_vl"
    with attached(name, prune=router()) as routed:
        routed.model(**families.make_inputs(name, stock(name)))
        losses = [keep.losses["mean"] for keep in routed.controller.aux.values()]
        assert len(losses) == 3
        sum(losses).backward()
        assert routed.parts.prune.rows["1"].bias.grad.abs() > 0


@pytest.mark.parametrize("executor", ["dense", "physical"])
@pytest.mark.parametrize("name", families.EACH)
def test_collators_may_pad_on_the_right(name, executor):
    """Training batches are padded behind their rows, generation batches before them."""
    left = families.make_inputs(name, stock(name), 3, RAGGED)
    right = dict(left)
    for key in {"input_ids", "attention_mask", "mm_token_type_ids"} & left.keys():
        right[key] = torch.stack([row.roll(-pad) for row, pad in zip(left[key], RAGGED, strict=True)])
    family = backbones.of(stock(name))
    found = []
    for batch in (left, right):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        places = family.positions(stock(name), ids, mask, batch.get("image_grid_thw"))
        with attached(name, prune=router(), executor=executor) as routed:
            logits = routed.model(**batch, position_ids=places).logits[mask.bool()]
            logits.square().mean().backward()
            found.append((logits, backbone_gradients(routed.model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-5)
    assert relative(found[1][1], found[0][1]) < 1e-5


@pytest.mark.parametrize("executor", ["dense", "physical"])
def test_bfloat16_trains_with_float32_routers(executor):
    model = copy.deepcopy(stock("qwen2_5_vl")).bfloat16().train()
    batch = families.make_inputs("qwen2_5_vl", model, 3, RAGGED)
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    routed = mmroute.attach(model, prune=router(), executor=executor)
    loss = model(**batch, labels=labels(batch)).loss
    loss.backward()
    assert loss.isfinite()
    assert {p.dtype for p in routed.parts.parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(row.weight.grad.abs().max() > 0 for row in routed.parts.prune.rows.values())
    with attached("qwen2_5_vl", prune=router(), executor=executor) as exact:
        wanted = exact.model(**families.make_inputs("qwen2_5_vl", model, 3, RAGGED), labels=labels(batch)).loss
        assert exact.trace.calls[0].layers[-1].ran == routed.trace.calls[0].layers[-1].ran
    assert abs(loss.item() - wanted.item()) < 0.1


def test_mixed_precision_trains_too():
    batch = families.make_inputs("qwen2_5_vl", stock("qwen2_5_vl"), 3, RAGGED)
    for executor in ("dense", "physical"):
        with attached("qwen2_5_vl", prune=router(), executor=executor) as routed:
            wanted = routed.model(**batch, labels=labels(batch)).loss.item()
            with torch.autocast("cpu", torch.bfloat16):
                loss = routed.model(**batch, labels=labels(batch)).loss
            loss.backward()
            assert abs(loss.item() - wanted) < 0.1
            assert all(p.grad.isfinite().all() for p in routed.parts.parameters())
