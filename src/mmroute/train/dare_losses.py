"""What DARE's training adds to the loss of the words: rates are pulled to their targets, deep vision to low scores.

Source: DARE, ratio and hard losses; their printed forms are `ratio_scope: each` and `hard_reduction: sum`.
Deviates: weights are ours, none are printed; under `rates: learned` the mean is exact and nothing pulls.
"""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from mmroute.prune._rates import ROUTED, target
from mmroute.prune.base import Keep, Pruner
from mmroute.prune.dare import Dare
from mmroute.train.dare_config import TrainConfig

__all__ = ["routing_losses"]


def routing_losses(
    keeps: Mapping[int, Keep], pruner: Pruner, config: TrainConfig
) -> tuple[Tensor | float, dict[str, float]]:
    """The weighted sum of the routing losses of one call, and each of them as it is, by name.

    Args:
        keeps: by layer, with what the gates found.
        pruner: whose targets and kind of rates count.
        config: weights, and how layers are put together.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)
    for keep in keeps.values():
        for name, value in keep.losses.items():
            found[name].append(value)
    losses: dict[str, Tensor] = {}
    if "hard" in found:
        each = torch.stack(found["hard"])
        losses["hard"] = each.sum() if config.hard_reduction == "sum" else each.mean()
    for m in ROUTED:
        name = m.name.lower()
        if config.ratio_scope == "each":
            for part in (name, f"{name}_deep"):
                if f"ratio_{part}" in found:
                    losses[f"ratio_{part}"] = torch.stack(found[f"ratio_{part}"]).mean()
            continue
        shares = found[f"share_{name}"] + (found[f"share_{name}_deep"] if config.ratio_layers == "all" else [])
        if shares:
            apart = torch.stack(shares).mean() - target(pruner.config, m)
            losses[f"ratio_{name}"] = (apart.clamp(min=0) if config.ratio_side == "cap" else apart).square()
    total: Tensor | float = 0.0
    for name, value in losses.items():
        total = total + _weight(name, pruner, config) * value
    return total, {name: round(value.item(), 6) for name, value in losses.items()}


def _weight(name: str, pruner: Pruner, config: TrainConfig) -> float:
    if name == "hard":
        return config.hard_weight
    if name.endswith("_deep") and config.ratio_layers == "early":  # the target contradicts the hard loss there
        return 0.0
    if config.ratio_weight is not None:
        return config.ratio_weight
    pulled = isinstance(pruner, Dare) and pruner.config.rates in ("penalty", "bernoulli")
    return {"each": 1.0, "mean": 10.0}[config.ratio_scope] if pulled else 0.0
