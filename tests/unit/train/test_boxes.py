"""Thoughts with boxes of a small LLaVA: texts hold what the simulator says, training sees what a prompt brings."""

import json

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import mmroute
from mmroute import hub
from mmroute.backbones.images import prepare
from mmroute.config import parse, read_yaml
from mmroute.errors import CheckpointMismatch, ConfigError
from mmroute.tasks._texts import EOS, IMAGE
from mmroute.train import boxes
from mmroute.train.box_model import TILE, WORDS, Shape, build, make_processor, merged
from mmroute.train.boxes import Recipe, Run, collate, exam, story
from mmroute.train.folder import write_stock
from mmroute.train.naming import IGNORED
from mmroute.train.recipe import find_recipe
from mmroute.train.scratch import family_of, train_scratch
from mmroute.train.stories import box_words, boxed

SHAPE = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "mlp": 32, "vision_hidden": 32, "vision_mlp": 32}


def world(**options):
    return hub.load("tasks", "gridspatial", preset="nano", **options)


def recipe(**options):
    small = {"family": "llava", "model": SHAPE, "steps": 4, "batch": 2, "eval_items": 2, "exam_items": 2}
    return parse(Recipe, {**small, "save_every": 2, "eval_every": 3, **options}, "recipe")


@pytest.fixture(scope="module")
def think():
    return hub.load("think", "boxes")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A folder of the small LLaVA's, opened as a user's."""
    folder = tmp_path_factory.mktemp("boxes") / "model"
    write_stock(folder, build(Shape(**SHAPE), 4, 0), make_processor(4), "x: 1\n", {})
    return mmroute.load(folder, dtype="float32")


def specs(task):
    """One item of each kind of question."""
    found = {}
    for i in range(60):
        spec = task.spec("val", i)
        found.setdefault(spec.world["relation"] if len(spec.world["candidates"]) else "relation", spec)
    return [found[kind] for kind in ("relation", "nearest", "between")]


@pytest.mark.parametrize("name", ["gridspatial", "maze", "arrows"])
def test_a_story_is_the_right_chain_with_a_box_wherever_it_says_where_something_is(name, think):
    task = hub.load("tasks", name, preset="tiny")
    spec = task.spec("val", 3)
    pieces = boxed(task, spec)
    assert [piece.box for piece in pieces][-1] is None
    hops = task.sample(spec).hops
    assert len(pieces) == len(hops) + 1
    for piece, state in zip(pieces, task.trace(spec)[1:], strict=False):
        assert piece.box == tuple(task.box(spec, state.cell))
        assert think.box_at(" ".join(piece.words)) == piece.box
        top, left, rows, columns = think.window(piece.box, spec.canvas, spec.canvas)
        assert (top * spec.canvas + left, rows, columns) == (task.tile(spec, state.cell), 1, 1)
    words = [word for piece in pieces for word in piece.words[: None if piece.box is None else -9]]
    assert words == task.words(spec, "cot").response
    assert len(box_words(pieces[0].box)) == 9


def test_training_sees_the_prompt_that_a_user_makes_and_the_pixels_that_the_processor_gives(loaded, think):
    task = world()
    for spec in specs(task):
        prompt, rest, cells = story(task, spec, think)
        asked = prepare(loaded, loaded.processor, task.messages(task.sample(spec), "cot"))
        assert asked["input_ids"][0].tolist() == prompt
        batch = collate(task, [spec], think)
        torch.testing.assert_close(batch.pixels, asked["pixel_values"], rtol=0, atol=1e-5)
        assert cells == [task.tile(spec, state.cell) for state in task.trace(spec)[1:]]
        assert WORDS[rest[-1]] == EOS
        assert loaded.processor.tokenizer.decode(rest).count("</coor>") == len(cells)


def test_the_name_of_a_thing_is_one_word_and_comes_back_as_it_was(loaded):
    text = "task: gridspatial red circle left_of blue square . <coor> 0.250 , 0.500 </coor> A green diamond red ."
    tokenizer = loaded.processor.tokenizer
    tokens = tokenizer.tokenize(text)
    assert tokens == merged(text.split())
    assert {"red circle", "green diamond", "red", "0.250"} <= set(tokens)
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]


def test_words_are_learned_and_image_features_are_not(think):
    task = world()
    batch = collate(task, specs(task), think)
    placeholder = WORDS.index(IMAGE)
    assert ((batch.ids == placeholder) == (batch.source >= 0)).all()
    assert (batch.labels[batch.source >= 0] == IGNORED).all()
    for ids, labels, source in zip(batch.ids, batch.labels, batch.source, strict=True):
        learned = labels != IGNORED
        assert (labels[learned] == ids[learned]).all()
        assert int((source >= 0).sum()) > 16
        behind = learned.nonzero()[0]
        assert int((learned | (source >= 0))[behind:].sum()) == int((ids[behind:] != 0).sum())
        assert source[source >= 0][:16].tolist() == list(range(16))


@torch.no_grad()
def test_a_training_pass_gives_the_logits_that_a_session_gives_word_by_word(loaded, think):
    from mmroute.session import Session

    task, run = world(), Run.__new__(Run)
    run.recipe, run.model = recipe(), loaded
    for spec in specs(task)[:2]:
        logits, early = run._run(collate(task, [spec], think))
        assert early.shape[1] == 16
        prompt = prepare(loaded, loaded.processor, task.messages(task.sample(spec), "cot"))
        (grid,) = mmroute.backbones.of(loaded).image_features(loaded, prompt)
        with mmroute.attach(loaded) as routed:
            session = Session(routed)
            seen = [session.append(prompt)[0]]
            for piece in boxed(task, spec):
                seen += [session.step(torch.tensor([WORDS.index(word)]), [1])[0] for word in merged(piece.words)]
                if piece.box is not None:
                    top, left, _, _ = think.window(piece.box, 4, 4)
                    seen[-1] = session.insert(grid[4 * top + left][None, None], torch.ones(1, 1).long(), [1])[0]
        torch.testing.assert_close(logits, torch.stack(seen[:-1]), rtol=0, atol=1e-4)


def test_steps_lower_both_losses_and_reach_the_tower(tmp_path):
    run = Run(recipe(batch=4, warmup=1, steps=50, muon=0.02, adamw=0.02), tmp_path)
    before = run.model.model.vision_tower.embeddings.patch_embedding.weight.clone()
    losses = [run.step(0) for _ in range(8)]
    assert losses[-1]["loss"] < losses[0]["loss"] * 0.8
    assert losses[-1]["place"] < losses[0]["place"]
    assert not torch.equal(before, run.model.model.vision_tower.embeddings.patch_embedding.weight)


def test_read_outs_learn_places_alone(think, tmp_path):
    run = Run(recipe(probe=((0.0, 1.0),)), tmp_path)
    batch = collate(run.task, run.drawn(run.rng(0)), think, probe=True)
    learned = batch.labels != IGNORED
    spec = run.drawn(run.rng(0))[0]
    places = {run.task.at(spec, (r, c)) for _, _, r, c in spec.world["objects"]}
    assert {WORDS[token] for token in batch.labels[0][learned[0]].tolist()} == places
    assert (batch.labels[learned] == batch.ids[learned]).all()
    assert (batch.source >= 0).sum(1).tolist() == [16, 16], "nothing enters behind the prompt"
    assert run.step(0)["loss"] > 0


def test_a_killed_run_goes_on_to_the_weights_of_one_that_was_not(tmp_path):
    whole = Run(recipe(), tmp_path / "whole")
    whole.train()
    Run(recipe(), tmp_path / "killed").train(stop_after=3)
    resumed = Run(recipe(), tmp_path / "killed", resume=True)
    assert resumed.progress.step == 2
    resumed.train()
    for (name, one), (_, other) in zip(whole.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert all(0 <= entry["look"]["boxes"] <= 1 for entry in log if "look" in entry)


def test_training_ends_in_a_folder_that_stock_classes_open_and_that_was_examined(tmp_path):
    assert family_of("boxes") == "llava"
    parse(Recipe, read_yaml(find_recipe("boxes")), "recipe")
    small = mmroute.config.resolved(recipe(steps=1, eval_every=1))
    folder = train_scratch(Run, "boxes", small, tmp_path / "run")
    assert LlavaForConditionalGeneration.from_pretrained(folder).dtype == torch.bfloat16
    found = json.loads((folder / "RESULTS.json").read_text())["tasks"]["gridspatial"]
    assert found == exam(folder, recipe(steps=1, eval_every=1))
    assert found["n"] == 2
    assert {"accuracy", "ci95", "boxes", "chance"} <= set(found)
    again = Run(recipe(start=str(folder)), tmp_path / "again")
    stored = LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, stored[name].float()) for name, value in again.model.state_dict().items())
    with pytest.raises(CheckpointMismatch, match="cannot be the start of this recipe"):
        Run(recipe(start=str(folder), model={**SHAPE, "mlp": 48}), tmp_path / "other")


def test_pictures_whose_boxes_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="boxes of 10 x 10 tiles cannot be written; take a preset with 4 or 8"):
        Run(recipe(preset="small"), tmp_path)
    assert TILE == 28, "the tile size that tasks draw unless told otherwise"
    assert boxes.Run.tile_px == TILE


def test_heads_of_the_first_layer_start_by_looking_back_whatever_stands_there():
    model = build(Shape(), 4, 0).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(len(WORDS), (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = model.model.language_model(input_ids=ids, output_attentions=True).attentions
    for back, head in ((1, 2), (2, 3)):
        assert maps[0][:, head].diagonal(-back, 1, 2).mean() > 0.9
        assert maps[1][:, head].diagonal(-back, 1, 2).mean() < 0.5, "only the first layer"
