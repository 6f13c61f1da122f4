"""Traces survive JSON and old files; a full one holds index sets that agree with its counts, alone as in a batch."""

import dataclasses
import json

import numpy as np
import pytest
from page_samples import Forgets, told
from PIL import Image

import mmroute
from mmroute import hub
from mmroute.backbones.images import user_message
from mmroute.errors import ConfigError, InputError
from mmroute.tokens import NUM_MODALITIES
from mmroute.trace import Call, LayerCall, Shape, Trace

SHAPE = Shape(hidden=8, layers=1, heads=2, kv_heads=1, head_dim=4, mlp=16, vocab=32, itemsize=4)


def test_json_gives_back_the_same_trace(tiny_folder):
    trace = told(tiny_folder("qwen2_5_vl"))
    again = Trace.from_json(trace.to_json())
    assert again == trace
    assert trace.story.pictures[0].grid == again.story.pictures[0].grid  # a tuple, not a list
    assert dataclasses.asdict(again) == dataclasses.asdict(trace)


def test_a_trace_of_the_first_format_is_read():
    layer = {"ran": [[2, 3, 0]], "cached": [0], "stored": [5], "again": [], "again_cached": [], "extra_flops": 7}
    call = {"kind": "prefill", "hop": [0], "new": [[2, 4, 0]], "layers": [{**layer, "kept": [[0, 1, 2, 4, 5]]}]}
    old = {
        "schema": "trace/1",
        "shape": dataclasses.asdict(SHAPE),
        "calls": [{**call, "start": 0}],
        "closes": [{"hop": [0], "before": [[5]], "after": [[4]], "at_call": 1}],
        "replayed": [],
        "full": True,
    }
    trace = Trace.from_json(json.dumps(old))
    assert trace.calls == [
        Call("prefill", [0], [[2, 4, 0]], [LayerCall([[2, 3, 0]], [0], [5], extra_flops=7, kept=[[0, 1, 2, 4, 5]])])
    ]
    assert trace.story is None
    assert trace.calls[0].layers[0].scores is None
    assert trace.closes[0].held is None
    assert json.loads(trace.to_json())["schema"] == "trace/2"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"schema": "trace/3"}', ConfigError, "schema 'trace/3' given, this version reads trace/1 and trace/2"),
        ('{"schema": "trace/2", "shape": {}}', InputError, "not a trace"),
        ("[1]", InputError, "not a trace"),
        ("half", InputError, "not a trace"),
        (None, InputError, "no such file; `mmroute ask ... --trace t.json` writes one"),
    ],
)
def test_a_file_that_holds_no_trace_is_named(tmp_path, text, error, message):
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=r"t\.json: ") as said:
        Trace.load(path)
    assert message in str(said.value)


def traced(model, prune, messages, deepen=None, **options):
    with mmroute.attach(model, prune=prune, deepen=deepen, prefix_tokens=0) as routed:
        routed.full_trace = True
        return [a.trace for a in routed.answer_many(messages, max_new_tokens=4, **options)]


@pytest.fixture(scope="module")
def messages():
    noise = np.random.default_rng(3).integers(0, 256, (3, 32, 40, 3), dtype=np.uint8)
    return [user_message("where?" * (1 + i), [Image.fromarray(noise[i])]) for i in range(3)]


@pytest.mark.parametrize(
    "prune",
    [
        ("knorm", {"vision_keep": 0.4, "text_keep": 0.8}),
        ("fastv", {"start_layer": 1, "vision_keep": 0.3}),
        ("snapkv", {}),
        ("schedule", {}),
    ],
    ids=["knorm", "fastv", "snapkv", "schedule"],
)
def test_index_sets_agree_with_counts_and_a_batch_with_its_rows(tiny_folder, messages, prune):
    model = mmroute.load(tiny_folder("qwen2_5_vl"))
    prune = hub.load("prune", prune[0], **prune[1])
    deepen = hub.load("deepen", "uniform", deepen_tokens=2)
    together = traced(model, prune, messages, deepen)
    for trace, one in zip(together, messages, strict=True):
        (alone,) = traced(model, prune, [one], deepen)
        for call, single in zip(trace.calls, alone.calls, strict=True):
            assert (call.ids, call.modality, call.start) == (single.ids, single.modality, single.start)
            kinds = call.modality[0]
            assert [kinds.count(m) for m in range(NUM_MODALITIES)] == call.new[0]
            assert len(call.ids[0]) == len(kinds)
            for layer, same in zip(call.layers, single.layers, strict=True):
                assert (layer.kept, layer.held) == (same.kept, same.held)
                ran = [kinds[c - call.start] for c in layer.kept[0]]
                assert [ran.count(m) for m in range(NUM_MODALITIES)] == layer.ran[0]
                held = layer.kept if layer.held is None else layer.held
                assert set(held[0]) <= set(layer.kept[0])
                assert len(held[0]) == layer.stored[0] - layer.cached[0]
                assert len((layer.redone or [[]])[0]) == sum(layer.again)
                assert set((layer.redone or [[]])[0]) <= set(layer.kept[0])
                if layer.scores is not None:
                    assert len(layer.scores[0]) == len(kinds)
                    a, b = ([s for s in x.scores[0] if s is not None] for x in (layer, same))
                    assert np.allclose(a, b, rtol=2e-3, atol=1e-6)  # four digits are kept
        assert any(layer.scores for layer in trace.calls[0].layers)


def test_without_the_switch_nothing_is_read_off_the_device(tiny_folder, messages):
    model = mmroute.load(tiny_folder("qwen2_5_vl"))
    with mmroute.attach(model, prune=Forgets(vision_keep=0.4)) as routed:
        trace = routed.answer_many(messages[:1], max_new_tokens=2)[0].trace
    assert trace.calls[0].ids is trace.calls[0].modality is None
    assert all(layer.kept is layer.scores is layer.redone is None for layer in trace.calls[0].layers)
