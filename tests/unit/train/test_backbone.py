"""A training run can be killed anywhere, never half-writes, and its folder opens with plain Auto classes."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mmroute import hub
from mmroute.errors import CheckpointMismatch, ConfigError, InputError, MmrouteError
from mmroute.tasks._texts import EOS, VOCABULARY
from mmroute.train.backbone import Run
from mmroute.train.decode import greedy, right
from mmroute.train.examples import IGNORED, collate, item, on_canvas
from mmroute.train.folder import make_tokenizer, write_folder
from mmroute.train.recipe import SHIPPED, at, load_recipe, merge
from mmroute.train.scratch import family_of
from mmroute.train.small_model import Shape
from mmroute.train.stream import Stream

SMALL = {
    "preset": "nano",
    "tasks": ["frozenlake", "maze"],
    "model": {
        "hidden": 32,
        "layers": 2,
        "heads": 1,
        "kv_heads": 1,
        "mrope_section": [4, 6, 6],
        "mlp": 32,
        "vision_hidden": 16,
        "vision_mlp": 16,
    },
    "place_layer": 1,
    "save_every": 2,
    "eval_every": 3,
    "eval_items": 4,
    "exam_items": 8,
    "exam_blank": 4,
    "phases": [
        {"name": "read", "steps": 4, "batch": 3, "probe": [[0, 1]], "place": [[0, 1]]},
        {"name": "chain", "steps": 3, "batch": 3},
    ],
}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL))  # JSON is YAML
    return load_recipe(str(path), {})


def losses(folder: Path) -> list[dict]:
    """The log without what differs from run to run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "cpu_s"} for line in lines]


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_a_killed_and_resumed_run_is_an_uninterrupted_one_bit_for_bit(recipe, tmp_path, killed_at):
    whole = Run(recipe, tmp_path / "whole")
    whole.train()
    Run(recipe, tmp_path / "cut").train(stop_after=killed_at)
    resumed = Run(recipe, tmp_path / "cut", resume=True)
    resumed.train()
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert len([e for e in losses(tmp_path / "cut") if "loss" in e]) == 7


def test_another_recipe_or_no_resume_does_not_touch_a_run(recipe, tmp_path):
    Run(recipe, tmp_path / "run").train(stop_after=2)
    with pytest.raises(InputError, match="--resume"):
        Run(recipe, tmp_path / "run")
    other = load_recipe(str(tmp_path / "small.yaml"), {"seed": 5})
    with pytest.raises(ConfigError, match="another recipe"):
        Run(other, tmp_path / "run", resume=True)


def test_a_state_that_is_not_ours_is_told_from_one_that_is(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointMismatch, match="without --resume"):
        Run(recipe, tmp_path / "run", resume=True)


def test_a_full_disk_leaves_the_last_state_and_one_message(recipe, tmp_path, monkeypatch):
    out = tmp_path / "run"
    Run(recipe, out).train(stop_after=2)
    before = (out / "state.safetensors").read_bytes()

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = Run(recipe, out, resume=True)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MmrouteError, match=r"disk is full.*--resume"):
        run.train()
    assert (out / "state.safetensors").read_bytes() == before
    assert sorted(p.name for p in out.iterdir()) == ["log.jsonl", "state.safetensors"]


def test_a_full_disk_leaves_the_checkpoint_folder_as_it_was(recipe, tmp_path, monkeypatch):
    run = Run(recipe, tmp_path / "run")
    write_folder(tmp_path / "model", run.model, "a: 1\n", {"old": True})

    def full(*_args, **_kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("mmroute.train.folder.save_file", full)
    with pytest.raises(MmrouteError, match="disk is full"):
        write_folder(tmp_path / "model", run.model, "a: 2\n", {"old": False})
    assert json.loads((tmp_path / "model" / "RESULTS.json").read_text()) == {"old": True}
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".model")] == []


def test_the_folder_opens_with_auto_classes_and_holds_the_trained_weights(recipe, tmp_path):
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    run = Run(recipe, tmp_path / "run")
    write_folder(tmp_path / "model", run.model, "a: 1\n", {})
    opened = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    for name, parameter in run.model.named_parameters():
        assert torch.equal(opened.get_parameter(name), parameter.to(torch.bfloat16)), name
    assert opened.lm_head.weight.data_ptr() == opened.model.language_model.embed_tokens.weight.data_ptr()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    task = run.tasks["maze"]
    picture = task.draw(task.spec("test", 0))
    assert processor(picture, return_tensors="pt")["image_grid_thw"].tolist() == [[1, 8, 8]]  # never resized
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    words = task.words(task.spec("test", 0), "cot").response
    assert tokenizer(" ".join(words))["input_ids"] == [VOCABULARY.index(word) for word in words]
    assert tokenizer.padding_side == "left"


