"""Answers found elsewhere are those of one process, and a file of them outlives its process. Ranks and Ray themselves
are in tests/distributed."""

import json

import pytest

from mmroute.backbones.load import load
from mmroute.bench import run, spread
from mmroute.cli.evaluate import evaluate
from mmroute.errors import ConfigError, InputError, MissingExtra
from mmroute.recipe import read

RECIPE = read("random", ["prune.vision_keep=0.6", "think.name=text", "think.max_new_tokens=5"])


def plan(**changes) -> run.Plan:
    quick = {"task": "frozenlake", "n": 4, "batch": 2, "rounds": 1, "warmup": 1, "forced_tokens": 2, "timed_items": 1}
    return run.Plan(**{**quick, **changes})


@pytest.fixture(scope="module")
def outcome():
    samples = run.draw(run.load_task("frozenlake"), plan())
    return run.answer_items(load("tiny"), RECIPE, run.load_task("frozenlake"), samples, 2)


def test_an_outcome_survives_its_lines_in_any_order(outcome):
    lines = spread._lines([0, 1, 2, 3], outcome)
    rows = {row["index"]: row for row in map(json.loads, reversed(lines))}
    back = spread._joined(RECIPE, outcome.samples, rows)
    assert back.answers == outcome.answers
    assert back.scores == outcome.scores
    assert back.exact == outcome.exact
    assert back.flops_tower == outcome.flops_tower


def test_a_missing_item_is_named(outcome):
    rows = {row["index"]: row for row in map(json.loads, spread._lines([0, 1, 2, 3], outcome)) if row["index"] != 2}
    with pytest.raises(InputError, match="1 of 4 items have no answer, first 2"):
        spread._joined(RECIPE, outcome.samples, rows)


def test_parts_go_on_where_a_kill_left_them(outcome, tmp_path):
    file = tmp_path / "deep" / "parts.jsonl"
    lines = spread._lines([0, 1, 2, 3], outcome)
    with spread.Parts(file, RECIPE, plan(), "tiny") as parts:
        parts.add(lines[1])
        parts.add(lines[0])
        parts.add(lines[1])  # an actor's second try
    with file.open("a") as cut:
        cut.write(lines[2][: len(lines[2]) // 2])
    with spread.Parts(file, RECIPE, plan(), "tiny") as parts:
        assert sorted(parts.found) == [0, 1]
        parts.add(lines[2])
        parts.add(lines[3])
    with spread.Parts(file, RECIPE, plan(batch=1), "tiny") as parts:  # a batch decides no answer
        assert spread._joined(RECIPE, outcome.samples, parts.found).answers == outcome.answers
    assert len(file.read_text().splitlines()) == 5


@pytest.mark.parametrize(("changed", "model"), [({"seed": 1}, "tiny"), ({"n": 5}, "tiny"), ({}, "other")])
def test_parts_of_another_run_are_refused_and_left(outcome, tmp_path, changed, model):
    file = tmp_path / "parts.jsonl"
    with spread.Parts(file, RECIPE, plan(), "tiny") as parts:
        parts.add(spread._lines([0, 1, 2, 3], outcome)[0])
    before = file.read_bytes()
    with pytest.raises(InputError, match="holds answers to another run"):
        spread.Parts(file, RECIPE, plan(**changed), model)
    assert file.read_bytes() == before


def test_evaluate_takes_answers_from_elsewhere(outcome):
    found = run.evaluate(load("tiny"), RECIPE, plan(), name="tiny", outcomes=[outcome])
    assert found.summary.accuracy == sum(outcome.correct) / 4


def test_ray_needs_a_folder_for_its_answers():
    with pytest.raises(ConfigError, match="--ray N and --parts DIR go together"):
        evaluate(task="frozenlake", n=1, ray=2, parts=None, budget=None, outcomes=None, set_=[])


@pytest.mark.parametrize(
    ("actors", "device", "has", "needs"),
    [
        (3, "cpu", {"CPU": 4.0}, {}),
        (8, "cuda", {"CPU": 4.0, "GPU": 8.0}, {"num_gpus": 1}),
        (2, "cpu", {"CPU": 4.0, "GPU": 8.0}, {}),
    ],
)
def test_an_actor_on_cuda_asks_for_a_card_of_its_own(actors, device, has, needs):
    assert spread.actor_needs(actors, device, has) == needs


@pytest.mark.parametrize(
    ("actors", "device", "has", "said"),
    [
        (4, "cpu", {"CPU": 4.0}, "--ray 4, but 3 actors fit: the cluster's CPUs less one"),
        (9, "cuda", {"CPU": 64.0, "GPU": 8.0}, "--ray 9 --device cuda, but 8 actors fit: one on each card"),
        (1, "cuda", {"CPU": 64.0}, "--ray 1 --device cuda, but 0 actors fit"),
    ],
)
def test_more_actors_than_the_cluster_has_room_for_are_refused(actors, device, has, said):
    with pytest.raises(InputError, match=said):
        spread.actor_needs(actors, device, has)


@pytest.mark.parametrize("where", [{"device": "cuda"}, {"dtype": "bfloat16"}])
def test_answers_of_another_device_or_dtype_are_not_gone_on_with(tmp_path, where):
    file = tmp_path / "parts.jsonl"
    spread.Parts(file, RECIPE, plan(), "tiny").close()
    with pytest.raises(InputError, match="holds answers to another run"):
        spread.Parts(file, RECIPE, plan(), "tiny", **where)
    other = tmp_path / "other.jsonl"
    spread.Parts(other, RECIPE, plan(), "tiny", **where).close()
    spread.Parts(other, RECIPE, plan(), "tiny", **where).close()


def test_without_ray_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"mmroute\[ray\]"):
        spread.on_ray("tiny", RECIPE, plan(), tmp_path / "parts.jsonl", 1)
