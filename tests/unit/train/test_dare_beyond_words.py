"""DARE where hops hold pictures (Chameleon) or boxes (LLaVA): what training runs is what answering runs, to the end."""

import json

import numpy as np
import pytest
import torch
from dictation import dictated

import mmroute
from mmroute import calibrate, hub
from mmroute import recipe as recipes
from mmroute.prune._gates import Relaxation
from mmroute.tokens import Modality
from mmroute.train import box_model, dare_cliff, picture_model
from mmroute.train.chains import Writer, worlds
from mmroute.train.dare import DareRun, train_dare
from mmroute.train.dare_cliff import cliff_of
from mmroute.train.dare_passes import Passes
from mmroute.train.examples import IGNORED
from mmroute.train.folder import write_stock

WAYS = {
    "image": {
        "tasks": {"frozenlake:nano": 1},
        "task": {"tile_px": 16, "prompt_order": "question_first"},
        "model": (picture_model, {"hidden": 32, "layers": 3, "heads": 2, "mlp": 32}),
    },
    "boxes": {
        "tasks": {"gridspatial:nano": 1},
        "task": {},
        "model": (box_model, {"hidden": 32, "layers": 3, "heads": 2, "kv_heads": 1, "mlp": 32, "vision_hidden": 32}),
    },
}
PRUNE = {"name": "dare", "first_layer": 1, "cutoff_layer": 2, "vision_keep": 0.6, "text_keep": 0.8}
TRAIN = {"steps": 4, "batch": 3, "save_every": 2, "eval_every": 4, "eval_items": 3, "muon": 1e-2}


@pytest.fixture(scope="module", params=WAYS)
def way(request):
    return request.param


@pytest.fixture(scope="module")
def model(way, tmp_path_factory):
    kind, shape = WAYS[way]["model"]
    folder = tmp_path_factory.mktemp(way) / "model"
    write_stock(folder, kind.build(kind.Shape(**shape), 4, 0), kind.make_processor(4), "x: 1\n", {})
    return mmroute.load(folder, dtype="float32")


def recipe(way, prune=None, **train):
    given = {key: WAYS[way][key] for key in ("tasks", "task")}
    return recipes.Recipe(
        name="test", prune={**PRUNE, **(prune or {})}, think={"name": way}, train={**TRAIN, **given, **train}
    )


def shake(pruner):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in pruner.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    pruner.export()


@pytest.mark.parametrize("policy", ["append", "progressive"])
def test_one_pass_and_hop_by_hop_give_the_same_hidden_states(way, model, tmp_path, policy):
    with DareRun(recipe(way, {"cache_policy": policy, "hard_threshold": 1e-4}), model, tmp_path) as run:
        run.pruner.relax = Relaxation()
        shake(run.pruner)
        batch = run.writer.batch(run._drawn(np.random.default_rng(0)))
        run.model.train()
        one = run.passes.at_once(batch)
        run.model.eval()
        with torch.no_grad():
            other = run.passes.hop_by_hop(batch, differentiable=False)
        real = batch.mask.bool()
        torch.testing.assert_close(one[real], other[real], rtol=0, atol=1e-4)
        assert any(c.after != c.before for c in run.routed.trace.closes)


