"""Interventions change what they say and nothing else, a swap calls for what the world does, and collapse is seen."""

import itertools
import json
from contextlib import nullcontext
from itertools import pairwise
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from mmroute import hub
from mmroute.backbones.images import prepare
from mmroute.backbones.load import load
from mmroute.bench import latent_space, latents, record_latents
from mmroute.bench.items import Plan, load_task
from mmroute.bench.latent_space import collapse
from mmroute.bench.latents import CHANGES, INTERVENTIONS, intervene
from mmroute.bench.record_latents import recorded
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe
from mmroute.session import Session
from mmroute.tasks._grid import step as moved
from mmroute.tasks._texts import VOCABULARY
from mmroute.tasks.base import Spec
from mmroute.think.base import Thought
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
        found = recorded(routed, think, task, samples)
        assert all(item.latents.shape == (3, 32) for item in found)
        same = latents._again(routed, think, found, found[1:] + found[:1], "none", 3)
        own = latents._again(routed, think, found, found, "shuffle", 3)  # each its own donor
        other = latents._again(routed, think, found, found[1:] + found[:1], "zero", 3)
    assert same == [item.answer for item in found]
    assert own == same
    assert other != same


@torch.no_grad()
def test_masked_latents_are_seen_by_nobody_and_go_on_as_states_alone(model):
    """The stock model on the whole sequence under a mask of every pair, one row at a time."""
    task = load_task("arrows:nano")
    given = Recipe(name="r", think={"name": "coconut", "num_latents": 2, "max_new_tokens": 3})
    with latents.equip(model, given) as (routed, think):
        found = recorded(routed, think, task, list(task.samples("test", 3)))
        got = latents._masked(routed, think, found)
        scale, tokenizer = float(think.learned.scale), routed.processor.tokenizer
        want = []
        with routed.off():
            for item in found:
                batch = prepare(model, routed.processor, [item.chat])
                place = routed.family.positions(model, batch["input_ids"], batch["attention_mask"],
                                                batch["image_grid_thw"])  # fmt: skip
                x = model.model.get_input_embeddings()(batch["input_ids"])
                pictures = {k: batch[k] for k in routed.family.image_kwargs(batch)}
                images = torch.cat(routed.family.image_features(model, pictures))
                x = x.masked_scatter((routed.controller.table[batch["input_ids"]] == 1)[..., None], images)
                hidden, ids = [], []
                for step in range(2 + 3):
                    n = x.shape[1]
                    sees = torch.ones(n, n, dtype=torch.bool).tril()
                    for column in hidden:
                        sees[column + 1 :, column] = False
                    h = model.model.language_model(inputs_embeds=x, position_ids=place, use_cache=False,
                                                   attention_mask={"full_attention": sees[None, None]}
                                                   ).last_hidden_state[:, -1:]  # fmt: skip
                    if step < 2:
                        hidden.append(n)
                        new = h * scale
                    else:
                        ids.append(int(model.lm_head(h).argmax()))
                        new = model.model.get_input_embeddings()(torch.tensor([[ids[-1]]]))
                    x = torch.cat([x, new], 1)
                    place = torch.cat([place, place.amax() + 1 + torch.zeros(3, 1, 1, dtype=torch.long)], 2)
                want.append(tokenizer.decode(ids, skip_special_tokens=True))
    assert got == want


def test_forgotten_latents_leave_second_passes_too(model):
    task = load_task("arrows:nano")
    given = Recipe(name="r", think={"name": "coconut", "num_latents": 2}, deepen={"name": "vedas", "deepen_tokens": 4})
    with latents.equip(model, given) as (routed, think), torch.no_grad():
        chats = [task.messages(s, "latent") for s in task.samples("test", 2)]
        session = Session(routed)
        session.append(prepare(model, routed.processor, chats), think=think)
        before = [session.cache.lengths(), session.cache.depth[0].lengths()]
        session.think(think, [0, 1])
        assert [session.cache.lengths(), session.cache.depth[0].lengths()] != before
        latents.forget_latents(session.cache)
        assert [session.cache.lengths(), session.cache.depth[0].lengths()] == before


