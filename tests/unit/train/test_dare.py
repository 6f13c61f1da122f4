"""The trainer of routers: both passes agree, a killed run goes on as if it had not been, and what is saved works."""

import copy
import functools
import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

import mmroute
from mmroute import calibrate
from mmroute import recipe as recipes
from mmroute.backbones.load import load
from mmroute.errors import CheckpointMismatch, ConfigError, InputError
from mmroute.prune._gates import Relaxation
from mmroute.tasks._texts import VOCABULARY
from mmroute.tokens import Modality
from mmroute.train.dare import DareRun, train_dare
from mmroute.train.delta import DELTA
from mmroute.train.examples import IGNORED

TRAIN = {
    "tasks": {"frozenlake:nano": 1, "maze:nano": 1},
    "steps": 6,
    "batch": 4,
    "save_every": 2,
    "eval_every": 6,
    "eval_items": 4,
}
PRUNE = {"name": "dare", "first_layer": 1, "cutoff_layer": 3, "vision_keep": 0.5, "text_keep": 0.7}


def recipe(prune=None, **train):
    return recipes.Recipe(name="test", prune={**PRUNE, **(prune or {})}, train={**TRAIN, **train})


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("policy", ["append", "progressive"])
def test_one_pass_and_hop_by_hop_give_the_same_hidden_states(model, tmp_path, policy):
    with DareRun(recipe({"cache_policy": policy, "hard_threshold": 1e-4}), model, tmp_path) as run:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in run.pruner.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
        run.pruner.relax = Relaxation()
        run.pruner.export()
        batch = run.writer.batch(run._drawn(np.random.default_rng(0)))
        run.model.train()
        one = run.passes.at_once(batch)
        run.model.eval()
        with torch.no_grad():
            other = run.passes.hop_by_hop(batch, differentiable=False)
        real = batch.mask.bool()
        torch.testing.assert_close(one[real], other[real], rtol=0, atol=1e-4)
        assert any(c.after != c.before for c in run.routed.trace.closes)
        run.model.train()
        run.pruner.relax = Relaxation(settled=True)
        again = run.passes.hop_by_hop(batch, differentiable=True)
        torch.testing.assert_close(again[real], other[real], rtol=0, atol=1e-4)


def test_the_tiles_shortcut_is_the_processors_pixels(model, tmp_path):
    with DareRun(recipe(tasks={"frozenlake:nano": 1}), model, tmp_path) as run:
        drawn = run._drawn(np.random.default_rng(1))
        short = run.writer.batch(drawn)
        run.writer.small = False
        long = run.writer.batch(drawn)
        assert torch.equal(short.ids, long.ids)
        assert torch.equal(short.positions, long.positions)
        run.model.eval()
        with torch.no_grad():
            one, other = (run.passes.hop_by_hop(b, differentiable=False) for b in (short, long))
    real = short.mask.bool()
    torch.testing.assert_close(one[real], other[real], rtol=0, atol=2e-3)


def test_hops_and_labels_are_those_of_answering(model, tmp_path):
    with DareRun(recipe(), model, tmp_path) as run:
        batch = run.writer.batch(run._drawn(np.random.default_rng(2)))
        words = [VOCABULARY[i] for i in batch.ids[0][batch.generated[0]].tolist()]
        hops = batch.hop[0][batch.generated[0]].tolist()
        begins = [
            i for i, word in enumerate(words) if i and (word == "answer:" or (word[1:].isdigit() and word[0] == "s"))
        ]
        assert [i for i in range(1, len(hops)) if hops[i] != hops[i - 1]] == begins
        assert torch.equal(batch.labels != IGNORED, batch.generated)
        vision = batch.modality == Modality.VISION
        assert (vision.sum(1) == batch.needed.shape[1]).all()
        assert (batch.needed & ~batch.board).sum() == 0


