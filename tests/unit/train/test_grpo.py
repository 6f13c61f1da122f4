"""GRPO with answers: rewards by hand, each loss over its own tokens, a draft that stays what it was unless asked."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pairs import write_pair, write_recipe

from mmroute import hub
from mmroute import recipe as recipes
from mmroute.backbones.load import load
from mmroute.engine.attach import attach
from mmroute.errors import ConfigError
from mmroute.gate.prp import Prp
from mmroute.tasks._mixture import Part, draw_mixture
from mmroute.train import rating
from mmroute.train.grpo import Sampled, advantages, fit_rollouts, objective, rewards, token_logps
from mmroute.train.prompts import chats_of
from mmroute.train.prp import train_prp
from mmroute.train.prp_config import PrpConfig, sections
from mmroute.train.rollouts import roll_out

DRAWN = Sampled(
    picked=torch.tensor([[[9, 0, 3], [9, 9, 0]]]),
    correct=torch.tensor([[1.0, 0.0, 1.0]]),
    parsed=torch.tensor([[True, False, True]]),
    replaced=torch.zeros(1, 3, dtype=torch.bool),
)
LABEL = torch.tensor([[0.7, 1.0]])


@pytest.mark.parametrize(
    ("kind", "draft"),
    [
        # the others of each sample: one right of two, both, one of two; a pseudo-count of a half in 3
        ("brier_group", [1 - (1 - 0.5) ** 2, 1 - (0 - 2.5 / 3) ** 2, 1 - (1 / 3 - 0.5) ** 2]),
        ("brier_own", [1.0, 1.0, 1 - (1 / 3 - 1) ** 2]),
        ("l1", [0.5, 1 - 2.5 / 3, 1 - abs(1 / 3 - 0.5)]),
    ],
)
def test_ratings_and_answers_earn_what_they_should(kind: Any, draft: list[float]) -> None:
    rated, said = rewards(DRAWN, LABEL, 10, kind)
    torch.testing.assert_close(rated[0, 0], torch.tensor(draft))
    torch.testing.assert_close(rated[0, 1], torch.tensor([1.0, 1.0, 0.0]))  # the target's label, whatever the draft did
    torch.testing.assert_close(said, torch.tensor([[1.1, 0.0, 1.1]]))


def test_advantages_are_of_a_group_and_vanish_where_all_earned_the_same() -> None:
    found = advantages(torch.tensor([[1.0, 0.0, 0.5], [0.3, 0.3, 0.3]]))
    assert found[0].mean().abs() < 1e-6
    assert found[0].std() == pytest.approx(1, abs=1e-3)
    assert found[1].abs().max() == 0


def given(**changes: Any) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    rated = torch.randn(2, 2, 4, generator=draw).requires_grad_()
    said = torch.randn(2, 4, 5, generator=draw).requires_grad_()
    gains = {"rated_gain": torch.randn(2, 2, 4, generator=draw), "said_gain": torch.randn(2, 4, generator=draw)}
    counted = torch.ones(2, 4, 5, dtype=torch.bool)
    counted[0, 0, 3:] = False  # a shorter answer
    counted[1, 2] = False  # a sample whose rating was replaced
    before = {"rated_before": rated.detach().clone(), "said_before": said.detach().clone()}
    return {"rated": rated, "said": said, **gains, **before, "is_answer": counted} | changes


def test_each_loss_is_a_mean_over_its_own_tokens_and_leaves_the_others_alone() -> None:
    both = given()
    loss = objective(**both)
    rated, said = torch.autograd.grad(loss, [both["rated"], both["said"]])
    torch.testing.assert_close(rated, -both["rated_gain"] / (4 * 2))  # a ratio of 1 has the log's own slope
    want = -(both["said_gain"][..., None] * both["is_answer"]) / both["is_answer"].sum()
    torch.testing.assert_close(said, want)
    assert said[0, 0, 3:].abs().max() == said[1, 2].abs().max() == 0
    alone = objective(both["rated"], both["rated_before"], both["rated_gain"])
    torch.testing.assert_close(torch.autograd.grad(alone, both["rated"])[0], rated, rtol=0, atol=0)


def test_a_ratio_beyond_the_clip_counts_only_where_it_made_things_worse() -> None:
    rated = torch.full((1, 1, 2), 0.5).requires_grad_()  # e^.5: far above 1.2
    gain = torch.tensor([[[1.0, -1.0]]])
    (slope,) = torch.autograd.grad(objective(rated, torch.zeros(1, 1, 2), gain), rated)
    assert slope[0, 0, 0] == 0
    assert slope[0, 0, 1] > 0


def test_leaving_the_draft_as_it_was_is_punished() -> None:
    same = given()
    same |= {"said_gain": torch.zeros(2, 4), "rated_gain": torch.zeros(2, 2, 4)}
    assert objective(**same, reference=same["said"].detach(), beta=1.0) == 0
    for step in (-0.1, 0.1):
        assert objective(**same, reference=same["said"].detach() + step, beta=1.0).item() == pytest.approx(
            0.005, rel=0.1
        )


def test_replacement_moves_a_group_that_agrees_towards_its_success_rate() -> None:
    z = torch.zeros(1, 1, 10).requires_grad_()
    draw = torch.Generator().manual_seed(0)
    agreed = torch.full((1, 1, 4), 2)
    correct, y = torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.tensor([[0.75]])

    def slope(picked: torch.Tensor) -> torch.Tensor:
        drawn = Sampled(picked, correct, torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.bool))
        gained = advantages(rewards(drawn, y, 10, "l1")[0])
        logp = z.log_softmax(-1).gather(-1, picked)
        return torch.autograd.grad(objective(logp, logp.detach(), gained), z)[0][0, 0]

    rated, _ = rewards(
        Sampled(agreed, torch.ones(1, 4), torch.ones(1, 4).bool(), torch.zeros(1, 4).bool()), y, 10, "l1"
    )
    assert advantages(rated).abs().max() == 0  # agreed, and all answers right: nothing to learn from
    picked = rating.replaced(agreed, torch.ones(1, 1, dtype=torch.bool), y, 10, draw)
    assert slope(picked)[7] < 0  # round(9 * .75): its probability is to grow


# ---------------------------------------------------------------------- on a draft


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pair")
    write_pair(made)
    return made


MIX = [Part(task="frozenlake:nano", share=1)]


def test_log_probabilities_of_answers_are_those_they_were_written_with(folder: Path) -> None:
    draft = load(folder / "draft", dtype="float32")
    chats = chats_of(draft, draw_mixture(MIX, 3, "val"), hub.load("think", "text"))
    with attach(draft) as routed:
        rolled, _ = roll_out(routed, chats, max_new_tokens=8, temperature=1.0, seeds=[1, 2, 3])
    answers = [rolled[0].ids[:3], rolled[1].ids, rolled[2].ids]  # of unequal lengths
    logp, real = (each.detach() for each in token_logps(draft, chats, answers))
    assert real.sum(1).tolist() == [len(ids) for ids in answers]
    alone = token_logps(draft, chats[:1], answers[:1])[0].detach()
    torch.testing.assert_close(logp[0, :3], alone[0], rtol=0, atol=1e-4)
    for row in (1, 2):
        assert float((logp[row] * real[row]).sum() / real[row].sum()) == pytest.approx(
            rolled[row].stats["lp_mean"], abs=1e-4
        )


def test_the_draft_stays_what_it_was_unless_its_reasoning_is_trained(folder: Path) -> None:
    items = draw_mixture(MIX, 12, "val")
    y, held = np.tile([[0.2, 0.9]], (12, 1)), np.arange(12) % 4 == 0

    def fitted(**changes: Any) -> tuple[Any, Prp, list[float]]:
        draft = load(folder / "draft", dtype="float32")
        chats = chats_of(draft, items, hub.load("think", "text"))
        gate = Prp(calibration="none").bind(draft)
        config = PrpConfig(objective="grpo", rollouts=True, group_size=4, batch=20, max_epochs=2, lr=1e-2, **changes)
        return draft, gate, fit_rollouts(gate, items, chats, y, ~held, held, config, 6)

    before = load(folder / "draft", dtype="float32").state_dict()
    draft, _, errors = fitted()
    assert all(torch.equal(value, before[name]) for name, value in draft.state_dict().items())
    assert errors[-1] < 0.7**2  # what a rater that says the same of both models would have
    changed, _, _ = fitted(train_reasoning=True, lr_reasoning=1e-3)
    assert not torch.equal(changed.lm_head.weight, before["lm_head.weight"])
    assert all(p.requires_grad for p in changed.parameters())


def test_a_draft_whose_reasoning_was_trained_is_written_with_its_rater(folder: Path, tmp_path: Path) -> None:
    sets = ["train.objective=grpo", "train.rollouts=true", "train.train_reasoning=true", "train.lr_reasoning=0.001"]
    sets += ["train.batch=16", "train.group_size=2", "train.max_epochs=1", "train.updates=1"]
    recipe = recipes.read(str(write_recipe(folder)), [*sets, "think.max_new_tokens=4"])
    draft, target = (load(folder / name, dtype="float32") for name in ("draft", "target"))
    train_prp(recipe, draft, target, tmp_path)
    trained = load(tmp_path / "draft", dtype="float32")
    assert Prp.load(tmp_path / "rater", trained).facts["train"]["train_reasoning"]
    rows = (tmp_path / "outcomes" / "draft.jsonl").read_text().splitlines()
    assert len(rows) > 40  # asked again: it answers otherwise now


def test_rollouts_are_those_of_grpo(folder: Path) -> None:
    path = str(write_recipe(folder))
    with pytest.raises(ConfigError, match="are those of objective grpo"):
        sections(recipes.read(path, ["train.rollouts=true"]))
    with pytest.raises(ConfigError, match=r"add train\.rollouts=true"):
        sections(recipes.read(path, ["train.train_reasoning=true", "train.objective=grpo"]))