def test_what_a_donor_calls_for_is_where_the_own_arrows_lead():
    task = load_task("arrows")
    samples = list(task.samples("test", 60))
    checked = 0
    for sample, donor in pairwise(samples):
        own, other = (Spec.from_dict(s.meta["spec"]) for s in (sample, donor))
        assert latents._called_for(task, sample, sample, "donor_first") == (sample.answer, False)
        assert latents._called_for(task, sample, sample, "donor_last") == (sample.answer, False)
        assert latents._called_for(task, sample, donor, "zero") is None
        word = task.at(other, task.trace(other)[-1].cell)
        inside = {task.at(own, (r, c)): (r, c) for r in range(own.n) for c in range(own.n)}
        wanted = latents._called_for(task, sample, donor, "donor_last")
        if word in inside:
            r, c = inside[word]
            assert wanted == (task.choices(own)[own.world["colours"][r][c]].label, False)
            checked += 1
        else:
            assert wanted is None
    assert checked > 5
    first = [latents._called_for(task, sample, donor, "donor_first") for sample, donor in pairwise(samples)]
    assert {crosses for _, crosses in filter(None, first)} == {False, True}
    maze = load_task("maze")
    pair = list(maze.samples("test", 2))
    assert latents._called_for(maze, pair[0], pair[1], "donor_first") is None


class Reasoner:
    """Stands for a model whose latents are the cells of the chain: the first is the start, each next one follows the
    item's own arrows from the one before, whoever put it there, and the answer is the own colour at the last."""

    def __init__(self, task, idle=False):
        self.task, self.idle = task, idle
        self.controller = SimpleNamespace(shape=SimpleNamespace(hidden=64))

    def answer_many(self, chats, think, edit):
        specs = [Spec.from_dict(sample.meta["spec"]) for sample in chats]
        counts = [think.num_latents if think.config.stop == "fixed" else s.world["k"] + 1 for s in specs]
        tiles = [self.task.tile(s, tuple(s.world["start"])) for s in specs]
        for step in range(max(counts)):
            z = torch.zeros(len(specs), 1, 64)
            for b, tile in enumerate(tiles):
                if tile is not None:
                    z[b, 0, tile] = 1
            blank = torch.zeros(len(specs), 1, dtype=torch.long)
            z = edit(step, Thought(z, blank == 0, blank, blank[None], blank[:, 0], blank[:, :0], z[:, :0, 0])).embeds
            for b, spec in enumerate(specs):
                if step < counts[b]:
                    cell = self.seen(spec, z[b, 0])
                    tiles[b] = None if cell is None else self.task.tile(spec, cell)
                    if step + 1 < counts[b] and cell is not None:
                        arrow = spec.world["arrows"][cell[0]][cell[1]]
                        tiles[b] = self.task.tile(spec, moved(cell, arrow))
        return [
            SimpleNamespace(text=f"answer: {self.says(spec, tile)}", latents=count)
            for spec, tile, count in zip(specs, tiles, counts, strict=True)
        ]

    def seen(self, spec, z):
        row, column = divmod(int(z.argmax()), spec.canvas)
        cell = row - spec.offset[0], column - spec.offset[1]
        return cell if bool(z.any()) and all(0 <= x < spec.n for x in cell) else None

    def says(self, spec, tile):
        if self.idle:
            return self.task.choices(spec)[spec.answer].label
        if tile is None:
            return "nothing"
        row, column = divmod(tile, spec.canvas)
        colour = spec.world["colours"][row - spec.offset[0]][column - spec.offset[1]]
        return self.task.choices(spec)[colour].label


def asked(monkeypatch, idle):
    task = load_task("arrows:tiny")
    think = hub.load("think", "coconut", num_latents=8, stop="head")
    monkeypatch.setattr(record_latents, "messages", lambda routed, task, sample, think: sample)
    monkeypatch.setattr(latents, "equip", lambda model, recipe: nullcontext((Reasoner(task, idle), think)))
    return intervene(None, Recipe(name="r", think={"name": "coconut"}), Plan(task="arrows:tiny", n=48, batch=16),
                     [name for name in CHANGES if name != "mask"])  # fmt: skip


