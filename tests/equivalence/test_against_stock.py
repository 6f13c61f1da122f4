"""Attached and routing nothing, or keeping everything, is the stock model; detached it is the stock model again."""

import copy

import pytest
import routing
import torch
from cases import LAYERS, Case, grid
from routing import distance

import mmroute
from mmroute.deepen.none import Nothing
from mmroute.deepen.uniform import Uniform
from mmroute.prune.none import NoPruning

GREEDY = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
BEAMS = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}


@grid()
def test_routing_nothing_is_stock_bit_for_bit(case: Case) -> None:
    batch = case.prompt
    stock = case.model(**batch).logits
    greedy = case.model.generate(**batch, **GREEDY)
    with case.attached(NoPruning(), Nothing()) as routed:
        assert torch.equal(routed.model(**batch).logits, stock)
        out = routed.generate(**batch, **GREEDY)
        assert torch.equal(out.sequences, greedy.sequences)
        assert all(torch.equal(a, b) for a, b in zip(out.logits, greedy.logits, strict=True))


@grid()
def test_keeping_everything_in_the_executor_is_stock(case: Case) -> None:
    batch = case.prompt
    stock = case.model.generate(**batch, **GREEDY)
    beams = case.model.generate(**batch, **BEAMS)
    with case.attached(strip_padding=True) as routed:
        out = routed.generate(**batch, **GREEDY)
        assert torch.equal(routed.generate(**batch, **BEAMS), beams)
    tolerance = 1e-5 if case.rows == "padded" else 0
    assert torch.equal(out.sequences, stock.sequences)
    assert max(distance(a, b) for a, b in zip(out.logits, stock.logits, strict=True)) <= tolerance
    valid = [int(n) for n in batch["attention_mask"].sum(1)]
    assert out.past_key_values.lengths() == [[n + 5 for n in valid]] * LAYERS  # padding is never stored


@grid(attn=("sdpa",), rows=("padded",))
def test_detaching_leaves_no_trace(case: Case) -> None:
    model = copy.deepcopy(case.model)
    batch, text = case.prompt, case.family.text_model(model)

    def look() -> tuple:
        modules = [model, model.model, text, *text.layers]
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules]
        keys = [sorted(m.__dict__) for m in modules]
        return hooks, keys, list(model.state_dict()), [n for n, _ in model.named_modules()], dict(vars(text.config))

    before, logits = look(), model(**batch).logits
    routed = mmroute.attach(model, prune=routing.Constant())
    assert look() != before
    assert not torch.equal(model(**batch).logits, logits)
    routed.detach()
    assert look() == before
    assert torch.equal(model(**batch).logits, logits)
    mmroute.attach(model, prune=routing.Constant())
    mmroute.detach(model)
    assert look() == before


@grid(attn=("sdpa",), rows=("padded",))
def test_off_is_the_stock_model_for_one_block_and_one_model(case: Case) -> None:
    batch = case.prompt
    stock = case.model(**batch)
    other = copy.deepcopy(case.model)
    with case.attached(routing.Constant()) as routed, mmroute.attach(other, prune=routing.Constant()):
        cut = routed.model(**batch)
        with routed.off() as model:
            out = model(**batch)
            assert torch.equal(out.logits, stock.logits)
            assert type(out.past_key_values) is type(stock.past_key_values)
            assert not torch.equal(other(**batch).logits, stock.logits)  # another attached model goes on routing
        assert torch.equal(routed.model(**batch).logits, cut.logits)


@grid(attn=("eager",), rows=("one", "padded"))
@pytest.mark.parametrize("deepen", [False, True])
def test_hidden_states_and_attentions_keep_their_shape_of_stock(case: Case, deepen: bool) -> None:
    batch = case.prompt
    stock = case.model(**batch, output_hidden_states=True, output_attentions=True)
    with case.attached(routing.Constant(), Uniform(deepen_tokens=3) if deepen else None) as routed:
        out = routed.model(**batch, output_hidden_states=True, output_attentions=True)
        again = routed.model(**batch, output_hidden_states=True, use_cache=False)
    assert [h.shape for h in out.hidden_states] == [h.shape for h in stock.hidden_states]
    assert torch.equal(out.hidden_states[0], stock.hidden_states[0])
    assert (
        distance(out.hidden_states[1], out.hidden_states[2]) > 1e-3
    )  # the second layer did not write into the first's
    # Of kept positions only, first passes only; rows that run packed have no common map to return.
    assert len(out.attentions) == (LAYERS if case.rows == "one" else 0)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, again.hidden_states, strict=True))


@grid(attn=("sdpa",), rows=("one", "padded"))
def test_a_stream_that_somebody_may_keep_is_not_written_again(case: Case) -> None:
    """Kept rows are written back in place only while nobody can hold what a layer returned."""
    batch = case.prompt
    with case.attached(routing.Constant()) as routed:
        unseen = routed.model(**batch).logits
        entered: list[torch.Tensor] = []
        for layer in routed.family.text_model(routed.model).layers:
            layer.register_forward_pre_hook(lambda _, args, kwargs: entered.append(args[0]), with_kwargs=True)
        seen = routed.model(**batch).logits
        with torch.enable_grad():  # a graph holds what it is made of, so here nothing is ever written in place
            routed.model(**batch)
    ours, want = entered[:LAYERS], entered[LAYERS:]
    assert torch.equal(seen, unseen)
    assert all(distance(a, b) < 1e-5 for a, b in zip(ours, want, strict=True))
    assert distance(ours[1], ours[2]) > 1e-3  # they would be one tensor
