"""A budget is met: solved knobs give the asked mean share, what cannot be met is refused in words."""

import math

import pytest

from mmroute import hub
from mmroute.errors import BudgetError, ConfigError
from mmroute.prune._budget import constant, geometric, scaled, two_level
from mmroute.prune.base import keep_count
from mmroute.tokens import Modality

FEASIBLE = [
    (name, budget, num_layers)
    for name, floor in (
        ("random", 0.0),
        ("oracle", 0.0),
        ("knorm", 0.0),
        ("keydiff", 0.0),
        ("divprune", 0.0),
        ("snapkv", 0.0),
        ("streaming", 0.0),
        ("fastv", 1 / 3),
        ("dart", 1 / 3),
        ("pyramiddrop", 0.26),
        ("reroute", 0.126),
        ("sparsevlm", 0.126),
    )
    for budget in (0.11, 0.22, 0.33, 0.4, 0.5, 0.75, 1.0)
    for num_layers in (8, 10, 32)
    if budget >= (2 / num_layers if name in ("fastv", "dart") else floor)
]


@pytest.mark.parametrize(("name", "budget", "num_layers"), FEASIBLE)
def test_realised_mean_of_vision_is_the_budget_to_one_token_per_layer(
    name: str, budget: float, num_layers: int
) -> None:
    pruner = hub.load("prune", name, **hub.find("prune", name).plan(budget, num_layers))
    n_v = 576
    counts = []
    for layer in range(num_layers):
        rate = pruner.rate(layer, num_layers, 0, Modality.VISION)
        counts.append(n_v if rate is None else keep_count(n_v, rate, 0))
    realised = sum(counts) / num_layers / n_v
    assert budget - 1e-6 <= realised <= budget + 1 / n_v


@pytest.mark.parametrize(("budget", "num_layers"), [(0.4, 8), (0.3, 32), (0.5, 12)])
def test_schedule_plan_meets_the_budget_with_two_levels(budget: float, num_layers: int) -> None:
    pruner = hub.load("prune", "schedule", **hub.find("prune", "schedule").plan(budget, num_layers))
    rates = [pruner.rate(layer, num_layers, 0, Modality.VISION) for layer in range(num_layers)]
    assert sum(1.0 if rate is None else rate for rate in rates) / num_layers == pytest.approx(budget)


def test_none_has_one_budget() -> None:
    none = hub.find("prune", "none")
    assert none.plan(1.0, 8) == {}
    with pytest.raises(BudgetError, match="none keeps everything"):
        none.plan(0.5, 8)


def test_fastv_at_the_authors_settings_keeps_192_of_576_tokens_on_average() -> None:
    keep = constant(192 / 576, 32, 3)
    assert keep == pytest.approx(0.2644, abs=5e-5)
    pruner = hub.load("prune", "fastv", start_layer=3, vision_keep=0.2644)
    shares = [pruner.rate(layer, 32, 0, Modality.VISION) or 1.0 for layer in range(32)]
    assert sum(math.ceil(576 * s) for s in shares) / 32 == pytest.approx(192, abs=1)  # counts round up


def test_pyramiddrop_early_keeps_192_of_576_tokens_on_average() -> None:
    starts = [2, 7, 15, 23]
    factor = geometric(192 / 576, 32, starts)
    assert [factor**j for j in (1, 2, 3, 4)] == pytest.approx([0.5965, 0.3558, 0.2123, 0.1266], abs=1e-4)
    pruner = hub.load("prune", "pyramiddrop", stage_keep=0.5965, stages=[s / 32 for s in starts])
    rates = [pruner.rate(layer, 32, 0, Modality.VISION) for layer in range(32)]
    assert [layer for layer in range(1, 32) if rates[layer] != rates[layer - 1]] == starts
    shares = [pruner.rate(layer, 32, 0, Modality.VISION) or 1.0 for layer in range(32)]
    assert 576 * sum(shares) / 32 == pytest.approx(192, abs=0.1)


@pytest.mark.parametrize(
    ("counts", "runs"), [((300, 200, 110), 203), ((303, 110, 36), 141), ((66, 30, 17), 79)], ids=("192", "128", "64")
)
def test_sparsevlm_at_published_counts_runs_more_than_its_label(counts: tuple[int, ...], runs: int) -> None:
    pruner = hub.load("prune", "sparsevlm", keeps=[n / 576 for n in counts])
    shares = [pruner.rate(layer, 32, 0, Modality.VISION) for layer in range(32)]
    assert [layer for layer in range(32) if shares[layer] != shares[max(layer - 1, 0)]] == [3, 7, 16]
    assert sum(576 if s is None else keep_count(576, s, 0) for s in shares) / 32 == pytest.approx(runs, abs=0.5)


def test_reroute_at_its_published_settings_keeps_192_of_576_tokens_on_average() -> None:
    constant_share = hub.load("prune", "reroute", vision_keep=0.2644)
    falling = hub.load(
        "prune", "reroute", method="pyramiddrop", vision_keep=0.5965, stages=[s / 32 for s in (2, 7, 15, 23)]
    )
    for pruner in (constant_share, falling):
        shares = [pruner.rate(layer, 32, 0, Modality.VISION) or 1.0 for layer in range(32)]
        assert 576 * sum(shares) / 32 == pytest.approx(192, abs=0.1)


def test_pyramiddrop_with_half_per_quarter_is_r_469() -> None:
    pruner = hub.load("prune", "pyramiddrop")
    shares = [pruner.rate(layer, 32, 0, Modality.VISION) or 1.0 for layer in range(32)]
    assert sum(shares) / 32 == pytest.approx(0.469, abs=5e-4)


def test_a_budget_below_the_whole_layers_is_infeasible_and_says_from_where_on_it_is() -> None:
    with pytest.raises(BudgetError, match=r"2 of 10 layers run whole, so it must be at least 0\.200"):
        constant(0.1, 10, 2)
    with pytest.raises(BudgetError, match=r"at least 0\.250"):
        geometric(0.2, 8, [2, 4, 6])
    with pytest.raises(BudgetError, match=r"at least 0\.125"):
        scaled(0.1, 8, [1, 2, 4], [0.5, 0.3, 0.2])
    with pytest.raises(BudgetError, match=r"from 0\.275 to 0\.525"):
        two_level(0.2, 8, 4)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(ConfigError, match=r"mean share in \(0, 1\]"):
        constant(budget, 8, 2)


def test_two_level_spends_what_deep_layers_save_before_the_cutoff() -> None:
    rates = two_level(0.4, 8, 4, deep_keep=0.0)
    assert rates == pytest.approx([1, 1, 0.6, 0.6, 0, 0, 0, 0])
