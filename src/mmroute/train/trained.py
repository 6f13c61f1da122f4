"""The folder that a trainer of parts leaves: what was added, the backbone's new weights, the recipe and the figures."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mmroute import recipe as recipes
from mmroute.engine.attach import Routed
from mmroute.train.delta import save_delta
from mmroute.train.loop import replacing
from mmroute.train.recipe import as_yaml
from mmroute.train.tuning import Tuning

__all__ = ["write_trained"]


def write_trained(
    folder: Path, routed: Routed, tuning: Tuning, recipe: recipes.Recipe, results: Mapping[str, Any]
) -> Path:
    """Writes what a recipe's `trained` takes; weights of the backbone only where they moved.

    Args:
        folder: to write; made where it is missing.
        routed: the attached model.
        tuning: what was trained of its backbone.
        recipe: of the run.
        results: where it comes from, and its figures.

    Returns:
        The folder.

    Raises:
        MmrouteError: the disk is full.
    """
    routed.save_pretrained(folder)
    save_delta(folder, tuning.before, tuning.weights(), routed.model.config.name_or_path)
    said = {key: value for key, value in asdict(replace(recipe, trained=None)).items() if value is not None}
    plain = json.loads(json.dumps(said))  # tuples as lists, which YAML can write
    for name, text in (("recipe.yaml", as_yaml(plain)), ("RESULTS.json", json.dumps(results, indent=1) + "\n")):
        with replacing(folder / name) as beside:
            beside.write_text(text)
    return folder