def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(model, tmp_path):
    with DareRun(recipe(), model, tmp_path / "whole") as run:
        run.train()
        wanted = weights(run.model)
        averages = {n: b.clone() for n, b in run.pruner.named_buffers()}
    with DareRun(recipe(), model, tmp_path / "cut") as run:
        run.train(stop_after=3)  # saved at 2
    with pytest.raises(InputError, match="--resume"):
        DareRun(recipe(), model, tmp_path / "cut")
    with DareRun(recipe(), model, tmp_path / "cut", resume=True) as run:
        assert run.progress.step == 2
        run.train()
        assert all(torch.equal(p, wanted[n]) for n, p in run.model.named_parameters())
        assert all(torch.equal(b, averages[n]) for n, b in run.pruner.named_buffers())
    curves = [
        [{k: v for k, v in json.loads(line).items() if k != "cpu_s"} for line in path.read_text().splitlines()]
        for path in (tmp_path / "whole" / "log.jsonl", tmp_path / "cut" / "log.jsonl")
    ]
    assert curves[0] == curves[1]
    assert [entry["stage"] for entry in curves[0] if "stage" in entry] == ["A"] * 3 + ["B"] * 3
    with pytest.raises(ConfigError, match="another recipe"):
        DareRun(recipe(seed=1), model, tmp_path / "cut", resume=True)


def test_stage_b_moves_the_backbone_and_nothing_of_the_router(model, tmp_path):
    with DareRun(recipe(dense_share=0.5), model, tmp_path) as run:
        run.train(stop_after=3)
        routers = {n: p.detach().clone() for n, p in run.pruner.named_parameters()}
        backbone = model.model.language_model.layers[2].mlp.up_proj.weight.detach().clone()
        assert any(p.any() for n, p in routers.items() if n.startswith("router"))
        run.train()
        assert all(torch.equal(p, routers[n]) for n, p in run.pruner.named_parameters())
        assert not torch.equal(model.model.language_model.layers[2].mlp.up_proj.weight, backbone)


@pytest.mark.parametrize("backbone", ["full", "lora"])
def test_the_teacher_is_the_stock_model_with_the_weights_it_came_with(model, tmp_path, backbone):
    if backbone == "lora":
        pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        run = DareRun(recipe(backbone=backbone, teacher_kl=0.5), model, tmp_path)
    with run:
        batch = run.writer.batch(run._drawn(np.random.default_rng(3)))
        teacher = run._unrouted(batch)
        row, real = 1, batch.mask[1].bool()
        with torch.no_grad(), run.routed.off():  # the same row alone, without the gaps between its hops
            alone = model(
                inputs_embeds=batch.inputs["inputs_embeds"][row, real][None],
                attention_mask=batch.mask[row, real][None],
                position_ids=batch.positions[:, row, real][:, None],
            ).logits[0]
        written = (batch.labels[row, real] != IGNORED).nonzero()[:, 0]
        first = int((batch.labels[:row] != IGNORED).sum())
        torch.testing.assert_close(teacher[first : first + len(written)], alone[written - 1], rtol=0, atol=1e-4)
        run.train(stop_after=5)
        moved = run.tuning.weights()
        assert any(not torch.equal(moved[n], p) for n, p in run.tuning.before.items())
        torch.testing.assert_close(run._unrouted(batch), teacher, rtol=0, atol=0)
        now = run.tuning.weights()
        assert all(torch.equal(now[n], p) for n, p in moved.items())
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(entry["teacher_kl"] > 0 for entry in entries[2:5])  # stages A and B


def test_the_teachers_weight_pulls_towards_what_it_says(model, tmp_path):
    apart = []
    for weight in (0.0, 200.0):
        with DareRun(
            recipe(teacher_kl=weight, steps=8, eval_items=1, dense_share=0.0, clip=1e6, warmup=1),
            model,
            tmp_path / str(weight),
        ) as run:
            batch = run.writer.batch(run._drawn(np.random.default_rng(3)))
            run.train()
            with torch.no_grad():
                said = run.passes.logits(run.passes.hop_by_hop(batch, differentiable=False), batch)
                apart.append(float((said.softmax(-1) - run._unrouted(batch).softmax(-1)).abs().sum(-1).mean()))
    assert apart[1] < 0.5 * apart[0]


