"""Losses of the rater against closed forms, enumerations and slow loops."""

import math

import numpy as np
import pytest
import torch

from mmroute.train import rating

K = 10
V = torch.linspace(0, 1, K, dtype=torch.float64)


def logits(B: int = 3, R: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(B, R, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def slope(loss: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, at, retain_graph=True)[0]


def test_all_action_is_the_expected_policy_gradient() -> None:
    """Over every action, each weighted by its probability: the mean of REINFORCE, without drawing."""
    z, y = logits(), torch.tensor([[0.2, 0.9], [0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    logp = z.log_softmax(-1)
    pi = logp.detach().exp()
    expected = torch.zeros_like(z)
    for b in range(3):
        for r in range(2):
            for k in range(K):
                step = -rating.reward(V[k], y[b, r]) * logp[b, r, k]
                expected += pi[b, r, k] * slope(step, z) / 3
    torch.testing.assert_close(slope(rating.all_action(logp, y, eta=0.0), z), expected, rtol=0, atol=1e-12)


def test_sampled_groups_tend_to_the_same_gradient() -> None:
    z, y = logits(B=1, R=1), torch.tensor([[0.3]], dtype=torch.float64)
    logp = z.log_softmax(-1)
    draw = torch.Generator().manual_seed(0)
    picked = torch.multinomial(logp.detach().exp()[0], 200_000, True, generator=draw)[0]
    rewards = rating.reward(V[picked], y[0, 0])
    loss = -((rewards - rewards.mean()) * logp[0, 0, picked]).mean()
    # standard error of a mean of 200 000 draws of size one: .0022 at most
    torch.testing.assert_close(slope(loss, z), slope(rating.all_action(logp, y, 0.0), z), rtol=0, atol=5e-3)


def test_all_action_ends_in_the_closed_form_and_labels_may_be_single_answers() -> None:
    eta, p = 0.02, 0.37
    want = (-((V - p) ** 2) / eta).softmax(0)
    for labels in ([[p]] * 100, [[1.0]] * 37 + [[0.0]] * 63):
        z = torch.zeros(K, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS([z], max_iter=300, tolerance_grad=1e-12, tolerance_change=1e-15)
        y = torch.tensor(labels, dtype=torch.float64)

        def closure(z: torch.Tensor = z, y: torch.Tensor = y, o: torch.optim.Optimizer = optimiser) -> torch.Tensor:
            o.zero_grad()
            loss = rating.all_action(z.log_softmax(0).expand(100, 1, K), y, eta)
            loss.backward()
            return loss

        optimiser.step(closure)  # type: ignore[arg-type]
        torch.testing.assert_close(z.softmax(0).detach(), want, rtol=0, atol=1e-5)


def test_two_hot_labels_by_hand() -> None:
    logp = logits(B=2, R=1).log_softmax(-1)
    y = torch.tensor([[0.35], [1.0]], dtype=torch.float64)
    # .35 * 9 = 3.15: .85 on level 3, .15 on level 4; 1.0 is level 9
    want = -(0.85 * logp[0, 0, 3] + 0.15 * logp[0, 0, 4] + logp[1, 0, 9]) / 2
    torch.testing.assert_close(rating.cross_entropy(logp, y), want)


def test_groups_that_agree_teach_nothing_unless_two_samples_are_replaced() -> None:
    z = torch.full((1, 1, K), -50.0, dtype=torch.float64)
    z[0, 0, 2] = 50.0
    z.requires_grad_(True)
    y = torch.tensor([[0.8]], dtype=torch.float64)  # best level 7
    still, agreed = rating.grpo(z.log_softmax(-1), y, 8, 0.0, torch.Generator().manual_seed(0))
    assert agreed == 1
    assert slope(still, z).abs().max() == 0
    moved, _ = rating.grpo(z.log_softmax(-1), y, 8, 1.0, torch.Generator().manual_seed(0))
    step = -slope(moved, z)[0, 0]
    assert step[7] > 0
    assert step[7] == step.max()


def test_replacement_changes_groups_that_agree_and_no_others() -> None:
    picked = torch.tensor([[[3, 3, 3, 3]], [[1, 2, 3, 4]], [[7, 7, 7, 7]], [[9, 9, 9, 9]], [[0, 0, 0, 0]]])
    y = torch.tensor([[0.8], [0.8], [0.8], [1.0], [0.0]])
    agree = (picked == picked[..., :1]).all(-1)
    out = rating.replaced(picked, agree, y, K, torch.Generator().manual_seed(1))
    assert out[0, 0, 0] == 7
    assert out[0, 0, 1] != 7
    assert out[1].tolist() == picked[1].tolist()
    assert out[2, 0, :2].tolist() == [6, 8]  # all were best: both neighbours
    assert out[3, 0, :2].tolist() == [8, 9]
    assert out[4, 0, :2].tolist() == [0, 1]
    assert (out[..., 2:] == picked[..., 2:]).all()


def test_pairs_against_loops() -> None:
    rng = np.random.default_rng(0)
    u, a = (torch.tensor(rng.random(7)) for _ in range(2))
    T, hard, weight, soft = 0.2, 0.0, 0.0, []
    for i in range(7):
        for j in range(7):
            stake = float(a[i] - a[j])
            if stake > 0.05:
                hard += stake * math.log1p(math.exp(-float(u[i] - u[j]) / T))
                weight += stake
            if i < j:
                said, true = (1 / (1 + math.exp(-float(x[i] - x[j]) / T)) for x in (u, a))
                cross = -(true * math.log(said) + (1 - true) * math.log(1 - said))
                soft.append(cross + true * math.log(true) + (1 - true) * math.log(1 - true))
    assert float(rating.pair_loss(u, a, T)) == pytest.approx(hard / weight)
    assert float(rating.soft_pair(u, a, T)) == pytest.approx(np.mean(soft))
    assert float(rating.soft_pair(a + 3, a, T)) == pytest.approx(0, abs=1e-12)  # equal differences are best


def test_labels_for_ranking_are_drawn_to_their_cell_by_one_pseudo_count() -> None:
    y = np.array([1.0, 0.0, 1.0, 1.0])
    got = rating.shrunk(y, ["a", "a", "a", "b"], samples=2)
    np.testing.assert_allclose(got, [(2 + 2 / 3) / 3, (2 / 3) / 3, (2 + 2 / 3) / 3, 1.0])
