"""Routers that start with an opinion: each is fitted to the attention that positions receive in the unrouted model.

Ridge regression, per layer and modality, from what the router reads to the standardised logarithm of the attention that
written words pay to each given position, in the layer before. It needs no labels of what is relevant.

Legend: B batch, N columns, D hidden, Q written words.

Source: DARE names no start of its routers; attention as a teacher is FastV's criterion.
Deviates: everything; where attention ranks badly so do these routers, until training has moved them.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmroute.prune._rates import ROUTED, target
from mmroute.prune.base import Keep, Pruner, Site
from mmroute.prune.dare import Dare
from mmroute.tokens import Modality, Tokens
from mmroute.train.chains import Chains
from mmroute.train.dare_passes import Passes

__all__ = ["distil"]

_RIDGE = 1e-2
"""Penalty on squared weights, as a share of the mean variance of what the router reads."""


@torch.no_grad()
def distil(passes: Passes, batches: Iterable[Chains]) -> None:
    """Fits the routers of a pruner; a router of layer 0, which has no layer before it, stays as it is.

    Args:
        passes: of a model attached with the pruner.
        batches: chains; a few dozen are enough.
    """
    controller, pruner, model = passes.routed.controller, passes.pruner, passes.routed.model
    assert isinstance(pruner, Dare)
    listener = _Listener(pruner)
    before, controller.pruner = controller.pruner, listener
    model.eval()
    try:
        for batch in batches:
            passes.at_once(batch)
    finally:
        controller.pruner = before
    for (layer, modality), sums in listener.heard.items():
        weight, bias = sums.solve()
        router: Any = pruner.router[str(layer)]
        router.weight[modality], router.bias[modality] = weight, bias
    pruner.export()


@dataclass
class _Sums:
    """What a regression needs of its samples; fp64."""

    n: int = 0
    x: Tensor | float = 0.0
    y: Tensor | float = 0.0
    xx: Tensor | float = 0.0
    xy: Tensor | float = 0.0

    def add(self, x: Float[Tensor, "n D"], y: Float[Tensor, " n"]) -> None:
        x, y = x.double(), y.double()
        self.n += len(y)
        self.x, self.y = self.x + x.sum(0), self.y + y.sum()
        self.xx, self.xy = self.xx + x.T @ x, self.xy + y @ x

    def solve(self) -> tuple[Float[Tensor, " D"], Float[Tensor, ""]]:
        """Weights and bias."""
        x, y = torch.as_tensor(self.x) / self.n, torch.as_tensor(self.y) / self.n
        spread = torch.as_tensor(self.xx) / self.n - x.outer(x)
        spread.diagonal().add_(_RIDGE * spread.diagonal().mean() + 1e-12)
        weight = torch.linalg.solve(spread, torch.as_tensor(self.xy) / self.n - y * x)
        return weight.float(), (y - weight @ x).float()


class _Listener(Pruner):
    """Leaves nothing out, and notes what each router reads and should say."""

    needs = frozenset({"rows", "scores_kept"})  # whoever keeps scores is asked also where nothing is left out

    def __init__(self, pruner: Dare) -> None:
        super().__init__()
        self.pruner = pruner
        self.heard: dict[tuple[int, int], _Sums] = defaultdict(_Sums)

    def acts(self, layer: int, num_layers: int) -> bool:
        return layer > 0 and self.pruner.acts(layer, num_layers)

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> None:
        return None

    def is_identity(self, num_layers: int) -> bool:
        return False

    def queries(self, tokens: Tokens, site: Site) -> tuple[Int[Tensor, "B Q"], Float[Tensor, "B 1 Q"]]:
        """Every written word looks, all alike."""
        size = tokens.generated.sum(1, keepdim=True)
        at = (~tokens.generated).long().argsort(dim=1, stable=True)[:, : int(size.max())]
        inside = torch.arange(at.shape[1], device=at.device) < size
        return at, (inside / size.clamp(min=1))[:, None]

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        return site.rows.float().mean((1, 2)).clamp(min=1e-9).log()

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        kept = super().keep(x, tokens, site)
        score, reads = kept.logits, self.pruner.reads(x)
        assert score is not None
        for m in (m for m in ROUTED if target(self.pruner.config, m) < 1):
            among = (tokens.modality == m) & tokens.valid & ~tokens.protected & ~tokens.generated
            n = among.sum(1, keepdim=True).clamp(min=1)
            mean = (score * among).sum(1, keepdim=True) / n
            spread = (((score - mean) * among).square().sum(1, keepdim=True) / n).sqrt()
            wanted = (score - mean) / spread.clamp(min=1e-6)
            if self.pruner.config.carry:  # logits add up over layers, so each adds what is new
                before = site.memo.get(("distilled", m), 0.0)
                site.memo["distilled", m] = wanted
                wanted = wanted - before
            if among.any():
                self.heard[site.layer, int(m)].add(reads[among], wanted[among])
        return kept