@pytest.mark.parametrize("carry", [False, True])
def test_distilled_routers_rank_as_the_unrouted_models_attention_does(model, folder, tmp_path, carry):
    with DareRun(recipe({"carry": carry}, init="distill"), model, tmp_path) as run:
        batch = run.writer.batch(run._drawn(np.random.default_rng(5)))
        delimiters = run.routed.controller.delimiters[batch.ids]
        routers = {int(i): copy.deepcopy(r) for i, r in run.pruner.router.items()}
    stock = load(folder, dtype="float32", attention="eager")
    with torch.no_grad():
        seen = stock.model.language_model(
            inputs_embeds=batch.inputs["inputs_embeds"],
            attention_mask=batch.mask,
            position_ids=batch.positions,
            output_attentions=True,
            output_hidden_states=True,
        )
    logits, found = 0.0, []
    for layer in (1, 2, 3):
        x = seen.hidden_states[layer]
        own = routers[layer](x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()).detach()
        logits = own + (logits if carry else 0.0)
        paid = seen.attentions[layer - 1].mean(1)
        for m in (Modality.VISION, Modality.TEXT):
            alike = []
            for row, written in enumerate(batch.generated):
                among = (batch.modality[row] == m) & batch.mask[row].bool() & ~written & ~delimiters[row]
                among[:2] = False  # protected, like delimiters: they do not compete
                received = paid[row, written].mean(0).log()
                alike.append(torch.corrcoef(torch.stack([received[among], logits[row, among, int(m)]]))[0, 1])
            found.append(torch.stack(alike).mean())
    assert min(found) > 0.1
    assert torch.stack(found).mean() > 0.4


