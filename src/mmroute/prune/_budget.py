"""Closed forms from a budget to a method's own knob; a budget is the mean share of vision positions over all layers.

Legend: b budget, L layers, K first pruned layer.
"""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise

from mmroute.errors import BudgetError, ConfigError

__all__ = ["check_budget", "constant", "cosine", "geometric", "scaled", "two_level"]


def check_budget(budget: float) -> None:
    """Raises ConfigError: not in (0, 1]."""
    if not 0 < budget <= 1:
        raise ConfigError(f"a budget is a mean share in (0, 1], given {budget}; write 0.4 for 40 %")


def constant(budget: float, num_layers: int, start_layer: int) -> float:
    """The share that, kept from `start_layer` on, makes the mean over all layers `budget`: (b L - K)/(L - K).

    Raises:
        BudgetError: the whole layers before `start_layer` exceed the budget alone.

    Example:
        >>> round(constant(192 / 576, 32, 3), 4)
        0.2644
    """
    check_budget(budget)
    if start_layer >= num_layers:
        raise ConfigError(f"start_layer {start_layer} given, the model has layers 0 to {num_layers - 1}")
    keep = (budget * num_layers - start_layer) / (num_layers - start_layer)
    if keep < 0:
        raise BudgetError(
            f"budget {budget} is infeasible: {start_layer} of {num_layers} layers run whole, "
            f"so it must be at least {start_layer / num_layers:.3f}; raise it or lower start_layer"
        )
    return keep


def geometric(budget: float, num_layers: int, starts: Sequence[int]) -> float:
    """The factor lambda that, applied at each layer of `starts`, makes the mean over all layers `budget`.

    Found by bisection on sum over stages of length x lambda^stage = b L.

    Raises:
        BudgetError: the layers before the first stage exceed the budget alone.
    """
    check_budget(budget)
    edges = [0, *starts, num_layers]
    lengths = [after - before for before, after in pairwise(edges)]
    if budget * num_layers < lengths[0]:
        raise BudgetError(
            f"budget {budget} is infeasible: the {lengths[0]} of {num_layers} layers before the first stage run whole, "
            f"so it must be at least {lengths[0] / num_layers:.3f}; raise it or begin the stages earlier"
        )
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(length * middle**stage for stage, length in enumerate(lengths)) / num_layers
        low, high = (middle, high) if mean < budget else (low, middle)
    return high


def scaled(budget: float, num_layers: int, starts: Sequence[int], shares: Sequence[float]) -> list[float]:
    """The shares times one factor, none above 1, that make the mean over all layers `budget`.

    Args:
        starts: first layer of each stage; layers before the first run whole.
        shares: of the full count, stage by stage.

    Raises:
        BudgetError: the layers before the first stage exceed the budget alone.
    """
    check_budget(budget)
    edges = [*starts, num_layers]
    lengths = [after - before for before, after in pairwise(edges)]
    if budget * num_layers < starts[0]:
        raise BudgetError(
            f"budget {budget} is infeasible: the {starts[0]} of {num_layers} layers before the first stage run whole, "
            f"so it must be at least {starts[0] / num_layers:.3f}; raise it or begin the stages earlier"
        )
    low, high = 0.0, 1 / min(shares)
    for _ in range(60):
        factor = (low + high) / 2
        runs = starts[0] + sum(n * min(1.0, factor * s) for n, s in zip(lengths, shares, strict=True))
        low, high = (factor, high) if runs < budget * num_layers else (low, factor)
    return [min(1.0, high * share) for share in shares]


def two_level(
    budget: float, num_layers: int, cutoff_layer: int, *, first_layer: int = 2, deep_keep: float = 0.05
) -> list[float]:
    """A share per layer: the first layers whole, `deep_keep` from `cutoff_layer` on, and what is left in between.

    Raises:
        BudgetError: no share in [0, 1] of the layers in between makes the mean `budget`.

    Example:
        >>> [round(share, 2) for share in two_level(0.4, 6, 3)]
        [1.0, 1.0, 0.25, 0.05, 0.05, 0.05]
    """
    check_budget(budget)
    first = min(first_layer, cutoff_layer)
    between, deep = cutoff_layer - first, num_layers - cutoff_layer
    left = budget * num_layers - first - deep_keep * deep
    if not -1e-9 <= left <= between + 1e-9:
        low, high = (first + deep_keep * deep) / num_layers, (cutoff_layer + deep_keep * deep) / num_layers
        raise BudgetError(
            f"budget {budget} is infeasible with cutoff layer {cutoff_layer} of {num_layers}: "
            f"from {low:.3f} to {high:.3f} is possible"
        )
    middle = [min(max(left / between, 0.0), 1.0)] * between if between else []
    return [1.0] * first + middle + [deep_keep] * deep


@functools.cache
def cosine(mean: float, num_layers: int, swing: float = 0.5) -> tuple[float, ...]:
    """A share per layer that falls as a cosine does, clip(offset + swing cos(pi l / (L - 1)), 0, 1), its mean exact."""
    wave = [swing * math.cos(math.pi * layer / max(num_layers - 1, 1)) for layer in range(num_layers)]
    if num_layers == 1:
        wave = [0.0]
    low, high = -swing, 1 + swing
    for _ in range(60):
        offset = (low + high) / 2
        total = sum(min(max(offset + w, 0.0), 1.0) for w in wave)
        low, high = (offset, high) if total < mean * num_layers else (low, offset)
    return tuple(min(max(high + w, 0.0), 1.0) for w in wave)
