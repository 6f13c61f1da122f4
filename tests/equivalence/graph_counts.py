"""How many graphs compiling takes. `test_compiled.py` runs this file in a process of its own.

Late in a run of everything these tests saw a graph for every layer. Alone, and behind any file that was tried, they do
not: so nothing that another test compiled or imported comes before them.
"""

import families
import torch
from cases import Case, grid
from compiling import GREEDY, Graphs
from routing import distance, play

from mmroute import hub


@grid(names=("qwen2_5_vl",), attn=("sdpa",), rows=("one",))
def test_one_graph_serves_all_layers_and_lengths_and_one_more_single_positions(case: Case) -> None:
    graphs = Graphs()
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


@grid(names=("qwen2_5_vl",), attn=("sdpa",), rows=("padded",))
def test_compiled_without_routing_equals_stock(case: Case) -> None:
    graphs = Graphs()
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
