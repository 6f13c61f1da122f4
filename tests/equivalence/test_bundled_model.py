"""The bundled model does what its RESULTS.json says, and routing at keep 1 changes none of its answers."""

import json
from pathlib import Path

import pytest
import torch

import mmroute
import mmroute.backbones
from mmroute import hub
from mmroute.backbones.images import prepare

TASKS = ("maze", "frozenlake", "arrows")
RESULTS = json.loads((Path(mmroute.__file__).parent / "assets" / "tiny" / "RESULTS.json").read_text())


def conversations(task, n):
    return [task.messages(sample) for sample in task.samples("test", n)]


@pytest.mark.parametrize("name", TASKS)
def test_the_bundled_model_keeps_its_recorded_accuracy(name):
    task = hub.load("tasks", name)
    samples = list(task.samples("test", 40))
    with mmroute.attach(mmroute.load("tiny")) as routed:
        answers = routed.answer_many([task.messages(sample) for sample in samples])
    right = sum(task.score(s, a.text).correct or 0.0 for s, a in zip(samples, answers, strict=True))
    # One item of 40 is 2.5 points: what a change of rounding may cost.
    assert right / len(samples) >= RESULTS["tasks"][name]["accuracy"] - 0.03


def test_the_stock_auto_classes_open_the_bundled_folder():
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    folder = Path(mmroute.__file__).parent / "assets" / "tiny"
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "qwen2_5_vl"
    assert AutoTokenizer.from_pretrained(folder).tokenize("task: maze cot:") == ["task:", "maze", "cot:"]


@pytest.mark.slow
def test_in_bfloat16_keep_one_gives_the_stock_answers_on_200_held_out_items():
    for name in ("maze", "frozenlake"):
        task = hub.load("tasks", name)
        model = mmroute.load("tiny", dtype="bfloat16")
        asked = conversations(task, 100)
        for start in range(len(asked)):
            batch = prepare(model, model.processor, asked[start])
            batch["position_ids"] = mmroute.backbones.of(model).generate_positions(
                mmroute.backbones.of(model).positions(
                    model, batch["input_ids"], batch["attention_mask"], batch["image_grid_thw"]
                ),
                batch["attention_mask"],
            )
            stock = model.generate(**batch, max_new_tokens=80, do_sample=False)
            with mmroute.attach(model, strip_padding=True):
                logits = model(**{k: v for k, v in batch.items() if k != "position_ids"}).logits
                routed = model.generate(**batch, max_new_tokens=80, do_sample=False)
            assert torch.isfinite(logits).all()
            assert torch.equal(stock, routed), f"{name} item {start}"
