"""Interventions change what they say and nothing else, a swap calls for what the world does, and collapse is seen."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from mmroute.backbones.load import load
from mmroute.bench import latents
from mmroute.bench.items import Plan, load_task
from mmroute.bench.latents import CHANGES, INTERVENTIONS, collapse, intervene
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe
from mmroute.tasks._texts import VOCABULARY
from mmroute.tasks.base import Spec
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build

SMALL = {"hidden": 32, "layers": 3, "heads": 2, "kv_heads": 1, "mlp": 48, "mrope_section": (2, 3, 3),
         "vision_hidden": 32, "vision_mlp": 48}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    write_folder(path, build(Shape(**SMALL), VOCABULARY, 0), "x: 1\n", {})
    return load(path, dtype="float32")


def items(number=3, steps=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [SimpleNamespace(latents=torch.randn(steps, 6, generator=generator)) for _ in range(number)]


@pytest.mark.parametrize("step", range(4))
def test_each_intervention_puts_in_place_what_it_says(step):
    own, donors = items(), items(seed=1)
    z = torch.randn(3, 6, generator=torch.Generator().manual_seed(step + 5))
    mine = torch.stack([i.latents[step] for i in own])
    theirs = torch.stack([i.latents[step] for i in donors])
    out = {name: change(own, donors, step, z) for name, change in INTERVENTIONS.items()}
    assert torch.equal(out["none"], z)
    assert not out["zero"].any()
    torch.testing.assert_close(out["mean"], mine.mean(0).expand(3, 6))
    torch.testing.assert_close(out["noise"].norm(dim=-1), z.norm(dim=-1))
    assert torch.equal(out["noise"], INTERVENTIONS["noise"](own, donors, step, z))
    assert torch.equal(out["shuffle"], theirs)
    assert torch.equal(out["swap"], torch.stack([i.latents[[1, 0, 3, 2][step]] for i in own]))
    assert torch.equal(out["donor_first"], theirs if step == 0 else z)
    assert torch.equal(out["donor_last"], theirs if step == 3 else z)
    odd = items(steps=3)
    assert torch.equal(INTERVENTIONS["swap"](odd, odd, 2, z), z), "the last of an odd number has no neighbour"


def test_a_report_covers_every_intervention_and_touches_nothing_under_none(model):
    think = {"name": "vedas", "num_latents": 3, "replay_tokens": 2, "max_new_tokens": 4}
    report = intervene(model, Recipe(name="r", think=think), Plan(task="arrows:nano", n=12, batch=5))
    assert tuple(report.effects) == CHANGES
    assert report.steps == {"3": 12}
    assert report.effects["none"].diff == 0
    assert report.effects["none"].n == 12
    assert {n for n, e in report.effects.items() if e.predicted is not None} <= {"donor_first", "donor_last"}
    assert len(latents.lines(report)) == 4 + len(report.effects)


def test_answers_are_the_untouched_ones_where_a_latent_replaces_itself(model):
    task = load_task("arrows:nano")
    samples = list(task.samples("test", 4))
    with latents.equip(model, Recipe(name="r", think={"name": "coconut", "num_latents": 3})) as (routed, think):
        found = latents._recorded(routed, think, task, samples)
        assert all(item.latents.shape == (3, 32) for item in found)
        same = latents._again(routed, think, found, found[1:] + found[:1], "none", 3)
        own = latents._again(routed, think, found, found, "shuffle", 3)  # each its own donor
        other = latents._again(routed, think, found, found[1:] + found[:1], "zero", 3)
    assert same == [item.answer for item in found]
    assert own == same
    assert other != same


def test_what_a_donor_calls_for_is_where_the_own_arrows_lead():
    task = load_task("arrows")
    samples = list(task.samples("test", 60))
    checked = 0
    for sample, donor in pairwise(samples):
        own, other = (Spec.from_dict(s.meta["spec"]) for s in (sample, donor))
        assert latents._called_for(task, sample, sample, "donor_first") == sample.answer
        assert latents._called_for(task, sample, sample, "donor_last") == sample.answer
        assert latents._called_for(task, sample, donor, "zero") is None
        word = task.at(other, task.trace(other)[-1].cell)
        inside = {task.at(own, (r, c)): (r, c) for r in range(own.n) for c in range(own.n)}
        wanted = latents._called_for(task, sample, donor, "donor_last")
        if word in inside:
            r, c = inside[word]
            assert wanted == task.choices(own)[own.world["colours"][r][c]].label
            checked += 1
        else:
            assert wanted is None
    assert checked > 5
    maze = load_task("maze")
    pair = list(maze.samples("test", 2))
    assert latents._called_for(maze, pair[0], pair[1], "donor_first") is None


def test_collapse_is_seen_and_variety_is_not_taken_for_it():
    generator = torch.Generator().manual_seed(0)
    same = torch.randn(3, 16, generator=generator)
    stuck = collapse([same + 0.01 * torch.randn(3, 16, generator=generator) for _ in range(8)])
    assert stuck.collapsed
    assert stuck.cosine_inputs > 0.99
    assert stuck.between_inputs < 0.01
    free = collapse([torch.randn(n, 16, generator=generator) for n in (3, 2, 3, 3, 1, 3, 3, 3)])
    assert not free.collapsed
    assert abs(free.cosine_inputs) < 0.2
    assert free.effective_rank > 8
    one = collapse([torch.ones(2, 16), -torch.ones(2, 16)])
    assert one.effective_rank == pytest.approx(1.0, abs=1e-3)
    assert one.cosine_steps == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="latents of 1 items given; at least 2"):
        collapse([same])


def test_what_cannot_be_asked_is_refused(model):
    plan = Plan(task="arrows:nano", n=2)
    with pytest.raises(ConfigError, match="recipe r takes no latent steps"):
        intervene(model, Recipe(name="r"), plan)
    with pytest.raises(ConfigError, match="no intervention named zeroes; one of none, zero"):
        intervene(model, Recipe(name="r", think={"name": "coconut"}), plan, ["zeroes"])


def test_a_survey_places_every_latent_and_reads_the_words_that_supervision_reads(model):
    think = {"name": "coconut", "num_latents": 3}
    found, points = latents.survey(model, Recipe(name="r", think=think), Plan(task="arrows:nano", n=6, batch=4))
    assert [(p.item, p.step) for p in points[:4]] == [(points[0].item, t) for t in (1, 2, 3)] + [(points[3].item, 1)]
    assert len(points) == 18
    assert all(len(p.words) == 3 for p in points)
    assert sum(p.x for p in points) == pytest.approx(0, abs=1e-2), "centred"
    assert sum(p.x**2 for p in points) >= sum(p.y**2 for p in points), "the wider axis first"
    svg = latents.picture(points, "a < b")
    assert svg.count("<circle") == 18
    assert "a &lt; b" in svg
    assert not found.collapsed or found.cosine_inputs > 0.95


def test_the_commands_print_and_write_what_was_found(model, tmp_path):
    from typer.testing import CliRunner

    from mmroute.cli import app

    given = ["--task", "arrows:nano", "--n", "4", "--model", model.name_or_path, "--set", "think.max_new_tokens=2"]
    path = tmp_path / "recipe.yaml"
    path.write_text("think: {name: coconut, num_latents: 2}\n")
    for command, kind in (("interventions", "latents/1"), ("latents", "survey/1")):
        out = tmp_path / f"{command}.json"
        done = CliRunner().invoke(
            app, ["diagnose", command, *given, "--recipe", str(path), "--out", str(out), "--json"]
        )
        assert done.exit_code == 0, done.output
        last = json.loads(done.stdout.strip().splitlines()[-1])
        assert last == json.loads(out.read_text())
        assert last["schema"] == kind
    assert (tmp_path / "latents.svg").read_text().startswith("<svg")