def test_of_a_model_that_reasons_in_cells_both_swaps_call_for_what_comes(monkeypatch):
    report = asked(monkeypatch, idle=False)
    assert report.accuracy == 1
    assert report.effects["none"].accuracy == 1
    assert report.effects["zero"].accuracy == 0
    for name in ("donor_first", "donor_last"):
        effect = report.effects[name]
        assert effect.predicted == 1
        assert effect.predicted_crossing == (1 if name == "donor_first" else None)
        assert effect.accuracy < 0.7, "most donors call for another colour"
        assert effect.high < 0
    assert report.effects["shuffle"].accuracy == report.effects["donor_last"].accuracy, "the last one decides"
    assert report.effects["fewer_steps"].accuracy < 0.3


def test_a_model_that_does_not_use_its_latents_is_found_out(monkeypatch):
    report = asked(monkeypatch, idle=True)
    assert all(e.accuracy == 1 and e.diff == 0 for e in report.effects.values())
    assert report.effects["donor_first"].predicted < 0.7
    assert report.effects["donor_last"].predicted < 0.7
    assert report.collapse.cosine_inputs < 0.95


def test_collapse_is_what_its_formulas_say_pair_by_pair():
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(n, 8, generator=generator) + 1 for n in (3, 2, 3, 1)]

    def cosine(a, b):
        return float(a @ b / a.norm() / b.norm())

    steps = [[z[t] for z in found if len(z) > t] for t in range(3)]
    across = [fmean(cosine(a, b) for a, b in itertools.combinations(rows, 2)) for rows in steps]
    along = [cosine(z[s], z[t]) for z in found for s, t in itertools.combinations(range(len(z)), 2)]
    between = []
    for rows in steps:
        mean = sum(rows) / len(rows)
        between.append(sum(float((z - mean) @ (z - mean)) for z in rows) / sum(float(z @ z) for z in rows))
    every = torch.cat(found)
    eigen = torch.linalg.eigvalsh((every - every.mean(0)).T @ (every - every.mean(0))).clamp(min=0).sqrt()
    got = collapse(found)
    assert got.cosine_inputs == pytest.approx(fmean(across), rel=1e-4)
    assert got.cosine_steps == pytest.approx(fmean(along), rel=1e-4)
    assert got.between_inputs == pytest.approx(fmean(between), rel=1e-4)
    assert got.effective_rank == pytest.approx(float(eigen.sum() ** 2 / eigen.square().sum()), rel=1e-2)


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
    given = Recipe(name="r", think=think), Plan(task="arrows:nano", n=6, batch=4)
    found, points, near = latent_space.survey(model, *given)
    assert [(p.item, p.step) for p in points[:4]] == [(points[0].item, t) for t in (1, 2, 3)] + [(points[3].item, 1)]
    assert len(points) == 18
    assert all(len(p.words) == 3 for p in points)
    assert sum(p.x for p in points) == pytest.approx(0, abs=1e-2), "centred"
    assert sum(p.x**2 for p in points) >= sum(p.y**2 for p in points), "the wider axis first"
    svg = latent_space.picture(points, "a < b")
    assert svg.count("<circle") == 18
    assert "a &lt; b" in svg
    assert not found.collapsed or found.cosine_inputs > 0.95
    spread = latent_space.survey(model, *given, plane="tsne")[1]
    assert [(p.item, p.step, p.words) for p in spread] == [(p.item, p.step, p.words) for p in points]
    assert (spread[0].x, spread[0].y) != (points[0].x, points[0].y)
    task = load_task("arrows:nano")
    to_image, to_words = [], []
    with latents.equip(model, given[0]) as (routed, thinker):
        for item in recorded(routed, thinker, task, list(task.samples("test", 6))):
            ids = prepare(model, routed.processor, [item.chat])
            tokens = routed.family.image_features(model, {k: ids[k] for k in routed.family.image_kwargs(ids)})[0]
            table = model.model.language_model.embed_tokens.weight
            for z in item.latents:
                to_image.append(max(float(torch.cosine_similarity(z, t, dim=0).detach()) for t in tokens))
                to_words.append(max(float(torch.cosine_similarity(z, w, dim=0)) for w in table.detach()))
    assert near.visual == pytest.approx(fmean(to_image), abs=1e-4)
    assert near.words == pytest.approx(fmean(to_words), abs=1e-4)


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
