"""Every method says where it is from, where it differs and how that was checked; every shipped recipe runs."""

import pytest

from mmroute import hub, recipe

METHODS = [(kind, name) for kind in hub.KINDS for name in hub.names(kind)]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_method_explains_itself_and_each_of_its_options(kind: str, name: str) -> None:
    said = hub.describe(kind, name)
    assert said.summary.endswith((".", "?"))
    if name != "none":  # the control of a folder is no one's method
        assert said.source, f"{kind}/{name}.py: no `Source:` in its module docstring"
    if kind == "prune":
        assert said.deviates, f"{kind}/{name}.py: no `Deviates:`"
        assert said.checked, f"{kind}/{name}.py: no `Checked:`"
    for option in said.options:
        assert option.doc.endswith("."), f"{kind}/{name}.py: option {option.name} has no docstring"


@pytest.mark.parametrize("name", hub.names("prune"))
def test_what_a_source_says_of_its_options_is_what_runs(name: str) -> None:
    config = hub.load("prune", name).config
    assert [o.name for o in hub.describe("prune", name).options] == list(vars(config))


@pytest.mark.parametrize("name", list(hub.recipes()))
def test_a_shipped_recipe_parses_and_builds_its_methods(name: str) -> None:
    read = recipe.read(name)
    assert read.name == name
    pruner = read.build("prune")
    beyond_words = ("latent", "latent-depth", "vedas", "coconut", "ivtlr", "pause", "image", "boxes")
    assert (pruner is None) == (name in ("none", "cot", "direct", "prp-small", *beyond_words))
    if pruner is not None:
        method = "dare" if name.startswith("dare-") else {"cut": "schedule"}.get(name, name)
        assert type(pruner).__module__ == f"mmroute.prune.{method}"
    assert read.build("think") is not None


def test_the_recipes_of_the_command_line_are_there() -> None:
    promised = {"none", "direct", "cot", "schedule", "random", "fastv", "pyramiddrop", "knorm", "oracle"}
    assert promised <= set(hub.recipes())