def test_the_chat_template_prints_the_words_the_model_was_trained_on(recipe, tmp_path):
    run = Run(recipe, tmp_path / "run")
    write_folder(tmp_path / "model", run.model, "a: 1\n", {})
    tokenizer = make_tokenizer()
    template = (tmp_path / "model" / "chat_template.jinja").read_text()
    for task in run.tasks.values():
        sample = task.sample(task.spec("test", 0))
        text = tokenizer.apply_chat_template(task.messages(sample, "cot"), chat_template=template, tokenize=False)
        ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 16))["input_ids"]
        assert [VOCABULARY[i] for i in ids] == task.words(task.spec("test", 0), "cot").prompt


@torch.no_grad()
def test_batched_greedy_chains_are_those_of_stock_generate(recipe, tmp_path):
    run = Run(recipe, tmp_path / "run")
    task = run.tasks["frozenlake"]
    specs = [task.stream(np.random.default_rng(i), 3, 2) for i in range(3)]
    batch = collate([item(task, spec, "cot") for spec in specs], run.index, answer=False)
    ours = greedy(run.model, batch, run.atlas, max_new=12)
    tiles = run.atlas[batch.tiles].view(3, 4, 4, 28, 28, 3).permute(0, 1, 3, 2, 4, 5).reshape(3, 112, 112, 3)
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 784 * 256})
    processed = processor([t.numpy().astype(np.uint8) for t in tiles], return_tensors="pt")
    stock = run.model.generate(
        input_ids=batch.ids,
        attention_mask=torch.ones_like(batch.ids),
        mm_token_type_ids=(batch.ids == run.index["<|image_pad|>"]).int(),
        max_new_tokens=12,
        do_sample=False,
        **processed,
    )[:, batch.ids.shape[1] :]
    for row, theirs in zip(ours, stock.tolist(), strict=True):
        assert row == theirs[: len(row)]
        assert len(row) == 12 or VOCABULARY[row[-1]] == EOS


def test_pictures_in_training_are_the_pictures_that_the_task_draws(recipe, tmp_path):
    run = Run(recipe, tmp_path / "run")
    task = hub.load("tasks", "maze", preset="small")
    spec = task.spec("val", 3)
    tiles = item(task, spec, "cot").tiles
    drawn = np.asarray(task.draw(spec))
    put_together = run.atlas[torch.tensor(tiles)].permute(0, 2, 1, 3, 4).reshape(280, 280, 3)
    assert np.array_equal(put_together.numpy(), drawn)


def test_only_supervised_words_carry_loss_and_padding_none(recipe, tmp_path):
    run = Run(recipe, tmp_path / "run")
    task = run.tasks["maze"]
    items = [item(task, task.spec("val", i), mode) for i in range(2) for mode in ("cot", "probe")]
    batch = collate(items, run.index)
    for row, it in zip(batch.labels.tolist(), items, strict=True):
        start = len(it.words.prompt)
        expected = [run.index[w] if s else IGNORED for w, s in zip(it.words.response, it.words.supervised, strict=True)]
        assert row == [IGNORED] * start + expected + [IGNORED] * (len(row) - start - len(expected))


def test_each_vision_token_is_named_by_its_place_and_by_what_stands_there(recipe, tmp_path):
    run = Run(recipe, tmp_path / "run")
    task = run.tasks["frozenlake"]
    spec = on_canvas(task.spec("val", 0), 6, np.random.default_rng(0))
    batch = collate([item(task, spec, "cot")], run.index)
    words = [[VOCABULARY[w] for w in tile if w != IGNORED] for tile in batch.named[0].tolist()]
    assert [w[0] for w in words] == [f"r{r}c{c}" for r in range(6) for c in range(6)]
    assert {i for i, w in enumerate(words) if len(w) > 1} == set(task.board(spec))
    assert sum("goal" in w for w in words) == 1


def test_a_look_counts_what_the_model_gets_right(recipe, tmp_path):
    run = Run(recipe, tmp_path / "run")
    task = run.tasks["maze"]
    batch = collate([item(task, task.spec("val", 0), "cot")], run.index)
    hit, learned = right(run.model, batch, run.atlas, torch.float32)
    assert learned.sum() == len(task.words(task.spec("val", 0), "cot").response)
    assert not (hit & ~learned).any()


