"""Which vision positions run a layer: Mixture-of-Depths with the falling rates of p-MoD, learned through the gain.

Legend: B batch, N positions, D hidden, L layers.
Source: Mixture-of-Depths (arXiv 2404.02258), p-MoD (ICCV 2025, arXiv 2412.04449): per layer the vision tokens with the
    largest linear score run, weighted by 1 + 0.2 tanh(score); the others bypass it and may run the next. The share
    falls with depth along a cosine.
Deviates: the cosine's offset is solved again after clipping, so that the mean over layers is what was asked; the score
    reads the RMS-normed stream without gradient; only the update of positions that run is scaled, where the release
    scales the states of skipped tokens too. Prompts and observations are routed, generated positions all run. As
    published, routers learn from what ran alone: there is no straight-through gate, and the executor is physical.
Checked: twin (tests/unit/prune/test_learned_controls.py); not run against the release.
"""

from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.prune import _rank
from mmroute.prune._budget import check_budget, cosine
from mmroute.prune.base import Keep, Pruner, Site
from mmroute.select import top
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

__all__ = ["MoD"]


class MoD(Pruner):
    """Learned control: vision only, one router row per layer, rates given and not learned."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(gt=0, le=1)] = 0.5
        """Share of vision positions that runs, as the mean over all layers."""
        swing: Annotated[float, Field(ge=0, le=1)] = 0.5
        """How far the first layer's share is above the mean and the last one's below, before clipping."""

    config: Config

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.router = nn.ModuleDict()
        self._made_for: tuple[int, int] | None = None

    @classmethod
    def plan(cls, budget: float, num_layers: int) -> dict[str, Any]:
        """Options that make the mean share of vision positions over all layers `budget`."""
        check_budget(budget)
        return {"vision_keep": budget}

    def fit(self, shape: Shape) -> None:
        """One row of zeros per layer that chooses.

        Raises:
            ConfigError: made for another model already.
        """
        sizes = shape.layers, shape.hidden
        if self._made_for not in (None, sizes):
            raise ConfigError(f"this pruner was made for (layers, width) {self._made_for}, the model has {sizes}")
        if self._made_for is None:
            self._made_for = sizes
            for layer in (i for i in range(shape.layers) if self.acts(i, shape.layers)):
                row = self.router[str(layer)] = nn.Linear(shape.hidden, 1)
                nn.init.zeros_(row.weight)
                nn.init.zeros_(row.bias)

    def acts(self, layer: int, num_layers: int) -> bool:
        return cosine(self.config.vision_keep, num_layers, self.config.swing)[layer] < 1

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        share = cosine(self.config.vision_keep, num_layers, self.config.swing)[layer]
        return share if modality is Modality.VISION and share < 1 else None

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        return self.router[str(site.layer)](_rank.rms_normed(x.detach().float())).squeeze(-1)

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        logits = self.scores(x, tokens, site)
        take = {i: self.counts(group, site.layer, site.num_layers) for i, group in enumerate(site.groups)}
        competes = (tokens.modality == Modality.VISION) & tokens.valid & ~tokens.protected & ~tokens.generated
        gain = torch.where(competes, 1 + 0.2 * torch.tanh(logits), 1.0)
        mask, ran = top(logits.detach(), tokens, site.groups, take)
        return Keep(mask, ran, gain=gain, ranked=logits)

    def overhead(self, layer: int, shape: Shape, new: int) -> int:
        return 2 * shape.hidden * new if self.acts(layer, shape.layers) else 0
