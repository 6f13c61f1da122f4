"""The bundled model that draws: it opens by its name, reads tiles exactly, and draws and answers what its file says."""

import json
from pathlib import Path

import pytest
import torch

import mmroute
from mmroute import hub
from mmroute.backbones.images import prepare
from mmroute.config import parse, read_yaml
from mmroute.tasks.base import Spec
from mmroute.train.picture_model import CODES
from mmroute.train.pictures import Recipe, exam
from mmroute.train.tile_codes import TILE

FOLDER = Path(mmroute.__file__).parent / "assets" / "draw"
ITEMS = 8


@pytest.fixture(scope="module")
def task():
    return hub.load("tasks", "frozenlake", preset="nano", tile_px=TILE, prompt_order="question_first")


@torch.no_grad()
def test_a_picture_of_tiles_enters_as_its_codes(task):
    model = mmroute.load("draw")
    for sample in task.samples("test", 2):
        pixels = prepare(model, model.processor, task.messages(sample, "image"))["pixel_values"]
        codes = task.codes(Spec.from_dict(sample.meta["spec"])).reshape(-1)
        assert (model.model.get_image_tokens(pixels)[0] - CODES).tolist() == codes.tolist()


def test_it_draws_and_answers_as_recorded():
    recipe = parse(Recipe, {**read_yaml(FOLDER / "recipe.yaml"), "exam_items": ITEMS}, "recipe")
    recorded = json.loads((FOLDER / "RESULTS.json").read_text())["tasks"]["frozenlake"]
    found = exam(FOLDER, recipe)
    for name in ("accuracy", "v_ratio"):
        assert found[name] >= recorded[name] - 1.5 / ITEMS, name
