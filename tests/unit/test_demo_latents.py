"""The demo's table of ways to think, on made weights: counted from its answers, silent where weights are missing."""

import json

import pytest

from mmroute import demo_latents, recipe
from mmroute.backbones.load import load
from mmroute.bench.items import load_task
from mmroute.bench.measure import Spread
from mmroute.errors import ConfigError
from mmroute.recipe import equip
from mmroute.tasks._texts import VOCABULARY
from mmroute.train.folder import write_folder
from mmroute.train.small_model import Shape, build

SMALL = {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 24, "mrope_section": (1, 1, 2),
         "vision_hidden": 16, "vision_mlp": 24}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    write_folder(path, build(Shape(**SMALL), VOCABULARY, 0), "x: 1\n", {})
    return path


@pytest.fixture
def made(folder, tmp_path, monkeypatch):
    """Weights under the names that recipes look for, in place of bundled ones; nothing was learned."""

    def found(name):
        if not (tmp_path / name / "mmroute.json").is_file():
            raise ConfigError(f"no routers in {name}")
        return tmp_path / name

    monkeypatch.setattr(recipe, "trained_folder", found)
    for name in ("latent", "vedas"):
        model = load(folder, dtype="float32")
        given = recipe.read(name, ["trained=null"])
        with equip(model, given) as (routed, _):
            routed.save_pretrained(tmp_path / name)
    return folder


@pytest.fixture
def short(monkeypatch):
    read = recipe.read
    monkeypatch.setattr(recipe, "read", lambda name, sets=(): read(name, [*sets, "think.max_new_tokens=3"]))
    monkeypatch.setattr(demo_latents, "ROUNDS", 1)


@pytest.mark.usefixtures("short")
def test_rows_are_counted_from_answers_and_a_missing_one_says_how_to_train_it(made):
    said = []
    rows = demo_latents.run(n=4, batch=3, model=str(made), say=said.append)
    assert [row.recipe for row in rows] == ["cot", "latent", "vedas"]
    assert said[0].startswith("latent-depth: left out, no weights are bundled; `mmroute train vedas --recipe latent-")
    task = load_task("arrows")
    for row in rows:
        with equip(load(str(made)), recipe.read(row.recipe)) as (routed, think):
            answers = [
                routed.answer_many([task.messages(s, think.style)], think=think)[0] for s in task.samples("test", 4)
            ]
        assert row.n == 4
        assert row.ar_steps == sum(len(a.ids) + a.latents for a in answers) / 4
        assert row.latents == sum(a.latents for a in answers) / 4
        assert row.token_forwards == sum(a.trace.token_forwards for a in answers) / 4
        assert row.ci95[0] <= row.accuracy <= row.ci95[1]
        assert row.time_ratio.n == 1
    assert rows[0].latents == 0
    assert rows[0].time_ratio.median == 1
    assert rows[1].latents > 0
    assert rows[2].token_forwards > rows[1].token_forwards, "copies are counted"
    data = demo_latents.as_data(rows)["latents"]
    assert [row["recipe"] for row in json.loads(json.dumps(data))["rows"]] == ["cot", "latent", "vedas"]


@pytest.mark.usefixtures("short")
def test_without_any_weights_there_is_no_table(folder, monkeypatch):
    def refuse(name):
        raise ConfigError(f"no routers in {name}")

    monkeypatch.setattr(recipe, "trained_folder", refuse)
    said = []
    assert demo_latents.run(n=2, model=str(folder), say=said.append) == []
    assert [line.split(":")[0] for line in said] == ["latent", "latent-depth", "vedas", "pause"]


def test_the_headline_is_one_command(made, tmp_path):
    """Accuracy and steps of latents against the written chain, as soon as the weights are there."""
    from typer.testing import CliRunner

    from mmroute.cli import app

    given = ["--task", "arrows", "--recipe", "vedas", "--against", "cot", "--json", "--model", str(made)]
    done = CliRunner().invoke(app, ["eval", *given, "--n", "2", "--rounds", "1", "--set", "think.max_new_tokens=3"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["recipe"] == "vedas"
    assert found["baseline"]["recipe"] == "cot"
    assert found["ar_steps"] > 3


def test_the_table_has_a_line_for_each_way(monkeypatch, capsys):
    from mmroute.cli.demo import _think

    ratio = Spread(0.4, 0.3, 0.5, 0.3, 0.5, 3)
    rows = [
        demo_latents.Row("cot", "written chain", 40, 40, (0.91, 1.0), 14.5, 0.0, 130.0, ratio),
        demo_latents.Row("vedas", "latent + depth + replay", 40, 38, (0.83, 0.99), 7.25, 4.25, 150.0, ratio),
    ]
    monkeypatch.setattr(demo_latents, "run", lambda say: rows)
    kept = _think(print)
    out = capsys.readouterr().out
    assert kept["latents"]["rows"][1]["accuracy"] == 0.95
    line = next(line for line in out.splitlines() if "latent + depth + replay" in line)
    for figure in ("0.95 [0.83, 0.99]", "7.2", "4.2", "150", "0.40"):
        assert figure in line
    monkeypatch.setattr(demo_latents, "run", lambda say: [])
    assert _think(print) == {}
    assert capsys.readouterr().out == ""
