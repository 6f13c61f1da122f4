"""The examples run as they stand, are short, and show what docs/extend.md says they show."""

import importlib.util
import re
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from PIL import Image

from mmroute import backbones, hub, reason
from mmroute.backbones.load import load
from mmroute.checks import check_pruner

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_the_guide_shows_it(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    assert f"examples/{path.name}" in (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    assert f"python examples/{path.name}" in text.split('"""')[1]


def test_route_your_model_saves(tiny_folder, image, capsys):
    ratio = example("route_your_model").main(str(tiny_folder("qwen2_5_vl")), image, "where?")
    assert ratio["vision"] < 1
    assert ratio["flops"] < 1
    assert ratio["kv_bytes"] < 1
    assert "of unrouted" in capsys.readouterr().out


def test_the_new_pruner_keeps_its_contract_and_its_share(tiny_folder, image):
    module = example("add_pruner")
    check_pruner(module.Unusual)
    share = module.main(str(tiny_folder("llava")), image, "where?")
    assert share == pytest.approx((1 + 2 * 5 / 16) / 3)  # of 16 patches: all, then 5, then 5
    said = (ROOT / "examples" / "add_pruner.py").read_text().split('"""')[1]
    assert all(f"{section}:" in said for section in ("Source", "Deviates", "Checked"))


def test_the_new_way_to_think_cuts_at_bullets(tiny_folder, image, monkeypatch):
    folder = tiny_folder("qwen2_5_vl")
    ids = load(folder).processor.tokenizer("- ab- c- def", add_special_tokens=False)["input_ids"]
    script = iter(ids)
    monkeypatch.setattr(reason, "sample", lambda *_: torch.tensor([next(script)]))
    hops = example("add_thinker").main(str(folder), image, "where?", max_new_tokens=len(ids))
    assert hops == ["- ab", "- c", "- def"]


def test_the_new_gate_sends_its_share_and_the_long_ones():
    module = example("add_gate")
    share, sent, kept = module.main("frozenlake", 60, budget=0.25)
    assert abs(share - 0.25) < 0.1
    assert sent > kept + 2
    assert module.Moves.needs == "nothing"


def test_the_new_task_is_answered_and_scored(tiny_folder):
    module = example("add_task")
    assert 0 <= module.main(str(tiny_folder("llava")), n=4) <= 1
    task = module.Dots()
    samples = list(task.samples("test", 30))
    assert samples[3] == next(task.samples("test", 1, offset=3))
    assert {s.answer for s in samples} == {"1", "2", "3", "4", "5"}
    dark = [(np.asarray(s.images[0])[14::28, 14::28, 0] == 0).sum() for s in samples]
    assert dark == [int(s.answer) for s in samples]
    score = task.score(samples[0], f"no 7, {samples[0].answer} dots")
    assert (score.correct, score.parsed) == (1.0, True)
    assert not task.score(samples[0], "none").parsed


def test_the_new_family_equals_stock_and_routes(monkeypatch):
    monkeypatch.setattr(backbones, "FAMILIES", backbones.FAMILIES)
    worst, ran = example("add_family").main()
    assert worst < 1e-5
    assert ran == [20, 8, 8]
    assert "internvl" in backbones.names()


def test_the_stock_trainer_lowers_the_loss_of_a_routed_model(tiny_folder, tmp_path):
    pytest.importorskip("accelerate")
    losses = example("train_with_trainer").main(str(tiny_folder("llava")), str(tmp_path), steps=30)
    assert len(losses) == 30
    assert sum(losses[-3:]) < sum(losses[:3]) / 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_a_chameleon_learns_to_draw_its_thoughts(tiny_folder, tmp_path):
    pytest.importorskip("peft")
    module, folder = example("train_to_draw"), tiny_folder("chameleon")
    model = load(folder)
    sample = next(hub.load("tasks", "frozenlake", hop_images="observed").samples("train", 1))
    made = module.row(model, sample)
    learned = made["input_ids"][made["labels"] != -100]
    codes = torch.isin(learned, torch.tensor(backbones.of(model).image_tokens(model)))
    assert codes.sum() == len(sample.hops) * families.NUM_SQUARE
    assert model.config.image_token_id not in made["input_ids"]

    losses = module.main(str(folder), str(tmp_path), steps=40)
    assert sum(losses[-5:]) < sum(losses[:5])
    weights = [load(f).model.layers[0].self_attn.q_proj.weight for f in (folder, tmp_path)]
    assert not torch.equal(*weights)


def test_the_guide_names_files_that_are_there():
    guide = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:src|examples|tests|docs)/[\w/.]+\.\w+)`", guide):
        assert (ROOT / path).exists(), path