@torch.no_grad()
def test_training_hears_of_each_word_what_answering_chooses_from(way, model, monkeypatch):
    """Three rows of different lengths, routed and closed: the teacher-forced pass is the library's own answer."""
    pruner, think = hub.load("prune", **{**PRUNE, "name": "dare", "variant": "lh"}), hub.load("think", way)
    (task,) = worlds(WAYS[way]["tasks"], WAYS[way]["task"]).values()
    specs = [task.spec("val", i) for i in (0, 5, 9)]
    with mmroute.attach(model, prune=pruner) as routed:
        shake(pruner)
        batch = Writer(routed, think).batch([(task, spec) for spec in specs])
        passes = Passes(routed, pruner)
        said = passes.logits(passes.hop_by_hop(batch, differentiable=False), batch)
        learned = batch.labels != IGNORED
        scripts = [row[mask].tolist() for row, mask in zip(batch.labels, learned, strict=True)]
        by_row = said.split([len(script) for script in scripts])
        chats = [task.messages(task.sample(spec), think.style) for spec in specs]
        with dictated(monkeypatch, scripts) as seen:
            answers = routed.answer_many(chats, think=think, max_new_tokens=max(map(len, scripts)))
    assert len({len(script) for script in scripts}) > 1
    for row, heard, answer, script in zip(by_row, seen, answers, scripts, strict=True):
        assert answer.ids == script
        may = torch.stack(heard) > torch.finfo(torch.float32).min
        torch.testing.assert_close(torch.stack(heard)[may], row[may], rtol=0, atol=1e-4)
        assert answer.pictures if way == "image" else answer.boxes
    assert any(close.before != close.after for close in answers[0].trace.closes)
    assert all(task.score(task.sample(s), a.text).correct == 1 for s, a in zip(specs, answers, strict=True))


def test_what_a_batch_calls_written_and_given(way, model, tmp_path):
    with DareRun(recipe(way), model, tmp_path) as run:
        drawn = run._drawn(np.random.default_rng(2))
        batch = run.writer.batch(drawn)
        vision = batch.modality == Modality.VISION
        for b, (task, spec) in enumerate(drawn):
            hops = len(task.trace(spec)) - 1
            assert int((vision & (batch.hop == 0))[b].sum()) == 16
            thoughts = vision[b] & (batch.hop[b] > 0)
            assert int(thoughts.sum()) == hops * (16 if way == "image" else 1)
            assert (batch.generated[b][thoughts] == (way == "image")).all(), "pictures are written, features are given"
        assert torch.equal(batch.labels != IGNORED, batch.generated)
        assert batch.needed.shape == (3, 16)
        look = run.look(3)
        (found,) = look.values()
        assert len(found["needed_recall"]) == 3
        assert found["vision"][0] == 1.0


def test_training_ends_in_routers_that_a_recipe_takes(way, model, tmp_path):
    stock = {n: p.detach().clone() for n, p in model.named_parameters()}
    folder = train_dare(recipe(way, vision_ramp=(0.0, 0.5), text_ramp=(0.0, 0.5)), model, tmp_path)
    assert all(torch.equal(stock[n], p) for n, p in model.named_parameters())
    results = json.loads((folder / "RESULTS.json").read_text())
    assert results["steps"] == 4
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {entry["stage"] for entry in log if "stage" in entry} == {"A", "B"}
    side = recipes.read(str(folder / "recipe.yaml"), [f"trained={folder}"])
    (task,) = worlds(side.train["tasks"], side.train["task"]).values()
    sample = next(iter(task.samples("test", 1)))
    with recipes.equip(model, side) as (routed, think):
        answer = routed.answer_many([task.messages(sample, think.style)], think=think, max_new_tokens=40)[0]
    ran = [layer.ran[0] for layer in answer.trace.calls[0].layers]
    assert ran[0][Modality.VISION] == 16
    assert ran[2][Modality.VISION] < 16


def test_the_cliff_is_found_on_the_chains_that_it_writes(way, model, monkeypatch):
    monkeypatch.setattr(dare_cliff, "_ITEMS", 12)
    think = hub.load("think", way)
    tasks = worlds(WAYS[way]["tasks"], WAYS[way]["task"])
    cliff = cliff_of(model, think, tasks)
    assert cliff.num_items == 12
    assert len(cliff.nll) == 4
    assert 0 <= cliff.cutoff_layer <= 3
    layers = mmroute.backbones.of(model).text_model(model).layers
    kept = [layer.self_attn.o_proj.weight.detach().clone() for layer in layers[1:]]
    with torch.no_grad():
        for layer in layers[1:]:
            layer.self_attn.o_proj.weight.zero_()  # these read nothing any more
    try:
        assert cliff_of(model, think, tasks).cutoff_layer <= 1
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers[1:], kept, strict=True):
                layer.self_attn.o_proj.weight.copy_(weight)
    assert calibrate.num_layers(model) == 3
