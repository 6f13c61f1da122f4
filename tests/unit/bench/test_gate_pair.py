"""A pair of small random models, end to end: collect, train, calibrate, serve a budget, bench."""

import dataclasses
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from pairs import write_pair, write_recipe
from typer.testing import CliRunner

from mmroute import recipe as recipes
from mmroute.backbones.load import load
from mmroute.bench import gate_time, schema
from mmroute.bench.gate import ATTAINABLE, VERIFIED
from mmroute.bench.gate_pair import evaluate, open_pair
from mmroute.bench.gate_schema import read_gate, read_gate_eval
from mmroute.bench.measure import Clock
from mmroute.bench.outcomes.base import content_hash, read_rows
from mmroute.cli import app
from mmroute.config import resolved
from mmroute.engine.attach import attach
from mmroute.errors import CheckpointMismatch, ConfigError, InputError
from mmroute.gate.prp import Prp
from mmroute.session import Session
from mmroute.tasks._mixture import Part, draw_mixture
from mmroute.tasks._solver import solve
from mmroute.tasks.base import Spec
from mmroute.train.prompts import chats_of
from mmroute.train.prp import train_prp
from mmroute.train.prp_config import sections


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def pair(folders: Path) -> tuple[Any, Any]:
    return load(folders / "draft", dtype="float32"), load(folders / "target", dtype="float32")


@pytest.fixture(scope="module")
def recipe(folders: Path) -> recipes.Recipe:
    return recipes.read(str(folders / "nano.yaml"))


