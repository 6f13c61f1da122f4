"""Calibration measures what it says: the stock model's loss, the layer behind which the image is not read, a budget."""

import itertools
import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml

from mmroute import backbones, calibrate, hub
from mmroute.calibrate import Gold, Loss
from mmroute.errors import BudgetError, ConfigError
from mmroute.prune.schedule import Schedule

LENGTHS = (6, 4, 5)


@pytest.fixture(scope="module")
def model() -> Any:
    return families.make("qwen2_5_vl", layers=5)


def blind_from(model: Any, layer: int) -> Any:
    """No position of the layers from `layer` on reads another: what they would drop, no one misses."""
    with torch.no_grad():
        for late in backbones.of(model).text_model(model).layers[layer:]:
            late.self_attn.o_proj.weight.zero_()
    return model


def own_words(model: Any, seed: int = 1) -> Gold:
    """Prompts of three rows with padding, and what the model itself writes after them."""
    prompt = families.make_inputs("qwen2_5_vl", model, batch=3, pads=[0, 3, 5], seed=seed)
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=max(LENGTHS), do_sample=False)
    completion = written[:, prompt["input_ids"].shape[1] :]
    real = torch.arange(completion.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return Gold(prompt, completion, real)


@torch.no_grad()
def test_unrouted_loss_is_the_stock_models(model: Any) -> None:
    gold = own_words(model)
    N = gold.prompt["input_ids"].shape[1]
    batch = {**gold.prompt, "input_ids": torch.cat([gold.prompt["input_ids"], gold.completion], 1)}
    batch["attention_mask"] = torch.cat([gold.prompt["attention_mask"], gold.real.long()], 1)
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = (batch["input_ids"] == families.IMAGE).long()
    logits = model(**batch).logits[:, N - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), gold.completion, reduction="none")
    loss = calibrate.measure(model, [gold])
    assert loss.nll == pytest.approx(float(nll[gold.real].mean()), abs=1e-5)
    assert loss.exact == 1.0  # greedy decoding wrote it


def test_columns_behind_a_completion_do_not_count(model: Any) -> None:
    gold = own_words(model)
    other = Gold(gold.prompt, torch.where(gold.real, gold.completion, 7), gold.real)
    assert calibrate.measure(model, [other]) == calibrate.measure(model, [gold])


def test_a_model_that_cannot_read_the_image_behind_layer_3_has_its_cliff_there() -> None:
    blind = blind_from(families.make("qwen2_5_vl", layers=5), 3)
    cliff = calibrate.measure_cliff(blind, [own_words(blind)])
    assert cliff.cutoff_layer == 3
    assert len(cliff.nll) == len(cliff.exact) == 6
    assert cliff.nll[3:] == pytest.approx([cliff.nll[5]] * 3, abs=1e-5)
    assert cliff.nll[2] > cliff.nll[5] + 0.01
    assert cliff.exact[2] < 1.0
    assert cliff.exact[5] == 1.0
    assert cliff.num_items == 3


def test_a_budget_that_pays_for_all_layers_before_the_cliff_keeps_them_whole() -> None:
    blind = blind_from(families.make("qwen2_5_vl", layers=5), 3)
    rates = calibrate.measure_schedule(blind, [own_words(blind)], budget=0.7)
    assert rates.vision == [1, 1, 1, 0, 0]
    assert rates.scope == "drop"
    assert rates.realised == pytest.approx(0.6)
    assert rates.routed.exact == 1.0
    assert rates.damage == []


def test_a_smaller_budget_is_met_on_the_mean_and_the_recipe_reads_back(tmp_path: Path) -> None:
    blind = blind_from(families.make("qwen2_5_vl", layers=5), 3)
    rates = calibrate.measure_schedule(blind, [own_words(blind)], budget=0.4)
    assert sum(rates.vision) / 5 == pytest.approx(0.4, abs=1e-4)
    assert rates.vision[3:] == [0, 0]
    assert len(rates.damage) == 3
    assert rates.routed == rates.by_scorer[rates.scorer]
    assert rates.routed.exact == max(loss.exact for loss in rates.by_scorer.values())
    made = yaml.safe_load(rates.recipe("a test"))["prune"]
    assert made.pop("name") == "schedule"
    pruner = hub.load("prune", "schedule", **made)
    assert pruner.config == Schedule(vision=rates.vision, scorer=rates.scorer, scope=rates.scope).config
    json.dumps(rates.to_dict())


def test_a_cutoff_that_loses_chains_is_none_however_small_the_rise_of_the_loss(model: Any) -> None:
    losses = iter([Loss(9, 0), Loss(1.003, 0.5), Loss(1.002, 1.0), Loss(1.001, 1.0), Loss(1, 1), Loss(1, 1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "measure", lambda *_: next(losses))
        assert calibrate.measure_cliff(model, []).cutoff_layer == 2


def test_shares_follow_the_damage_and_meet_the_total() -> None:
    rates = calibrate.share_out([0.3, 0.05, 0.1, 0.0], 2.4)
    assert sum(rates) == pytest.approx(2.4)
    assert rates[0] > rates[2] > rates[1] > rates[3] >= 0.05
    assert calibrate.share_out([0.2, 0.2], 2.0) == pytest.approx([1, 1])


def test_a_total_below_the_floor_is_refused() -> None:
    with pytest.raises(BudgetError, match="raise --budget"):
        calibrate.share_out([0.1] * 4, 0.1)


@pytest.mark.parametrize(("n", "split"), [(0, "val"), (4, "test")])
def test_calibration_never_touches_test_items(model: Any, n: int, split: str) -> None:
    with pytest.raises(ConfigError, match="val or train"):
        next(calibrate.gold(model, ["frozenlake"], n, split=split))


def test_gold_completions_are_the_chains_of_the_task_with_an_end(tiny_folder: Any) -> None:
    import mmroute

    model = mmroute.load(tiny_folder("qwen2_5_vl"))
    model.generation_config.eos_token_id = [2, 0]
    batches = list(calibrate.gold(model, ["frozenlake:nano"], 3, batch=2))
    assert [len(b.completion) for b in batches] == [2, 1]
    task = hub.load("tasks", "frozenlake", preset="nano")
    samples = list(itertools.islice(task.samples("val", 3), 3))
    tokenizer = model.processor.tokenizer
    rows = [row[real].tolist() for b in batches for row, real in zip(b.completion, b.real, strict=True)]
    for sample, row in zip(samples, rows, strict=True):
        assert row[-1] == 2
        assert tokenizer.decode(row[:-1]) == " ".join([*(hop.text for hop in sample.hops), sample.answer_text])


def test_the_picture_is_well_formed_and_marks_the_cliff() -> None:
    import xml.etree.ElementTree as ET

    cliff = calibrate.Cliff([2.0, 1.0, 0.1, 0.1], [0.0, 0.5, 1.0, 1.0], 0.002, 2, 64)
    root = ET.fromstring(calibrate.cliff_svg(cliff, "a <model> & a task"))
    text = " ".join(root.itertext())
    assert "cliff 2" in text
    assert "a <model> & a task" in text
    assert sum(node.tag.endswith("polyline") for node in root) == 2
