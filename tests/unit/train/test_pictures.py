"""Drawn thoughts of small models: tiles are codes exactly, texts hold what the simulator says, a killed run goes on."""

import json

import numpy as np
import pytest
import torch
from transformers import ChameleonForConditionalGeneration

import mmroute
from mmroute import hub
from mmroute.backbones.images import prepare
from mmroute.config import parse, read_yaml, resolved
from mmroute.errors import ConfigError, InputError
from mmroute.tasks import _skins
from mmroute.tasks._visual import judge_drawings
from mmroute.train.discrepancy import code_distances, token_discrepancy
from mmroute.train.folder import write_stock
from mmroute.train.picture_model import CODES, WORDS, Shape, build, make_processor
from mmroute.train.pictures import Recipe, Run, exam, main, story
from mmroute.train.recipe import as_yaml, find_recipe
from mmroute.train.scratch import family_of, train_scratch
from mmroute.train.tile_codes import TILE, code_name, picture

SHAPE = {"hidden": 32, "layers": 1, "heads": 2, "mlp": 32}


@pytest.fixture(scope="module")
def model():
    return build(Shape(**SHAPE), 4, 0).eval()


def world(**options):
    return hub.load("tasks", "frozenlake", preset="nano", tile_px=TILE, prompt_order="question_first", **options)


def recipe(**options):
    small = {"family": "chameleon", "model": SHAPE, "steps": 4, "batch": 2, "eval_items": 2, "exam_items": 2}
    return parse(Recipe, {**small, "save_every": 2, "eval_every": 3, **options}, "recipe")


@torch.no_grad()
def test_every_tile_of_the_atlas_is_its_own_code(model):
    processor = make_processor(4)
    for start in range(0, _skins.NUM_CODES, 16):
        codes = np.arange(start, start + 16) % _skins.NUM_CODES
        shown = picture(codes)
        assert (_skins.read(shown, TILE).reshape(-1) == codes).all()
        pixels = processor.image_processor(shown, return_tensors="pt")["pixel_values"]
        assert model.model.vqmodel.encode(pixels, return_dict=True).image_tokens.tolist() == codes.tolist()
    assert [WORDS[CODES + code] for code in (0, 295)] == [code_name(0), code_name(295)]


@torch.no_grad()
def test_what_lies_beside_a_tile_does_not_change_its_code(model):
    drawn = np.random.default_rng(0)
    processor = make_processor(4)
    for _ in range(6):
        codes = drawn.integers(_skins.NUM_CODES, size=16)
        pixels = processor.image_processor(picture(codes), return_tensors="pt")["pixel_values"]
        assert model.model.vqmodel.encode(pixels, return_dict=True).image_tokens.tolist() == codes.tolist()


@pytest.mark.parametrize("order", ["image_first", "question_first"])
def test_a_text_is_the_prompt_that_a_user_makes_and_what_the_simulator_says(order, model, tmp_path):
    task = world() if order == "question_first" else hub.load("tasks", "frozenlake", preset="nano", tile_px=TILE)
    folder = tmp_path / "model"
    write_stock(folder, model, make_processor(4), as_yaml(resolved(recipe())), {})
    loaded = mmroute.load(folder)
    spec = next(s for s in (task.spec("val", i) for i in range(20)) if len(task.trace(s)) > 2)
    prompt, pieces = story(task, spec)
    asked = prepare(loaded, loaded.processor, task.messages(task.sample(spec), "image"))
    codes = torch.tensor(prompt) >= CODES
    assert asked["input_ids"][0].masked_fill(codes, loaded.config.image_token_id).tolist() == (
        torch.tensor(prompt).masked_fill(codes, loaded.config.image_token_id).tolist()
    )
    seen = loaded.model.get_image_tokens(asked["pixel_values"])[0]
    assert seen.tolist() == [token for token in prompt if token >= CODES]
    assert len(pieces) == len(task.trace(spec))
    drawings = [picture([token - CODES for token in piece if token >= CODES]) for piece in pieces[:-1]]
    worth = judge_drawings(task, spec, drawings)
    assert (worth.v_acc, worth.v_red, worth.v_ratio) == (1, 0, 1)
    moves = task.moves(spec)
    assert [[WORDS[i] for i in piece[:3]] for piece in pieces[:-1]] == [
        [f"s{i}", moves[i - 1], "<racm3:break>"] for i in range(1, len(pieces))
    ]
    assert [WORDS[i] for i in pieces[-1]] == ["answer:", task.choices(spec)[spec.answer].text, "<|im_end|>"]


