"""Compiled layers give what stock layers give, in one graph, and no way of compiling gets around the routing."""

import copy
import shutil
from collections.abc import Iterator
from typing import Any

import families
import pytest
import torch
from cases import Case, grid
from routing import distance, play

import mmroute
from mmroute import hub
from mmroute.errors import UnsupportedCall

GREEDY = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


class Graphs:
    """A backend that runs each graph as it was captured, and counts them: no compiler is needed to see what it gets."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return graph.forward


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


@grid(rows=("one", "padded"))
@pytest.mark.slow  # what the families' layers share is in the tests below; tracing costs seconds a model
def test_compiled_layers_equal_stock_layers(case: Case, graphs: Graphs) -> None:
    prune = hub.load("prune", "random", vision_keep=0.4, text_keep=0.7)
    with case.attached(prune, hub.load("deepen", "uniform", deepen_tokens=3)) as routed:
        want = routed.generate(**case.prompt, **GREEDY)
        routed.compile(graphs)
        out = routed.generate(**case.prompt, **GREEDY)
    assert graphs.count > 0
    assert torch.equal(out.sequences, want.sequences)
    assert max(distance(a, b) for a, b in zip(out.logits, want.logits, strict=True)) < 1e-5
    assert out.past_key_values.lengths() == want.past_key_values.lengths()


# Alone, and behind any file that was tried, these two hold; once, late in a whole run, there was a graph a layer.
@pytest.mark.slow
@grid(names=("qwen2_5_vl",), attn=("sdpa",), rows=("one",))
def test_one_graph_serves_all_layers_and_lengths_and_one_more_single_positions(case: Case, graphs: Graphs) -> None:
    prune = hub.load("prune", "random", vision_keep=0.4, text_keep=0.7)
    batches, story = [families.make_inputs(case.name, case.model, after=n) for n in (9, 12, 17)], case.story(tail=3)
    with case.attached(prune) as routed:
        want = [routed.model(**batch).logits for batch in batches]
        told = play(routed.model, story, routed.new_cache()).all
        routed.compile(graphs)
        out = [routed.model(**batch).logits for batch in batches]
        assert graphs.count == 1
        again = play(routed.model, story, routed.new_cache()).all
        assert graphs.count == 2
    assert max(distance(a, b) for a, b in zip([*out, again], [*want, told], strict=True)) < 1e-5


@pytest.mark.slow
@grid(names=("qwen2_5_vl",), attn=("sdpa",), rows=("padded",))
def test_compiled_without_routing_equals_stock(case: Case, graphs: Graphs) -> None:
    stock = case.model.generate(**case.prompt, **GREEDY)
    for prune in (None, hub.load("prune", "random", vision_keep=1.0, text_keep=1.0)):
        with case.attached(prune) as routed:
            routed.compile(graphs)
            out = routed.generate(**case.prompt, **GREEDY)
            assert graphs.count == 2  # the prompt and single positions, whatever is routed
            with routed.off() as model:
                off = model.generate(**case.prompt, **GREEDY)
        assert graphs.count == 2
        assert torch.equal(out.sequences, stock.sequences)
        assert max(distance(a, b) for a, b in zip(out.logits, stock.logits, strict=True)) < 1e-5
        assert all(torch.equal(a, b) for a, b in zip(off.logits, stock.logits, strict=True))


@grid(names=("qwen2_5_vl",), attn=("sdpa",), rows=("padded",))
def test_compiled_layers_record_attention_as_others_do(case: Case, graphs: Graphs) -> None:
    prune = hub.load("prune", "fastv", vision_keep=0.4, start_layer=1)
    with case.attached(prune) as routed:
        want = routed.model(**case.prompt).logits
        routed.compile(graphs)
        assert distance(routed.model(**case.prompt).logits, want) < 1e-5


@pytest.mark.slow
@grid(names=("qwen2_5_vl",), attn=("sdpa",), rows=("one",))
def test_gradients_go_through_stock_layers_and_a_copy_compiles_its_own(case: Case, graphs: Graphs) -> None:
    with case.attached(hub.load("prune", "random", vision_keep=0.4)) as routed:
        routed.compile(graphs)
        want = routed.model(**case.prompt).logits
        twin = copy.deepcopy(routed.model)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(**case.prompt).logits.any()
        count = graphs.count
        with torch.enable_grad():
            logits = routed.model(**case.prompt).logits
            assert logits.requires_grad
        assert distance(logits.detach(), want) < 1e-5
        assert graphs.count == count


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile builds C++ on a CPU")
@pytest.mark.filterwarnings("ignore:.*torch.jit")  # the compiler's own modules
@grid(names=("qwen2_5_vl",), attn=("sdpa",), rows=("padded",))
def test_the_default_compiler_gives_the_same(case: Case, graphs: Graphs) -> None:
    prune = hub.load("prune", "random", vision_keep=0.4, text_keep=0.7)
    with case.attached(prune) as routed:
        want = routed.generate(**case.prompt, **GREEDY)
        routed.compile()
        out = routed.generate(**case.prompt, **GREEDY)
    assert max(distance(a, b) for a, b in zip(out.logits, want.logits, strict=True)) < 1e-5


@pytest.mark.slow  # captures the vision tower, the hooks and every layer
def test_a_model_compiled_as_a_whole_is_routed_all_the_same(graphs: Graphs) -> None:
    """Dynamo does not look for hooks that came after it: what was compiled before must not go on unrouted."""
    model = families.make("llava", layers=1)
    batch = {**families.make_inputs("llava", model, images=0), "use_cache": False}
    stock = model(**batch).logits
    whole = torch.compile(model, backend=graphs, dynamic=True)
    assert distance(whole(**batch).logits, stock) < 1e-5
    with mmroute.attach(model, prune=hub.load("prune", "random", text_keep=0.5)):
        routed = model(**batch).logits
        assert distance(routed, stock) > 0.1
        assert distance(whole(**batch).logits, routed) < 1e-5
    assert distance(whole(**batch).logits, stock) < 1e-5


def test_layers_with_hooks_are_not_compiled() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = families.make("llava", layers=2)
    hooks.add_hook_to_module(model.model.language_model.layers[1].mlp, hooks.ModelHook())
    with mmroute.attach(model) as routed, pytest.raises(UnsupportedCall, match="layer 1 carries accelerate hooks"):
        routed.compile()