@pytest.fixture(scope="module")
def trained(pair: tuple[Any, Any], recipe: recipes.Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train_prp(recipe, *pair, out)
    return out


def test_collecting_again_after_a_kill_asks_only_what_is_missing(
    pair: tuple[Any, Any], recipe: recipes.Recipe, trained: Path, tmp_path: Path
) -> None:
    whole = [read_rows(trained / "outcomes" / f"{role}.jsonl") for role in ("draft", "target")]
    folder = tmp_path / "run" / "outcomes"
    folder.mkdir(parents=True)
    text = (trained / "outcomes" / "draft.jsonl").read_text()
    (folder / "draft.jsonl").write_text(text[: len(text) // 2])  # killed in the middle of a line
    with pytest.raises(InputError, match="add --resume"):
        train_prp(recipe, *pair, tmp_path / "run")
    train_prp(recipe, *pair, tmp_path / "run", resume=True)
    again = [read_rows(folder / f"{role}.jsonl") for role in ("draft", "target")]
    bare = lambda rows: [dataclasses.replace(row, prefill_s=0.0, decode_s=0.0) for row in rows]
    assert [bare(rows) for rows in again] == [bare(rows) for rows in whole]
    asked = [row.prompt_hash for row in again[0]]
    assert len(asked) == len(set(asked))
    made = [json.loads((p / "rater" / "rater.json").read_text()) for p in (trained, tmp_path / "run")]
    assert made[0]["weights"] == made[1]["weights"]


def test_the_outcomes_are_shared_as_parquet_with_their_hash(trained: Path) -> None:
    rows = read_rows(trained / "outcomes.parquet")
    manifest = json.loads((trained / "rater" / "rater.json").read_text())
    assert manifest["outcomes_sha256"] == content_hash(rows)
    assert len(manifest["quantiles"]) == 101
    assert {row.role for row in rows} == {"draft", "target"}
    assert all(row.stats["lp_mean"] < 0 < row.prefill_flops < row.flops for row in rows)


@pytest.mark.parametrize("at_once", [1, 4])
def test_seconds_count_the_draft_always_and_the_target_where_it_answers(
    pair: tuple[Any, Any], recipe: recipes.Recipe, trained: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    ticks = itertools.count()  # each part of each batch takes one second
    monkeypatch.setattr(gate_time, "clock_of", lambda _: Clock("thread", lambda: float(next(ticks))))
    rater = Prp.load(trained / "rater", pair[0])
    ask = partial(gate_time.timed, recipe, *pair, rater, num=4, seed=0, at_once=at_once, rounds=1)
    assert ask(np.zeros(8, bool))["ratio"] == 1  # a rated draft and a target: three parts each
    assert ask(np.ones(8, bool))["ratio"] == 2
    half = np.arange(8) % 2 == 0
    assert ask(half)["ratio"] == (1.5 if at_once == 1 else 2)  # a batch calls the target if one row does


def test_a_decode_step_is_a_call_behind_the_prompt(
    pair: tuple[Any, Any], recipe: recipes.Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    called, step = [], Session.step
    monkeypatch.setattr(Session, "step", lambda *given: called.append(1) or step(*given))
    gated, _ = sections(recipe)
    think = recipe.build("think")
    chats = chats_of(pair[0], draw_mixture(gated.mix, 3, "test", 0), think)
    with attach(pair[0]) as small:
        spent = gate_time._spend(small, chats, 5)
    assert spent.steps == len(called) > 0


def test_questions_are_timed_in_the_proportion_in_which_they_are_sent() -> None:
    sent = np.array([True] * 3 + [False] * 9)
    assert gate_time._in_proportion(sent, 4) == [0, 3, 6, 9]
    assert gate_time._in_proportion(sent, 12) == list(range(12))


def test_an_evaluation_has_the_promised_fields_and_keeps_the_budget_exactly_at_its_ends(
    pair: tuple[Any, Any], recipe: recipes.Recipe, trained: Path
) -> None:
    rater = Prp.load(trained / "rater", pair[0])
    none = resolved(evaluate(recipe, *pair, rater, n=10, seed=0, budget=0.0, num_timed=1))
    every = resolved(evaluate(recipe, *pair, rater, n=10, seed=0, budget=1.0, num_timed=1))
    assert set(none) >= {
        "accuracy", "accuracy_draft", "accuracy_target", "accuracy_random", "accuracy_oracle", "target_share",
        "oracle_normalised_gain", "cost_ratio", "time_ratio", "rating_overhead",
    }  # fmt: skip
    assert (none["target_share"], every["target_share"]) == (0, 1)
    assert (none["accuracy"], every["accuracy"]) == (none["accuracy_draft"], every["accuracy_target"])
    assert none["cost_ratio"] < every["cost_ratio"]
    assert every["cost_ratio"] > 1  # the draft's prefill and the rating come on top
    assert none["rating_steps"] <= 2
    assert set(none["by_part"]) == {"lake", "hopeless"}


@pytest.mark.slow
def test_an_evaluation_is_written_as_a_result_that_reads(trained: Path, folders: Path, tmp_path: Path) -> None:
    command = ["eval", "--recipe", str(folders / "nano.yaml"), "--set", f"gate.rater={trained / 'rater'}"]
    command += ["--n", "10", "--budget", "0.4", "--json", "--out", str(tmp_path / "r.json")]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    found = read_gate_eval(tmp_path / "r.json")
    assert json.loads(done.stdout.splitlines()[-1]) == {**resolved(found.summary), "ci95": list(found.summary.ci95)}
    assert (found.summary.n, found.summary.budget) == (10, 0.4)


GATES = ("random", "probe", "self_ref", "self_consistency", "early", "oracle", "p_true")


@pytest.mark.slow
def test_a_bench_runs_from_end_to_end_and_goes_on_where_it_was_killed(
    folders: Path, recipe: recipes.Recipe, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "commit_of_source", lambda: ("abc", False))
    settings = {"recipe": str(folders / "nano.yaml"), "gates": [{"name": name} for name in GATES]}
    settings |= {"seeds": [0, 1], "train": 160, "samples": 2, "resamples": 10, "timed": 1, "timed_together": 2}
    (tmp_path / "small-gate.yaml").write_text(yaml.safe_dump({"n": 120, "work": str(tmp_path / "work"), **settings}))
    command = ["bench", "--recipe", str(tmp_path / "small-gate.yaml"), "--n", "12", "--out", str(tmp_path / "out")]
    command += ["--set", f"gate.rater={trained / 'rater'}", "--json"]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "128 answers, 128 not known before" in done.stderr  # 2 x 16 to fit on, 2 x 12 x (draft, target, 2 samples)
    assert "min of CPU to go" in done.stderr
    found = read_gate(tmp_path / "out" / "small-gate" / "gate.json")
    gates = found.pooled.gates
    assert set(gates) == {"prp", "prp by draft", "prp by target", "prp by joint", VERIFIED, ATTAINABLE, *GATES}
    # a closed vocabulary cannot be asked in English
    assert [title for title, each in gates.items() if each.skipped] == ["p_true"]
    assert gates["self_consistency"].curve["cost"][0] > gates["prp"].curve["cost"][0]
    assert (found.train, found.pooled.n, [each.n for each in found.seeds.values()]) == (16, 24, [12, 12])
    assert set(found.claims.ahead) == set(GATES) - {"oracle", "p_true"}
    assert found.claims.rating_decode_steps is not None
    assert json.loads(done.stdout.splitlines()[-1])["oracle_gain"] == found.claims.oracle_gain
    page = (tmp_path / "out" / "README.md").read_text()
    assert "## small-gate" in page
    assert "![gate](small-gate/gate.svg)" in page

    work = tmp_path / "work"
    whole = {file.name: file.read_text().splitlines() for file in work.glob("*.jsonl")}
    (work / "samples.jsonl").write_text((work / "samples.jsonl").read_text()[:-5])  # killed in the middle of a line
    lost = sorted((work / "states").glob("*.npz"))[-1]
    lost.unlink()
    assert CliRunner().invoke(app, [*command, "--dry"], catch_exceptions=False).stdout.startswith("128 answers, 1 not")
    assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
    assert lost.exists()
    # Rows whose states alone were lost are asked, but not written, again.
    assert {file.name: len(file.read_text().splitlines()) for file in work.glob("*.jsonl")} == {
        name: len(rows) for name, rows in whole.items()
    }
    again = read_gate(tmp_path / "out" / "small-gate" / "gate.json")
    assert again.pooled == found.pooled
    assert again.seeds == found.seeds
    refused = CliRunner().invoke(app, [*command, "--tasks", "maze"])
    assert "--tasks mean nothing" in str(refused.exception)


def test_a_draft_that_cannot_be_rated_is_said(pair: tuple[Any, Any], recipe: recipes.Recipe, trained: Path) -> None:
    gated, _ = sections(recipe)
    with pytest.raises(ConfigError, match="names no trained rater"):
        open_pair(gated, *pair)
    with pytest.raises(CheckpointMismatch, match="load the draft it belongs to"):
        open_pair(dataclasses.replace(gated, rater=str(trained / "rater")), pair[1], pair[0])
    with pytest.raises(ConfigError, match="has no gate"):
        sections(recipes.read("none"))


# ---------------------------------------------------------------------- the mixture

MIX = [
    Part(task="frozenlake", share=0.5, sizes=(3, 4)),
    Part(task="maze", name="hard", share=0.3, sizes=(5, 6)),
    Part(task="frozenlake", name="hopeless", share=0.1, fog="decisive"),
    Part(task="frozenlake", name="fog", share=0.1, fog="harmless"),
]


def test_a_mixture_has_its_shares_and_a_longer_one_begins_with_the_shorter() -> None:
    long, short = draw_mixture(MIX, 20, "test"), draw_mixture(MIX, 10, "test")
    labels = [item.part.label for item in long]
    assert [labels.count(part.label) for part in MIX] == [10, 6, 2, 2]
    assert [i.sample.id for i in long[:10]] == [i.sample.id for i in short]
    assert len({item.sample.id for item in long}) == 20
    assert not {i.sample.id for i in long} & {i.sample.id for i in draw_mixture(MIX, 10, "test", seed=1)}
    sizes = {item.part.label: item.sample.difficulty["grid"] for item in long}
    assert sizes["frozenlake"] <= 4
    assert sizes["hard"] >= 5


def test_decisive_fog_hides_the_answer_and_harmless_fog_does_not() -> None:
    seen: dict[str, list[bool]] = {}
    groups: dict[str, set[str]] = {}
    for item in draw_mixture(MIX, 30, "test"):
        spec = Spec.from_dict(item.sample.meta["spec"])
        cells = item.task.cells(spec, item.task.codes(spec))
        found = solve(item.task.name, item.task.question_words(spec), cells)
        seen.setdefault(item.part.label, []).append(found == item.task._answer_word(spec))
        groups.setdefault(item.part.label, set()).add(item.group)
    assert all(seen["fog"])
    assert all(seen["frozenlake"])
    assert not any(seen["hopeless"])
    assert not groups["frozenlake"] & groups["fog"]


def test_sizes_outside_the_preset_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sizes lie in 3 \.\. 6"):
        draw_mixture([Part(task="maze", share=1, sizes=(3, 9))], 2, "test")
