"""How layers' routing losses become one number: weights, reductions, and what the mean of rates is taken of."""

import pytest
import torch

from mmroute.prune.base import Keep
from mmroute.prune.dare import Dare
from mmroute.train.dare_config import TrainConfig
from mmroute.train.dare_losses import routing_losses

SHARES = {"text": [0.9, 0.7], "vision": [0.6, 0.3], "vision_deep": [None, 0.04]}
HARD = [None, 0.5]


def keeps():
    nothing = torch.zeros(1, 1, dtype=torch.bool)
    out = {}
    for layer in (0, 1):
        losses = {}
        for name, shares in SHARES.items():
            if shares[layer] is not None:
                share = torch.tensor(shares[layer])
                goal = 0.7 if name == "text" else 0.4
                losses |= {f"share_{name}": share, f"ratio_{name}": (share - goal).square()}
        if HARD[layer] is not None:
            losses |= {"hard": torch.tensor(HARD[layer])}
        out[layer] = Keep(nothing, [[0, 0, 0]], losses=losses)
    return out


def losses(rates="penalty", **options):
    total, found = routing_losses(keeps(), Dare(rates=rates), TrainConfig(tasks={"maze": 1}, **options))
    return float(total), found


TEXT, VISION, DEEP = (0.2**2 + 0) / 2, (0.2**2 + 0.1**2) / 2, 0.36**2


def test_each_layer_is_pulled_and_deep_vision_only_where_asked():
    total, found = losses()
    assert found == pytest.approx({"hard": 0.5, "ratio_text": TEXT, "ratio_vision": VISION, "ratio_vision_deep": DEEP})
    assert total == pytest.approx(0.5 + TEXT + VISION)
    assert losses(ratio_layers="all")[0] == pytest.approx(0.5 + TEXT + VISION + DEEP)


def test_an_exact_mean_pulls_at_nothing_unless_a_weight_is_given():
    assert losses("learned")[0] == pytest.approx(0.5)
    assert losses("learned", ratio_weight=2.0)[0] == pytest.approx(0.5 + 2 * (TEXT + VISION))
    assert losses(hard_weight=0.0, ratio_weight=0.0)[0] == 0


def test_the_mean_of_layers_is_pulled_ten_times_as_hard_and_a_cap_from_above_only():
    total, found = losses(ratio_scope="mean")
    assert found == pytest.approx({"hard": 0.5, "ratio_text": 0.1**2, "ratio_vision": 0.05**2}, abs=1e-6)
    assert total == pytest.approx(0.5 + 10 * (0.1**2 + 0.05**2))
    below = losses(ratio_scope="mean", ratio_layers="all", ratio_side="cap")[1]  # vision at a mean of .313
    assert below["ratio_vision"] == 0
    assert below["ratio_text"] == pytest.approx(0.1**2, abs=1e-6)