def test_shipped_recipes_parse_and_changes_reach_a_phase():
    names = [path.stem for path in SHIPPED.glob("*.yaml")]
    assert "tiny" in names
    for name in names:
        if family_of(name) is None:
            load_recipe(name, {})
    assert load_recipe("tiny", {"phases": {"0": {"steps": 7}}}).phases[0].steps == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": {"0": {"stepps": 1}}}, "stepps"),
        ({"phases": {"9": {"steps": 1}}}, "index"),
        ({"phases": {"0": {"tasks": {"mazes": 1}}}}, "mazes"),
        ({"clip": -1}, "clip"),
    ],
)
def test_a_wrong_change_is_told_by_its_name(changes, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("tiny", changes)


def test_an_unknown_recipe_or_device_names_the_known_ones(recipe, tmp_path):
    with pytest.raises(ConfigError, match="tiny"):
        load_recipe("tyni", {})
    with pytest.raises(ConfigError, match="cpu"):
        Run(recipe, tmp_path / "run", device="tpu")


def test_ramps_hold_their_ends():
    ramp = ((0.25, 1.0), (0.75, 3.0))
    assert [at(ramp, x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == [1.0, 1.0, 2.0, 3.0, 3.0]
    assert merge({"a": [1, {"b": 2}]}, {"a": {"1": {"b": 3}}}) == {"a": [1, {"b": 3}]}


def test_sizes_that_do_not_fit_are_refused():
    from mmroute.train.small_model import build

    with pytest.raises(ConfigError, match="mrope_section"):
        build(Shape(hidden=64), VOCABULARY, 0)
    with pytest.raises(ConfigError, match="lacks"):
        build(Shape(), ["a"], 0)


def test_a_run_starts_from_a_checkpoint_of_its_shape_and_no_other(recipe, tmp_path):
    first = Run(recipe, tmp_path / "first")
    first.train()
    write_folder(tmp_path / "model", first.model, "x: 1\n", {})
    again = Run(dataclasses.replace(recipe, start=str(tmp_path / "model")), tmp_path / "second")
    for (name, wanted), (_, found) in zip(first.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(found, wanted.to(torch.bfloat16).float()), name  # a folder holds bf16
    with pytest.raises(CheckpointMismatch, match="tiny cannot be the start"):  # a bundled name, of another shape
        Run(dataclasses.replace(recipe, start="tiny"), tmp_path / "bundled")
    wider = dataclasses.replace(recipe, start=str(tmp_path / "model"), model=dataclasses.replace(recipe.model, mlp=64))
    with pytest.raises(CheckpointMismatch, match="cannot be the start"):
        Run(wider, tmp_path / "third")
    with pytest.raises(CheckpointMismatch, match="is no folder and no bundled checkpoint"):
        Run(dataclasses.replace(recipe, start=str(tmp_path / "nothing")), tmp_path / "fourth")


def test_smaller_pictures_come_beside_the_largest(recipe):
    phase = dataclasses.replace(recipe.phases[0], smaller=3, steps=40)
    tasks = {name: hub.load("tasks", name, preset="nano") for name in recipe.tasks}
    stream = Stream(phase, tasks, {word: i for i, word in enumerate(VOCABULARY)}, 0, 0)
    sides = [stream[step].side for step in range(40)]
    assert set(sides) == {3, 4}
    assert sides.count(4) > sides.count(3)


def test_workers_draw_what_one_process_draws(recipe):
    tasks = {name: hub.load("tasks", name, preset="nano") for name in recipe.tasks}
    stream = Stream(recipe.phases[0], tasks, {word: i for i, word in enumerate(VOCABULARY)}, 5, 7)
    alone, ahead = (list(stream.since(1, workers)) for workers in (0, 1))
    assert len(alone) == len(ahead) == recipe.phases[0].steps - 1
    for one, other in zip(alone, ahead, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.tiles, other.tiles)
    assert torch.equal(stream[1].ids, alone[0].ids)


def test_one_command_trains_examines_and_writes_the_folder(recipe, tmp_path):
    from mmroute.cli.train import app

    out = tmp_path / "run"
    done = CliRunner().invoke(
        app, ["backbone", "--recipe", str(tmp_path / "small.yaml"), "--out", str(out), "--set", "exam_items=4"]
    )
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out / "model")
    results = json.loads((out / "model" / "RESULTS.json").read_text())
    assert results["steps"] == 7
    assert set(results["tasks"]) == {"frozenlake", "maze"}
    assert results["tasks"]["maze"]["n"] == 4
