"""The soft top-k: its mass, its order, its gradients at the edges; gates; clipping."""

import pytest
import torch

from mmroute.prune._topk import clip_outliers, logistic_noise, soft_topk, straight_through


def logits(n=12, rows=3, seed=0):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def among(n=12, rows=3):
    mask = torch.ones(rows, n, dtype=torch.bool)
    mask[1, ::3] = False
    return mask


def count(*values):
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.1])
def test_the_mass_is_k_in_every_row_and_none_lies_outside(temperature):
    k = count(2.0, 3.7, 11.5)
    m = soft_topk(logits(), k, temperature, among())
    torch.testing.assert_close(m.sum(1, keepdim=True), k, rtol=0, atol=1e-6)
    assert not m[~among()].any()


def test_a_larger_logit_never_gets_less():
    a = logits()
    order = a.argsort(dim=1)
    m = soft_topk(a, count(2.0, 3.7, 11.5), 0.3, torch.ones_like(a, dtype=torch.bool)).gather(1, order)
    assert (m.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.1])
def test_gradients_are_those_of_finite_differences(temperature):
    inside = among()
    a, k = logits().requires_grad_(), count(2.0, 3.7, 6.2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, n: soft_topk(x, n, temperature, inside), (a, k), eps=1e-6, atol=1e-5, rtol=1e-4
    )
    weight = torch.rand(3, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    assert torch.autograd.gradcheck(
        lambda x, n: soft_topk(x, n, temperature, inside, weight), (a, k), eps=1e-6, atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("k", [-3.0, 0.0, 12.0, 99.0])
def test_counts_outside_the_candidates_are_moved_inside(k):
    m = soft_topk(logits(rows=1), count(k), 0.3, torch.ones(1, 12, dtype=torch.bool))
    assert m.isfinite().all()
    torch.testing.assert_close(m.sum().item(), min(max(k, 0.01), 11.99), rtol=0, atol=1e-6)


def test_equal_logits_share_equally():
    m = soft_topk(torch.zeros(1, 10), torch.tensor([[4.0]]), 0.3, torch.ones(1, 10, dtype=torch.bool))
    torch.testing.assert_close(m, torch.full((1, 10), 0.4))


def test_a_row_without_candidates_is_zero():
    m = soft_topk(torch.zeros(1, 4), torch.tensor([[2.0]]), 0.3, torch.zeros(1, 4, dtype=torch.bool))
    assert torch.equal(m, torch.zeros(1, 4))


def test_the_weighted_mean_over_layers_is_the_target():
    weight = torch.rand(1, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rate = soft_topk(
        logits(24, 1), 0.4 * weight.sum().view(1, 1), 1.0, torch.ones(1, 24, dtype=torch.bool), weight, 1e-6
    )
    assert abs(float((rate * weight).sum() / weight.sum()) - 0.4) < 1e-6


def test_a_gate_is_exactly_hard_with_the_soft_gradient():
    soft = torch.rand(1000, generator=torch.Generator().manual_seed(3)).requires_grad_()
    hard = torch.rand(1000, generator=torch.Generator().manual_seed(4)) > 0.5
    gate = straight_through(hard, soft)
    assert torch.equal(gate, hard.float())
    gate.sum().backward()
    assert torch.equal(soft.grad, torch.ones(1000))


def test_outliers_are_clipped_at_the_scale_of_open_gates():
    leaf = torch.tensor([1.0] * 100 + [0.0] * 100).requires_grad_()
    gate = leaf * 1
    clip_outliers(gate, 0.98)
    slope = torch.cat([torch.linspace(-1, 1, 100), torch.full((100,), 1e17)])
    (gate * slope).sum().backward()
    assert leaf.grad.abs().max() < 1
    assert leaf.grad[100:].min() > 0.9
    assert torch.equal(leaf.grad[30:70], slope[30:70])


def test_noise_comes_from_its_generator_alone():
    one, other = (logistic_noise(torch.zeros(5000), torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, other)
    assert abs(float(one.std()) - 1.81) < 0.08
