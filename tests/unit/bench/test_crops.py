"""Windows of the closer look: where most copies lie by a search everywhere, and what they hold by counting cells."""

import json
from statistics import fmean

import numpy as np
import pytest
from PIL import Image

from mmroute.backbones.load import load
from mmroute.bench import crops
from mmroute.bench.crops import measure_crops
from mmroute.bench.items import Plan, load_task
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.coherence import Window
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build

SMALL = {"hidden": 16, "layers": 3, "heads": 2, "kv_heads": 1, "mlp": 24, "mrope_section": (1, 1, 2),
         "vision_hidden": 16, "vision_mlp": 24}  # fmt: skip
THINK = {"name": "vedas", "num_latents": 6, "stop": "head", "replay_tokens": 5, "max_new_tokens": 2}
PLAN = Plan(task="arrows:nano", n=5, batch=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    write_folder(path, build(Shape(**SMALL), VOCABULARY, 0), "x: 1\n", {})
    return load(path, dtype="float32")


def test_every_window_holds_most_copies_and_its_figures_are_counted_cell_by_cell(model):
    found, shown = measure_crops(model, Recipe(name="r", think=THINK), PLAN)
    task = load_task(PLAN.task)
    samples = {s.id: s for s in task.samples("test", 5)}
    steps = {i: len(s.hops) + 1 for i, s in samples.items()}  # a state each, the start's included
    copied = {i: min(-(-16 // 5), n) for i, n in steps.items()}  # 5, 5, 5 and 1 of 16 tokens
    assert [(c.item, c.step) for c in found.crops] == [(i, t) for i in samples for t in range(1, copied[i] + 1)]
    for crop in found.crops:
        row, column, height, width = crop.cells
        assert (height, width) == (2, 2)
        inside = {
            (r, c): sum((y, x) in {(r, c), (r, c + 1), (r + 1, c), (r + 1, c + 1)} for y, x in crop.picks)
            for r in range(3)
            for c in range(3)
        }
        assert inside[row, column] == max(inside.values())
        assert crop.inside == inside[row, column] / len(crop.picks)
        assert sum(crop.attention) == pytest.approx(1)
        sample = samples[crop.item]
        wide, tall = sample.images[0].width / 4, sample.images[0].height / 4
        assert crop.box == (column * wide, row * tall, (column + 2) * wide, (row + 2) * tall)
        known = sample.meta["relevant"]
        must = {divmod(t, 4) for k in (known["start"], *(h.relevant for h in sample.hops), known["answer"]) for t in k}
        here = {(row + a, column + b) for a in range(2) for b in range(2)}
        assert crop.hit == bool(here & must)
        every = [bool({(r + a, c + b) for a in range(2) for b in range(2)} & must) for r in range(3) for c in range(3)]
        assert crop.chance == pytest.approx(fmean(every))
        assert crop.iou == pytest.approx(len(here & must) / len(here | must))
    for step, row in found.steps.items():
        own = [c for c in found.crops if c.step == int(step)]
        assert (row.n, row.hit, row.iou) == (len(own), fmean(c.hit for c in own), fmean(c.iou for c in own))
    assert len(crops.lines(found)) == 2 + len(found.steps)
    svg = crops.picture(shown, "a & b")
    assert svg.count("<image") == len(shown) == min(12, len(found.crops))
    assert "a &amp; b" in svg


def test_the_size_of_the_window_is_that_of_the_training_recipe(model):
    found, _ = measure_crops(model, Recipe(name="r", think=THINK, train={"tasks": {"maze": 1}, "window_cells": [1, 3],
                                           "stages": [{"name": "x", "steps": 1}]}), PLAN)  # fmt: skip
    assert {c.cells[2:] for c in found.crops} == {(1, 3)}
    assert {tuple(np.round(np.subtract(c.box[2:], c.box[:2]))) for c in found.crops} == {(84.0, 28.0)}


def test_without_ground_truth_nothing_is_claimed():
    assert crops._against(None, Window(0, 0, 0, 2, 2), 0.3, None) == (None, None, None)
    shown = [(crops.Crop("i", 1, 0, (0, 0, 1, 1), (0, 0, 4, 4), [(0, 0)], [0.0], 1.0, None, None, None),
              Image.new("L", (8, 8)))]  # fmt: skip
    assert "<image" in crops.picture(shown, "t")


def test_what_copies_nothing_is_refused(model):
    for think in ({"name": "coconut"}, {"name": "vedas", "replay_tokens": 0}, {"name": "text"}):
        with pytest.raises(ConfigError, match="recipe r copies no image tokens; use ivtlr or vedas"):
            measure_crops(model, Recipe(name="r", think=think), PLAN)


def test_the_commands_write_figures_and_pictures(model, tmp_path):
    from typer.testing import CliRunner

    from mmroute.cli import app

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "think: {name: vedas, num_latents: 6, stop: head, replay_tokens: 2, max_new_tokens: 2}\n"
        "deepen: {name: vedas, deepen_tokens: 4}\n"
        "train: {tasks: {arrows: 1}, batch: 4, stages: [{name: all, steps: 1, reset_optimizer: true}]}\n"
    )
    for command, extra in (("gradients", []), ("nuclear", ["--steps", "1", "--against", str(path)]), ("router", []),
                           ("crops", [])):  # fmt: skip
        out = tmp_path / f"{command}.json"
        given = ["--task", "arrows:nano", "--n", "6", "--model", model.name_or_path, "--recipe", str(path)]
        done = CliRunner().invoke(app, ["diagnose", command, *given, *extra, "--out", str(out), "--json"])
        assert done.exit_code == 0, done.output
        last = json.loads(done.stdout.strip().splitlines()[-1])
        assert last == json.loads(out.read_text())
        assert last["schema"] == f"{command}/1"
        assert out.with_suffix(".svg").read_text().startswith("<svg")
