"""Compiled layers give what stock layers give, in one graph, and no way of compiling gets around the routing."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import families
import pytest
import torch
from cases import Case, grid
from compiling import GREEDY, Graphs
from routing import distance

import mmroute
from mmroute import hub
from mmroute.errors import UnsupportedCall

ROOT = Path(__file__).parents[2]


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


@pytest.mark.slow
def test_graphs_are_few_in_a_fresh_process() -> None:
    file, clean = (
        Path(__file__).with_name("graph_counts.py"),
        {k: v for k, v in os.environ.items() if "PYTEST" not in k},
    )
    run = subprocess.run([sys.executable, "-m", "pytest", file], env=clean, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


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