def test_markov_texts_show_the_last_picture_and_teach_one_hop(tmp_path):
    run = Run(recipe(context="markov2"), tmp_path)
    task, size = run.task, run.canvas**2
    specs = [task.spec("val", i) for i in range(12)]
    shown = 0
    for spec, (given, learned) in zip(specs, run.texts(specs, np.random.default_rng(0)), strict=True):
        prompt, pieces = story(task, spec)
        hop = pieces.index(learned)
        assert given[: len(prompt)] == prompt
        words = [token for piece in pieces[:hop] for token in piece[:2]]
        assert given[len(prompt) :] == words + (pieces[hop - 1][2:] if hop else [])
        shown += len([token for token in given[len(prompt) :] if token >= CODES]) == size
    assert 0 < shown < len(specs)


def test_the_discrepancy_is_the_expected_distance_and_leads_to_the_right_code(model):
    apart = code_distances(model.model.vqmodel)
    T = len(apart)
    assert apart.shape == (T, T)
    assert float(apart.diagonal().abs().max()) < 1e-5
    assert abs(float(apart.sum()) / (T * (T - 1)) - 1) < 1e-5
    logits = torch.randn(3, T, requires_grad=True)
    right = torch.tensor([5, 0, 200])
    loss = token_discrepancy(logits, right, apart)
    share = logits.detach().softmax(1).tolist()
    slow = sum(share[n][t] * float(apart[right[n], t]) for n in range(3) for t in range(T))
    assert abs(float(loss.detach()) - slow / 3) < 1e-4
    logits = torch.zeros(3, T, requires_grad=True)
    token_discrepancy(logits, right, apart).backward()
    assert (logits.grad.argmin(1) == right).all(), "no code is pushed up more than the right one"


def test_a_killed_run_goes_on_to_the_weights_of_one_that_was_not(tmp_path):
    whole = Run(recipe(), tmp_path / "whole")
    whole.train()
    killed = Run(recipe(), tmp_path / "killed")
    killed.train(stop_after=3)
    with pytest.raises(InputError, match="--resume"):
        Run(recipe(), tmp_path / "killed")
    with pytest.raises(ConfigError, match="another recipe"):
        Run(recipe(batch=3), tmp_path / "killed", resume=True)
    resumed = Run(recipe(), tmp_path / "killed", resume=True)
    assert resumed.progress.step == 2
    resumed.train()
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert all(0 <= entry["look"]["codes"] <= 1 for entry in log if "look" in entry)


def test_steps_lower_both_losses_and_leave_the_tokenizer_alone(tmp_path):
    run = Run(recipe(batch=4, warmup=1, steps=50, muon=0.03, adamw=0.02), tmp_path)
    before = {k: v.clone() for k, v in run.model.model.vqmodel.state_dict().items()}
    losses = [run.step(0) for _ in range(8)]
    assert losses[-1]["loss"] < losses[0]["loss"] * 0.8
    assert losses[-1]["discrepancy"] < losses[0]["discrepancy"]
    assert all(torch.equal(v, before[k]) for k, v in run.model.model.vqmodel.state_dict().items())


def test_training_ends_in_a_folder_that_stock_classes_open_and_that_was_examined(tmp_path):
    assert family_of("draw") == "chameleon"
    assert family_of("tiny") is None
    parse(Recipe, read_yaml(find_recipe("draw")), "recipe")
    small = resolved(recipe(steps=1, eval_every=1))
    folder = train_scratch(Run, "draw", small, tmp_path / "run")
    stock = ChameleonForConditionalGeneration.from_pretrained(folder)
    assert stock.dtype == torch.bfloat16
    results = json.loads((folder / "RESULTS.json").read_text())
    found = results["tasks"]["frozenlake"]
    assert found["n"] == 2
    assert {"accuracy", "ci95", "v_acc", "v_red", "v_ratio", "chance"} <= set(found)
    assert found == exam(folder, recipe(steps=1, eval_every=1))
    assert found["keep"] == {"vision": 1.0, "text": 1.0}
    assert 0 <= found["drawn_right"] <= found["drawn_right_ci95"][1]
    out = tmp_path / "routed.json"
    main(folder, out, items=2, recipe="random", set_=["prune.vision_keep=0.5", "think.name=image"])
    routed = json.loads(out.read_text())
    assert (routed["recipe"], routed["prune"]["vision_keep"], routed["trained"]) == ("random", 0.5, "none")
    assert routed["tasks"]["frozenlake"]["keep"]["vision"] < 0.7
    assert routed["tasks"]["frozenlake"]["keep"]["text"] == 1
    with pytest.raises(ConfigError, match="recipe random draws nothing to judge"):
        main(folder, out, items=2, recipe="random")
    with pytest.raises(ConfigError, match="no list of actions"):
        Run(recipe(task="needle"), tmp_path / "other")
