"""Recipes: every shipped one builds, and mistakes are named."""

import pytest

from mmroute import hub, recipe
from mmroute.errors import ConfigError

LATENT = ("latent", "latent-depth", "vedas", "coconut", "ivtlr", "pause")


@pytest.mark.parametrize("name", hub.recipes())
def test_every_shipped_recipe_builds(name):
    found = recipe.read(name)
    assert found.name == name
    assert (found.build("prune") is None) == (name in ("none", "direct", "cot", "prp-small", "image", "boxes", *LATENT))
    assert (found.build("deepen") is None) == (name not in ("latent-depth", "vedas"))
    other = {"direct": "direct", "image": "image", "dare-image": "image"}
    style = "latent" if name in LATENT else other.get(name, "cot")
    assert found.build("think").style == style


def test_the_recipes_of_the_command_line_are_there():
    promised = {"none", "direct", "cot", "schedule", "random", "fastv", "pyramiddrop", "knorm", "oracle"}
    assert promised <= set(hub.recipes())


def test_set_replaces_one_option_and_keeps_the_others():
    found = recipe.read("fastv", ["prune.vision_keep=0.3"])
    assert found.prune == {"name": "fastv", "vision_keep": 0.3, "start_layer": 2}
    assert found.build("prune").config.vision_keep == 0.3


def test_thinking_is_written_text_unless_named():
    assert recipe.read("random", ["think.max_new_tokens=7"]).build("think").max_new_tokens == 7
    assert recipe.read("random", ["think.name=direct"]).build("think").style == "direct"


def test_a_part_that_is_no_mapping_is_refused_not_merged(tmp_path):
    path = tmp_path / "short.yaml"
    path.write_text("prune: fastv\n")
    for sets in ([], ["prune.vision_keep=0.3"]):
        with pytest.raises(ConfigError, match="prune"):
            recipe.read(str(path), sets)


def test_a_recipe_may_be_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("prune: {name: random, vision_keep: 0.2}\n")
    found = recipe.read(str(path))
    assert (found.name, found.prune["vision_keep"]) == ("mine", 0.2)


@pytest.mark.parametrize(
    ("name", "sets", "message"),
    [
        ("fastw", [], "no recipe 'fastw'"),
        ("missing.yaml", [], "no recipe 'missing.yaml'"),
        ("none", ["prun.vision_keep=1"], "prun: no such option"),
        ("random", ["prune.vision_kep=0.3"], "vision_kep: no such option"),
        ("random", ["prune.vision_keep=1.3"], "less than or equal to 1"),
        ("none", ["prune=fastv"], "prune"),
    ],
)
def test_mistakes_are_named(name, sets, message):
    with pytest.raises(ConfigError, match=message):
        recipe.read(name, sets)


def test_a_part_without_a_name_is_refused(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("prune: {vision_keep: 0.2}\n")
    with pytest.raises(ConfigError, match="prune: no name given"):
        recipe.read(str(path))
