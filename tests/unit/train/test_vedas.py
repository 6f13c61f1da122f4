"""The trainer of latents: stages, resuming, what is trained, and what is saved."""

import dataclasses
import json

import pytest
import torch
from latent_runs import DEPTH, VEDAS, recipe
from safetensors.torch import load_file

from mmroute import recipe as recipes
from mmroute.bench.items import load_task
from mmroute.engine.saving import from_pretrained
from mmroute.errors import CheckpointMismatch, ConfigError, InputError
from mmroute.recipe import equip
from mmroute.train.curriculum import read_recipe
from mmroute.train.delta import tuned
from mmroute.train.examples import IGNORED
from mmroute.train.vedas import VedasRun, train_vedas


def test_what_is_trained_is_listed_by_name(model, tmp_path):
    with VedasRun(recipe(deepen=DEPTH, backbone="frozen"), model, tmp_path / "a") as run:
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert names == {
            f"mmroute.deepen.{n}" for i in (1, 3) for n in (f"router.{i}.weight", f"router.{i}.bias", f"scale.{i}")
        }
        assert run.learners.backbone is None
    with VedasRun(recipe(), model, tmp_path / "b"):
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        text = {n for n, _ in model.named_parameters() if n.startswith("model.language_model.")}
        assert names == text
    with VedasRun(recipe(backbone="lora", lora_rank=2), model, tmp_path / "c"):
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        assert len(names) == 4 * 7 * 2
        assert all("lora_" in n and "language_model.layers" in n for n in names)
    assert not any("lora" in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("think", [VEDAS, {"name": "pause", "num_latents": 6}])
def test_a_killed_run_goes_on_with_the_same_losses_and_leaves_the_model_alone(model, tmp_path, think):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    given = recipe(think, deepen=DEPTH, recon_weight=0.1)
    train_vedas(given, model, tmp_path / "whole")
    with VedasRun(given, model, tmp_path / "killed") as run:
        run.train(stop_after=5)  # the state is that of step 4
    train_vedas(given, model, tmp_path / "killed", resume=True)
    logs = [(tmp_path / d / "log.jsonl").read_text().splitlines() for d in ("whole", "killed")]
    entries = [[{k: v for k, v in json.loads(line).items() if k != "cpu_s"} for line in log] for log in logs]
    assert entries[0] == entries[1]
    assert [e["stage"] for e in entries[0] if "stage" in e] == ["written"] * 2 + ["one"] * 2 + ["all"] * 2
    for name in ("mmroute.safetensors", "backbone.safetensors"):
        one, other = (load_file(tmp_path / d / "latent" / name) for d in ("whole", "killed"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with pytest.raises(InputError, match="holds a run already"):
        train_vedas(given, model, tmp_path / "whole")
    with pytest.raises(ConfigError, match="another recipe"):
        train_vedas(recipe(think), model, tmp_path / "whole", resume=True)


def test_what_was_trained_answers_as_the_trainer_saw_it(model, tmp_path):
    given = recipe(deepen=DEPTH, stages=[{"name": "all", "steps": 3, "supervise": [[0, 1.0]], "muon": 0.01}])
    with VedasRun(given, model, tmp_path / "run") as run:
        run.train()
        folder = run.write({})
        task = run.tasks["arrows:nano"]
        drawn = [(task, task.spec("val", i)) for i in range(6)]
        model.eval()
        with torch.no_grad():
            replaced = [len(g) for g in run.teacher.lesson(drawn, "latent").groups]
            batch = run.teacher.lesson(drawn, "latent")
            _, H, labels = run.passes.chunks(batch, replaced, replaced, training=False)
            want = run.passes.head(H)[:, 0].argmax(-1).tolist()
    used = dataclasses.replace(given, trained=str(folder), train=None)
    with equip(model, used) as (routed, think):
        for (_, spec), steps, word in zip(drawn, replaced, want, strict=True):
            object.__setattr__(think.config, "num_latents", steps)
            object.__setattr__(think.config, "stop", "fixed")
            answer = routed.answer_many([task.messages(task.sample(spec), "latent")], max_new_tokens=1)[0]
            assert answer.ids == [word]
            assert answer.latents == steps
            assert answer.ar_steps == steps + 1
    assert (labels != IGNORED).sum(1).tolist() == [3] * 6


def test_replay_is_added_to_latents_that_an_earlier_run_taught(model, tmp_path):
    plain = {"name": "coconut", "num_latents": 6, "stop": "head"}
    folder = train_vedas(recipe(plain, DEPTH), model, tmp_path / "first")
    stock = {n: p.clone() for n, p in model.named_parameters()}
    with VedasRun(recipe(VEDAS, DEPTH, start=str(folder)), model, tmp_path / "second") as run:
        saved, moved = load_file(folder / "mmroute.safetensors"), load_file(folder / "backbone.safetensors")
        parts, now = run.routed.parts.state_dict(), dict(model.named_parameters())
        assert saved and all(torch.equal(parts[n], value) for n, value in saved.items())
        assert moved and all(torch.equal(now[n], value.float()) for n, value in moved.items())
        run.train()
        run.write({})
    assert all(torch.equal(stock[n], p) for n, p in model.named_parameters())
    for given, error, message in (
        (recipe(VEDAS, DEPTH, start=str(folder), backbone="lora"), ConfigError, "full or frozen"),
        (recipe(VEDAS, start=str(folder)), CheckpointMismatch, "deepen"),
        (recipe(VEDAS, DEPTH, start="nowhere"), ConfigError, "no routers in 'nowhere'"),
    ):
        with pytest.raises(error, match=message):
            VedasRun(given, model, tmp_path / "third")
        assert all(torch.equal(stock[n], p) for n, p in model.named_parameters())


def test_gates_end_a_stage_early_or_the_whole_run(model, tmp_path):
    easy = [
        {"name": "a", "steps": 9, "until": 0.0, "latents": 0},
        {"name": "b", "steps": 2, "until": 1.0, "on_cap": "stop"},
        {"name": "c", "steps": 5},
    ]
    with VedasRun(recipe(stages=easy, gate_every=2), model, tmp_path / "a") as run:
        progress = run.train()
    assert (progress.step, progress.finished) == (4, True)
    log = [json.loads(line) for line in (tmp_path / "a/log.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in log if "stage" in e] == ["a", "a", "b", "b"]
    assert log[-1] == {"step": 4, "stopped": "b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"think": {"name": "text"}}, r"training latents needs think\.name coconut, ivtlr, vedas or pause"),
        ({"tasks": {"nowhere": 1}}, "no task named 'nowhere'"),
        ({"latent_grad": "half"}, r"latent_grad: .*pattern"),
        ({"stages": [{"name": "x"}]}, "stage x: give either steps or epochs"),
        ({"stages": [{"name": "x", "epochs": 2}]}, "epoch_items with the latter"),
    ],
)
def test_a_recipe_that_cannot_be_trained_says_why(model, tmp_path, changes, message):
    think = changes.pop("think", None)
    with pytest.raises(ConfigError, match=message):
        VedasRun(recipe(think, **changes), model, tmp_path / "x")


def test_epochs_are_counted_in_items(model, tmp_path):
    with VedasRun(recipe(stages=[{"name": "x", "epochs": 1.5}], epoch_items=10), model, tmp_path / "a") as run:
        assert run.lengths == [4]  # 15 items of 4


@pytest.mark.parametrize("name", ["latent", "latent-depth", "vedas", "coconut", "ivtlr", "pause"])
def test_a_shipped_training_recipe_trains_what_the_run_recipe_runs(name):
    trains, runs = read_recipe(name), recipes.read(name)
    assert (trains.think, trains.deepen, trains.prune) == (runs.think, runs.deepen, runs.prune)
    assert runs.trained == name
    assert trains.name == name
    assert read_recipe(name, ["train.tasks={maze: 1}"]).train["tasks"] == {"maze": 1}
    assert read_recipe(name, ["train.stages.0.steps=7"]).train["stages"][0]["steps"] == 7


@pytest.mark.parametrize(
    ("name", "against", "changed"),
    [
        ("sft-direct", "latent", {"think", "latents_per_group", "stages"}),
        ("sft-cot", "latent", {"think", "stages"}),
        ("random-depth", "latent-depth", {"deepen"}),
        ("random-patches", "vedas", {"think"}),
    ],
)
def test_a_control_differs_in_what_it_controls_and_takes_as_many_steps(name, against, changed):
    control, real = (dataclasses.asdict(read_recipe(each)) for each in (name, against))
    ours, theirs = ({**each, **each.pop("train"), "name": "", "train": None} for each in (control, real))
    assert {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)} == changed
    assert sum(s["steps"] for s in ours["stages"]) == sum(s["steps"] for s in theirs["stages"])


def test_the_trained_way_to_think_comes_back_with_the_parts(model, tmp_path, caplog):
    think = {"name": "pause", "num_latents": 5, "stop": "head"}
    given = recipe(think, stages=[{"name": "all", "steps": 1}])
    folder = train_vedas(given, model, tmp_path / "run")
    placeholders = load_file(folder / "mmroute.safetensors")["think.placeholders"]
    with tuned(model, folder), from_pretrained(folder, base=model) as routed:
        assert routed.think.config.num_latents == 5
        assert torch.equal(routed.think.learned.placeholders, placeholders)
        task = load_task("arrows:nano")
        answer = routed.answer_many([task.messages(task.sample(task.spec("val", 0)), "latent")])[0]
        assert answer.latents >= 1
    text = dataclasses.replace(given, think={"name": "text"}, trained=str(folder))
    with equip(model, text) as (routed, other):
        assert other.style == "cot", "the same weights, another way to think"
        assert routed.parts.think is None
    longer = dataclasses.replace(given, think={"name": "coconut", "num_latents": 7}, trained=str(folder))
    with pytest.raises(CheckpointMismatch, match=r"think\.scale"), equip(model, longer):
        pass
    coconut = train_vedas(recipe({"name": "coconut", "num_latents": 6}, stages=[{"name": "all", "steps": 1}]), model,
                          tmp_path / "other")  # fmt: skip
    fewer = dataclasses.replace(given, think={"name": "coconut", "num_latents": 2}, trained=str(coconut))
    with caplog.at_level("WARNING"), equip(model, fewer):
        assert "was trained with 6 latent steps, this run takes 2" in caplog.text
