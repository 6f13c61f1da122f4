"""Which positions run a layer, blind to modality: one router row and one learned rate per layer over text and vision
together; the control for asymmetry.

Legend: B batch, N positions, D hidden, H hops, L layers.
Source: our reading of UniPrune, the symmetric baseline that DARE's tables name and whose source was not found.
Deviates: everything: it is DARE without modalities, cutoff, hard stage and rates by hop. As many positions run as
    text and vision would at the same share; which of them, one ranking decides.
Checked: twin (tests/unit/prune/test_learned_controls.py).
"""

from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.prune import _rank
from mmroute.prune._budget import constant
from mmroute.prune._gates import Relaxation
from mmroute.prune._topk import clip_outliers, logistic_noise, soft_topk, straight_through
from mmroute.prune.base import Keep, Pruner, Site, keep_count
from mmroute.select import Group, best
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

__all__ = ["Symmetric"]


class Symmetric(Pruner):
    """Learned control: text and vision compete for the same places."""

    @options
    class Config:
        keep: Annotated[float, Field(gt=0, le=1)] = 0.55
        """Share of all positions that runs, as the mean over layers; .55 is what .4 of vision and .7 of text are where
        there is as much of both."""
        first_layer: Annotated[int, Field(ge=0)] = 2
        """Layers before it run everything."""

    syncs = True  # how the chosen split into text and vision is known only once they are chosen
    config: Config

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.relax = Relaxation()
        self.router = nn.ModuleDict()
        self._made_for: tuple[int, int] | None = None
        self._table: list[float] = []
        self.register_load_state_dict_post_hook(lambda module, keys: module.export())

    @classmethod
    def plan(cls, budget: float, num_layers: int, first_layer: int = 2) -> dict[str, Any]:
        """Options that make the mean share of all positions over all layers `budget`, or BudgetError."""
        constant(budget, num_layers, first_layer)
        return {"keep": budget, "first_layer": first_layer}

    # ------------------------------------------------------------------ what is learned

    def fit(self, shape: Shape) -> None:
        """Rows of zeros, and a flat rate.

        Raises:
            ConfigError: made for another model already.
            BudgetError: the first layers alone exceed the mean.
        """
        sizes = shape.layers, shape.hidden
        if self._made_for not in (None, sizes):
            raise ConfigError(f"this pruner was made for (layers, width) {self._made_for}, the model has {sizes}")
        if self._made_for is not None or self.config.keep == 1:
            return
        constant(self.config.keep, shape.layers, self.config.first_layer)
        self._made_for = sizes
        for layer in range(self.config.first_layer, shape.layers):
            row = self.router[str(layer)] = nn.Linear(shape.hidden, 1)
            nn.init.zeros_(row.weight)
            nn.init.zeros_(row.bias)
        self.theta = nn.Parameter(torch.zeros(shape.layers - self.config.first_layer))
        self.export()

    def export(self) -> None:
        """Reads the learned rates into Python once; inference looks nothing up on the device."""
        if self._made_for is not None:
            self._table = self.rates()[0, 0].detach().tolist()

    def train(self, mode: bool = True) -> "Symmetric":
        super().train(mode)
        if not mode:
            self.export()
        return self

    def rates(self) -> Float[Tensor, "2 1 L"]:
        """Share that runs by layer, the same for both modalities and all hops, with gradients to what is learned."""
        first, free = self.config.first_layer, len(self.theta)
        k = self.theta.new_full((1, 1), self.config.keep * (first + free) - first).double()
        among = torch.ones(1, free, dtype=torch.bool, device=self.theta.device)
        found = soft_topk(self.theta.double()[None], k, 1.0, among, torch.ones_like(k).expand(1, free), margin=1e-6)
        return torch.cat([found.new_ones(1, first), found], dim=1).expand(2, 1, -1)

    # ------------------------------------------------------------------ contract

    def acts(self, layer: int, num_layers: int) -> bool:
        return layer >= self.config.first_layer and self.config.keep < 1

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        if modality is Modality.LATENT or not self.acts(layer, num_layers):
            return None
        if len(self._table) == num_layers:
            return min(1.0, max(0.0, self._table[layer]))
        return constant(self.config.keep, num_layers, self.config.first_layer)

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        return self.router[str(site.layer)](_rank.rms_normed(x.detach().float())).squeeze(-1)

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        """Hop by hop the best of text and vision together; in training with noise and gates."""
        logits = self.scores(x, tokens, site)
        learns = site.training and not self.relax.settled and logits.requires_grad
        if learns and self.relax.noise > 0:
            logits = logits + self.relax.noise * logistic_noise(logits, self.relax.generator)
        rates = self.rates()[0, 0].float() if learns else None
        mask = _rank.running(tokens, [g for g in site.groups if g.modality == Modality.LATENT])
        z = mask.float()
        for hop in sorted({g.hop for g in site.groups}):
            both = [g for g in site.groups if g.hop == hop and g.modality != Modality.LATENT and not g.generated]
            if not both:
                continue
            among = _members(both, tokens)
            share = self.rate(site.layer, site.num_layers, hop, Modality.TEXT) or 0.0
            if rates is not None:
                share = 1 - self.relax.vision_ramp * (1 - float(rates[site.layer].detach()))
            free = [self._free(both, b, share) for b in range(mask.shape[0])]
            first = best(logits.detach(), among, torch.tensor(free, device=x.device))
            mask = mask | first
            if rates is not None:
                size = torch.tensor([[float(sum(g.size[b] for g in both))] for b in range(len(free))], device=x.device)
                fixed = torch.tensor([[sum(g.protected[b] for g in both)] for b in range(len(free))], device=x.device)
                k = (1 - self.relax.vision_ramp * (1 - rates[site.layer])) * size - fixed
                soft = soft_topk(logits, k, self.relax.temperature, among)
                z = torch.where(among, straight_through(first, soft), z)
        ran = torch.stack([(mask & (tokens.modality == m)).sum(1) for m in Modality], dim=1).tolist()
        if not learns:
            return Keep(mask, ran, ranked=logits)
        clip_outliers(z, self.relax.gate_clip)
        return Keep(mask, ran, logits=logits, z=z)

    def overhead(self, layer: int, shape: Shape, new: int) -> int:
        return 2 * shape.hidden * new if self.acts(layer, shape.layers) else 0

    @staticmethod
    def _free(both: list[Group], b: int, share: float) -> int:
        """Free positions of a row that run: as many as if each modality kept this share."""
        rows = [(g.size[b], g.protected[b], g.width[b]) for g in both]
        return sum(min(keep_count(n, min(share, 1.0), p), p + w) - p for n, p, w in rows)


def _members(groups: list[Group], tokens: Tokens) -> Bool[Tensor, "B N"]:
    """Who competes in any of the groups."""
    B, N = tokens.shape
    mask = torch.zeros(B, N + 1, dtype=torch.bool, device=tokens.valid.device)
    for group in groups:
        mask.scatter_(1, group.free.masked_fill(~_rank.competing(group), N), True)
    return mask[:, :N]
