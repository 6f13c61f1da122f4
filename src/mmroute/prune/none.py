"""Which positions go on: all of them, at every layer.

Source: the unrouted model; the control of every table.
Deviates: nothing.
Checked: twin, arithmetic (keep = 1 equals stock).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmroute.config import options
from mmroute.errors import BudgetError
from mmroute.prune._budget import check_budget
from mmroute.prune.base import Pruner, Site
from mmroute.tokens import Modality, Tokens

__all__ = ["NoPruning"]


class NoPruning(Pruner):
    """Control: every position runs every layer."""

    @options
    class Config:
        pass

    config: Config

    @classmethod
    def plan(cls, budget: float, num_layers: int) -> dict[str, Any]:
        """Options for a budget. Raises BudgetError below 1: nothing is ever pruned."""
        check_budget(budget)
        if budget < 1:
            raise BudgetError(f"budget {budget} is infeasible: none keeps everything; use 1 or another pruner")
        return {}

    def acts(self, layer: int, num_layers: int) -> bool:
        return False

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        return None

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        return torch.zeros(tokens.shape, device=x.device)
