"""A pair of small random models, end to end: collect, train, calibrate, serve a budget, bench."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmroute import recipe as recipes
from mmroute.backbones.load import load
from mmroute.bench.gate import GateBench, run
from mmroute.bench.gate_judge import Case
from mmroute.bench.gate_pair import evaluate, open_pair
from mmroute.bench.outcomes.base import content_hash, read_rows
from mmroute.errors import CheckpointMismatch, ConfigError, InputError
from mmroute.gate.prp import Prp
from mmroute.tasks._mixture import Part, draw_mixture
from mmroute.tasks._solver import solve
from mmroute.tasks._texts import VOCABULARY
from mmroute.tasks.base import Spec
from mmroute.train.folder import write_folder
from mmroute.train.prp import sections, train_prp
from mmroute.train.small_model import Shape, build

SMALL = Shape(hidden=64, layers=2, heads=2, kv_heads=1, mlp=64, vision_hidden=32, vision_heads=2, vision_mlp=32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = tmp_path_factory.mktemp("pair")
    for seed, name in enumerate(("draft", "target")):
        write_folder(folder / name, build(SMALL, VOCABULARY, seed), "", {})
    return load(folder / "draft", dtype="float32"), load(folder / "target", dtype="float32")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> recipes.Recipe:
    path = tmp_path_factory.mktemp("recipe") / "nano.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "gate": {
                    "draft": "d",
                    "target": "t",
                    "method": {"calibration": "none"},
                    "mix": [
                        {"name": "lake", "task": "frozenlake:nano", "share": 3},
                        {"name": "hopeless", "task": "frozenlake:nano", "share": 1, "fog": "decisive"},
                    ],
                },
                "think": {"name": "text", "max_new_tokens": 12},
                "train": {"n": 40, "batch": 16, "max_epochs": 2},
            }
        )
    )
    return recipes.read(str(path))


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


def test_an_evaluation_has_the_promised_fields_and_keeps_the_budget_exactly_at_its_ends(
    pair: tuple[Any, Any], recipe: recipes.Recipe, trained: Path
) -> None:
    rater = Prp.load(trained / "rater", pair[0])
    none = evaluate(recipe, *pair, rater, n=10, seed=0, budget=0.0, timed=1).to_dict()
    every = evaluate(recipe, *pair, rater, n=10, seed=0, budget=1.0, timed=1).to_dict()
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


def test_a_bench_runs_from_end_to_end(
    pair: tuple[Any, Any], recipe: recipes.Recipe, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "read", lambda name: recipe)
    names = ("random", "probe", "self_ref", "self_consistency", "early", "oracle", "p_true")
    grid = GateBench(gates=[Case(name=name) for name in names], n=12, seeds=[0, 1], train=16, samples=2, resamples=10)
    rater = Prp.load(trained / "rater", pair[0])
    found = run(grid, draft=pair[0], target=pair[1], rater=rater, out=tmp_path)
    gates = found["seeds"]["0"]["gates"]
    assert set(gates) == {"prp", "prp by draft", "prp by target", "prp by joint", *(c.title for c in grid.gates)}
    # a closed vocabulary cannot be asked in English
    assert [title for title, each in gates.items() if each["skipped"]] == ["p_true"]
    assert gates["self_consistency"]["curve"]["cost"][0] > gates["prp"]["curve"]["cost"][0]
    assert json.loads((tmp_path / "gate.json").read_text()) == found


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