@pytest.mark.parametrize("backbone", ["full", "frozen", "lora"])
def test_what_is_written_answers_as_the_run_did_and_the_base_is_as_before(model, tmp_path, backbone):
    before = weights(model)
    run = functools.partial(train_dare, recipe(backbone=backbone), model, tmp_path)
    if backbone == "lora":
        pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        folder = run()
    after = weights(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert (folder / DELTA).is_file() == (backbone != "frozen")
    read = recipes.read(str(folder / "recipe.yaml"))
    assert read.prune == PRUNE
    question = [[{"role": "user", "content": _blocks()}]]
    answers = []
    for trained in (str(folder), None):
        side = recipes.Recipe(name="x", prune=PRUNE, trained=trained)
        with recipes.equip(model, side) as (routed, think):
            answers.append(routed.answer_many(question, think=think, max_new_tokens=6)[0])
            assert routed.controller.pruner.router["2"].weight.any() == (trained is not None)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    results = json.loads((folder / "RESULTS.json").read_text())
    assert set(results["tasks"]) == set(TRAIN["tasks"])


def _blocks():
    task = mmroute.hub.load("tasks", "frozenlake", preset="nano")
    return task.messages(next(iter(task.samples("test", 1))), "cot")[0]["content"]


@pytest.mark.parametrize("name", ["symmetric", "mod"])
def test_the_learned_controls_are_trained_alike(model, tmp_path, name):
    given = {"name": name, **({"keep": 0.6, "first_layer": 1} if name == "symmetric" else {"vision_keep": 0.6})}
    side = recipes.Recipe(name=name, prune=given, train={**TRAIN, "steps": 4, "vision_ramp": (0, 0.1)})
    with DareRun(side, model, tmp_path / "run") as run:
        run.train(stop_after=2)
        routers = {n: p.detach().clone() for n, p in run.pruner.named_parameters()}
        # What vision becomes in the last layer nobody reads, so a router that learns by its gain alone learns nothing.
        learned = {"router.1.weight", "router.2.weight", *(["router.3.weight"] if name == "symmetric" else [])}
        assert {n for n, p in routers.items() if n.endswith("weight") and p.any()} == learned
        batch = run.writer.batch(run._drawn(np.random.default_rng(0)))
        run.model.eval()
        with torch.no_grad():
            one, other = run.passes.at_once(batch), run.passes.hop_by_hop(batch, differentiable=False)
        real = batch.mask.bool()
        torch.testing.assert_close(one[real], other[real], rtol=0, atol=1e-4)
        run.train()
        assert all(torch.equal(p, routers[n]) for n, p in run.pruner.named_parameters())  # stage B
    folder = train_dare(side, model, tmp_path / "whole")
    table = torch.tensor(json.loads((folder / "RESULTS.json").read_text())["rates"])
    assert float(table[Modality.VISION].mean()) == pytest.approx(0.6, abs=1e-3)
    with recipes.equip(model, replace(side, trained=str(folder))) as (routed, _):
        assert routed.controller.pruner.router["2"].weight.any()
    with pytest.raises(ConfigError, match="leave it out"):
        DareRun(replace(side, train={**TRAIN, "init": "distill"}), model, tmp_path / "distilled")


def test_a_recipe_without_a_cutoff_layer_is_trained_at_the_models_cliff(model, tmp_path, monkeypatch):
    given = {k: v for k, v in PRUNE.items() if k != "cutoff_layer"}
    asked = []

    def cliff(model, batches):
        asked.append(sum(len(b.completion) for b in batches))
        return calibrate.Cliff([1.0] * 5, [1.0] * 5, 0.1, 3, asked[0])

    monkeypatch.setattr(calibrate, "measure_cliff", cliff)
    folder = train_dare(recipes.Recipe(name="test", prune=given, train={**TRAIN, "steps": 1}), model, tmp_path)
    assert asked == [64]
    assert recipes.read(str(folder / "recipe.yaml")).prune["cutoff_layer"] == 3


def test_a_control_takes_a_routers_counts(model, tmp_path):
    folder = train_dare(recipe(), model, tmp_path)
    keeps = []
    for scorer in ("router", "random"):
        side = recipes.Recipe(name="x", prune={**PRUNE, "scorer": scorer}, trained=str(folder))
        with recipes.equip(model, side) as (routed, think):
            answer = routed.answer_many([[{"role": "user", "content": _blocks()}]], think=think, max_new_tokens=3)[0]
            keeps.append([layer.ran for layer in answer.trace.calls[0].layers])
    assert keeps[0] == keeps[1]


def test_a_run_begins_where_an_earlier_one_ended(model, tmp_path):
    folder = train_dare(recipe(), model, tmp_path / "first")
    stock = weights(model)
    with DareRun(recipe(start=str(folder)), model, tmp_path / "second") as run:
        saved = safetensors.torch.load_file(folder / "mmroute.safetensors")
        assert all(torch.equal(saved[f"prune.{n}"], p) for n, p in run.pruner.state_dict().items())
        moved = safetensors.torch.load_file(folder / DELTA)
        now = dict(run.model.named_parameters())
        assert moved and all(torch.equal(now[n], value.float()) for n, value in moved.items())
        run.train()
        run.write({})
    assert all(torch.equal(stock[n], p) for n, p in model.named_parameters())
    with pytest.raises(ConfigError, match="give one of them"):
        DareRun(recipe(start=str(folder), init="distill"), model, tmp_path / "third")
    with pytest.raises(ConfigError, match="full or frozen"):
        DareRun(recipe(start=str(folder), backbone="lora"), model, tmp_path / "third")


def test_weights_of_another_base_are_refused(model, folder, tmp_path):
    trained = train_dare(recipe(), model, tmp_path)
    with torch.no_grad():
        model.model.language_model.layers[1].mlp.up_proj.weight.add_(0.5)
    side = recipes.Recipe(name="x", prune=PRUNE, trained=str(trained))
    with pytest.raises(CheckpointMismatch, match="trained on other weights"), recipes.equip(model, side):
        pass


def test_the_printed_form_takes_a_step_with_gradients_in_every_router(model, tmp_path):
    paper = recipes.read("dare-paper")
    given = {**paper.prune, "cutoff_layer": 3}
    train = {**TRAIN, **paper.train, "tasks": TRAIN["tasks"], "backbone": "frozen", "vision_ramp": (0, 0)}
    with DareRun(
        recipes.Recipe(name="paper", prune=given, train={**train, "text_ramp": (0, 0)}), model, tmp_path
    ) as run:
        run.progress.step = 2
        entry = run.step()
        assert entry["loss"] < 100
        assert all(p.any() for n, p in run.pruner.named_parameters() if n.endswith("weight"))


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"prune": {"name": "random"}}, "prune.name dare"),
        ({"prune": {"name": "dare", "vision_keep": 1, "text_keep": 1}}, "no router to train"),
        ({"train": None}, "a section `train`"),
        ({"train": {"tasks": {"maze": 1}, "stepz": 1}}, "stepz: no such option"),
    ],
)
def test_recipes_that_cannot_be_trained_are_named(model, tmp_path, given, fault):
    fields = {"name": "test", "prune": PRUNE, "train": TRAIN, **given}
    with pytest.raises(ConfigError, match=fault):
        DareRun(recipes.Recipe(**fields), model, tmp_path)
