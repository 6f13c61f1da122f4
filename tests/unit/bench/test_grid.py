"""A bench recipe becomes runs before any of them starts: budgets, controls, and names that say what was run."""

from dataclasses import replace

import pytest

from mmroute import recipe as recipes
from mmroute.bench import grid
from mmroute.errors import ConfigError
from mmroute.prune.base import keep_count
from mmroute.tokens import Modality
from mmroute.trace import Shape

SHAPE = Shape(hidden=16, layers=6, heads=2, kv_heads=1, head_dim=8, mlp=32, vocab=64, itemsize=4)
UNTRAINED = [
    "none", "random", "cut", "oracle", "schedule", "fastv", "pyramiddrop", "reroute", "sparsevlm", "visionzip",
    "divprune", "dart", "dare-tf", "snapkv", "knorm", "keydiff", "streaming",
]  # fmt: skip


@pytest.fixture(scope="module")
def cases():
    return grid.cases(grid.read("bench-spatial", methods=UNTRAINED), SHAPE)


def mean_share(recipe, modality):
    pruner = recipe.build("prune")
    pruner.fit(SHAPE)
    rates = [pruner.rate(i, 6, 0, modality) if pruner.acts(i, 6) else None for i in range(6)]
    return sum(1.0 if rate is None else keep_count(10_000, rate, 0) / 10_000 for rate in rates) / 6


def test_every_method_runs_at_the_budget_it_is_named_by(cases):
    feasible = [case for case in cases if not case.infeasible]
    assert {case.row for case in feasible} == set(UNTRAINED)
    for case in feasible:
        if case.recipe.prune is not None:
            where = f"{case.label}"
            assert mean_share(case.recipe, Modality.VISION) == pytest.approx(case.budget.vision, abs=2e-3), where
            assert mean_share(case.recipe, Modality.TEXT) == pytest.approx(case.budget.text, abs=2e-3), where


def test_a_control_keeps_as_many_in_every_layer_and_hop_and_in_the_same_way(cases):
    chosen = [case for case in cases if case.control is not None]
    assert {case.row for case in chosen} == set(UNTRAINED) - {"none", "random", "cut"}
    for case in chosen:
        ours, theirs = case.recipe.build("prune"), case.control.recipe.build("prune")
        for pruner in (ours, theirs):
            pruner.fit(SHAPE)
        assert ours.action == theirs.action
        for layer in range(6):
            for hop in (0, 3):
                for modality in Modality:
                    shares = [p.rate(layer, 6, hop, modality) if p.acts(layer, 6) else None for p in (ours, theirs)]
                    one, other = (1.0 if share is None else share for share in shares)
                    assert one == pytest.approx(other), f"{case.label}, layer {layer}"


def test_equal_counts_share_a_control_and_plain_random_is_one(cases):
    at = {case.label: case for case in cases}
    assert at["fastv-v40-t100"].control is at["dart-v40-t100"].control
    assert at["oracle-v40-t100"].control is at["random-v40-t100"]
    assert at["knorm-v20-t70"].control is at["keydiff-v20-t70"].control
    assert at["fastv-v40-t100"].control is not at["fastv-v80-t100"].control


def test_what_cannot_be_met_is_said_and_not_moved(cases):
    cannot = {case.label: case.infeasible for case in cases if case.infeasible}
    assert "must be at least 0.167" in cannot["fastv-v10-t100"]
    assert "random-v10-t100" not in cannot
    assert not any("-t70" in label and label.startswith(("fastv", "oracle", "divprune")) for label in cannot)


def test_text_is_left_out_by_those_that_can(cases):
    text = {case.row for case in cases if case.budget.text < 1}
    assert text == {"random", "cut", "schedule", "dare-tf", "snapkv", "knorm", "keydiff", "streaming"}


def test_cut_is_whole_layers_a_share_and_nothing(cases):
    at = {case.label: case for case in cases}
    assert at["cut-v40-t100"].recipe.prune["vision"] == pytest.approx((1, 1, 0.4, 0, 0, 0))
    assert at["cut-v10-t100"].recipe.prune["vision"] == pytest.approx((0.6, 0, 0, 0, 0, 0))


def test_symmetric_gets_the_mean_of_both_budgets():
    chosen = grid.read("bench-spatial", ["methods.symmetric={}", "vision=[0.4]", "text=[0.7]"], ["symmetric"])
    (case,) = grid.cases(chosen, SHAPE)
    assert case.recipe.prune["keep"] == pytest.approx(0.7 * 0.4 + 0.3 * 0.7)
    assert case.control.recipe.prune["counts_of"]["name"] == "symmetric"


def test_a_recipe_s_own_budget_is_what_its_pruner_says():
    chosen = grid.read("bench-spatial", ["budget=own", "n=5"], ["none", "random", "fastv"])
    assert [(c.row, round(c.budget.vision, 3), c.budget.text) for c in grid.cases(chosen, SHAPE)] == [
        ("none", 1.0, 1.0),
        ("random", 0.5, 1.0),
        ("fastv", 0.5, 1.0),
    ]


def test_cache_policies_are_methods_without_controls_trained_for_them_or_not():
    chosen = grid.read("bench-kv")
    shape = replace(SHAPE, hidden=128)
    cases = {c.row: c for c in grid.cases(chosen, shape)}
    policies = {row: case.recipe.prune.get("cache_policy") for row, case in cases.items() if case.recipe.prune}
    names = ("append", "progressive", "capped", "progressive-untrained", "capped-untrained")
    assert policies == {row: row.removesuffix("-untrained") for row in names}
    trained = {row: "dare-lh-capped" if row in ("progressive", "capped") else "dare-lh" for row in names}
    assert {row: case.recipe.trained for row, case in cases.items()} == {"none": None, **trained}
    assert not any(case.control for case in cases.values())
    assert all(case.control for case in grid.cases(replace(chosen, controls=True), shape) if case.row != "none")


def test_trained_methods_name_their_folder_or_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"method dare-lh: trained: no routers in 'runs/ablate/dare-lh/.*--methods"):
        grid.cases(grid.read("bench-ablate", methods=["none", "dare-lh"]), SHAPE)


@pytest.mark.parametrize(
    ("name", "sets", "methods", "message"),
    [
        ("bench-spatiol", [], [], "no bench recipe 'bench-spatiol'; one of bench-ablate, bench-gate, bench-kv, bench-"),
        ("bench-spatial", [], ["fastb"], "has no method fastb; it has none, random"),
        ("bench-spatial", ["vision=[1.2]"], [], r"bench bench-spatial\.vision\.0: .*less than or equal to 1"),
        ("bench-spatial", ["visoin=[1]"], [], "no such option; known: name, model"),
    ],
)
def test_wrong_bench_recipes_are_refused(name, sets, methods, message):
    with pytest.raises(ConfigError, match=message):
        grid.read(name, sets, methods)


def test_a_run_s_name_follows_all_that_decides_it():
    fastv = recipes.read("fastv")
    names = {
        grid.key_of(recipe, about)
        for recipe in (fastv, replace(fastv, prefix_tokens=0), recipes.read("fastv", ["prune.vision_keep=0.4"]))
        for about in ({"n": 1}, {"n": 2})
    }
    assert len(names) == 6
    assert grid.key_of(fastv, {"n": 1}) == grid.key_of(recipes.read("fastv"), {"n": 1})
