"""The bundled model that looks where its thoughts point: it opens by its name, points and answers as its file says."""

import json
from pathlib import Path

import mmroute
from mmroute.config import parse, read_yaml
from mmroute.train.boxes import Recipe, exam

FOLDER = Path(mmroute.__file__).parent / "assets" / "boxes"
ITEMS = 8


def test_it_points_and_answers_as_recorded():
    recipe = parse(Recipe, {**read_yaml(FOLDER / "recipe.yaml"), "exam_items": ITEMS}, "recipe")
    recorded = json.loads((FOLDER / "RESULTS.json").read_text())["tasks"]["gridspatial"]
    found = exam(FOLDER, recipe)
    for name in ("accuracy", "boxes"):
        assert found[name] >= recorded[name] - 2.5 / ITEMS, name
