"""Recipes: every shipped one builds, and mistakes are named."""

import pytest

from mmroute import hub
from mmroute.errors import ConfigError
from mmroute.recipe import load_recipe


@pytest.mark.parametrize("name", hub.recipes())
def test_every_shipped_recipe_builds(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert set(recipe.resolved()) == {"prune", "deepen", "think"}
    assert (recipe.pruner() is not None) == recipe.routes
    assert recipe.thinker().style == ("direct" if name == "direct" else "cot")


def test_the_recipes_of_the_command_line_are_there():
    promised = {"none", "direct", "cot", "schedule", "random", "fastv", "pyramiddrop", "knorm", "oracle"}
    assert promised <= set(hub.recipes())


def test_set_replaces_one_option_and_keeps_the_others():
    recipe = load_recipe("fastv", ["prune.vision_keep=0.3"])
    assert recipe.prune == {"name": "fastv", "vision_keep": 0.3, "start_layer": 2}
    assert recipe.pruner().config.vision_keep == 0.3


def test_a_recipe_may_be_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("prune: {name: random, vision_keep: 0.2}\n")
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.prune["vision_keep"], recipe.think["name"]) == ("mine", 0.2, "text")


@pytest.mark.parametrize(
    ("name", "assignments", "message"),
    [
        ("fastw", [], "did you mean 'fastv'"),
        ("missing.yaml", [], "no recipe named"),
        ("none", ["prun.vision_keep=1"], "prun: no such option"),
        ("none", ["prune=fastv"], "prune"),
        ("none", ["think={}"], None),
    ],
)
def test_mistakes_are_named(name, assignments, message):
    if message is None:  # an empty mapping changes nothing
        assert load_recipe(name, assignments).think["name"] == "text"
        return
    with pytest.raises(ConfigError, match=message):
        load_recipe(name, assignments)


def test_a_part_without_a_name_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("prune: {vision_keep: 0.2}\n")
    with pytest.raises(ConfigError, match="prune has no name"):
        load_recipe(str(path))


def test_an_unknown_option_surfaces_when_the_part_is_built():
    with pytest.raises(ConfigError, match="vision_kep: no such option"):
        load_recipe("random", ["prune.vision_kep=0.3"]).pruner()
