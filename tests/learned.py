"""A small learned pruner for tests of training: one linear row per routed layer, straight-through and without noise.

Legend: B batch, N positions, D hidden.
"""

from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from mmroute.config import options
from mmroute.prune.base import Keep, Pruner, Site, Slots
from mmroute.tokens import Modality, Tokens

__all__ = ["LinearRouter"]


class LinearRouter(Pruner):
    """Ranks by a linear row of the normalised stream; generated slots with a negative score go when their hop ends."""

    @options
    class Config:
        hidden: int
        layers: int
        first_layer: Annotated[int, Field(ge=0)] = 1
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.4
        text_keep: Annotated[float, Field(ge=0, le=1)] = 0.7
        every: Annotated[int, Field(ge=1)] = 1
        """Every which layer chooses, from `first_layer` on."""
        scope: Literal["skip", "drop"] = "skip"
        compresses: bool = False
        """Whether a hop's end evicts."""
        reads_row: bool = False
        """Whether the attention row of the layer before ranks too."""
        seed: int = 3

    needs = frozenset({"scores_kept"})
    config: Config

    def __init__(self, **given: object) -> None:
        super().__init__(**given)
        self.action = self.config.scope
        if self.config.reads_row:
            self.needs = self.needs | {"row"}
        generator = torch.Generator().manual_seed(self.config.seed)
        layers = range(self.config.first_layer, self.config.layers, self.config.every)
        self.rows = nn.ModuleDict({str(i): nn.Linear(self.config.hidden, 1) for i in layers})
        with torch.no_grad():
            for row in self.rows.values():
                row.weight.copy_(torch.randn(row.weight.shape, generator=generator) / self.config.hidden**0.5)
                row.bias.zero_()
        self.asked = 0

    def acts(self, layer: int, num_layers: int) -> bool:
        return str(layer) in self.rows

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        if modality is Modality.LATENT:
            return None
        # A little lower in later hops, so that mixing up hops cannot go unseen.
        rate = self.config.vision_keep if modality is Modality.VISION else self.config.text_keep
        return rate if rate == 1 else rate * 0.9**hop

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        self.asked += 1
        x = x.detach().float()
        normed = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        score = self.rows[str(site.layer)](normed).squeeze(-1)
        return score + 100 * site.row.detach() if self.config.reads_row else score

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        keep = super().keep(x, tokens, site)
        if not site.training:
            return keep
        soft = keep.logits.sigmoid()
        certain = tokens.protected | tokens.generated
        z = torch.where(certain, keep.mask.float(), keep.mask.float() + soft - soft.detach())
        keep.z, keep.losses = z, {"mean": torch.where(tokens.valid, soft, 0.0).mean()}
        if self.config.compresses:
            stays = (keep.logits.half() >= 0).float()  # the cache stores scores in half precision
            close = torch.where(tokens.protected | ~tokens.generated, 1.0, stays + soft - soft.detach())
            alive = [torch.where(tokens.hop < h, z * close, z) for h in range(int(tokens.hop.max()) + 1)]
            keep.alive = torch.stack(alive, dim=1)
        return keep

    def decode(self, x: Float[Tensor, "B 1 D"], tokens: Tokens, site: Site) -> Keep | None:
        if not self.acts(site.layer, site.num_layers):
            return None
        ran = [[1, 0, 0]] * tokens.shape[0]
        return Keep(tokens.valid, ran, logits=self.scores(x, tokens, site))

    def close(self, slots: Slots, closing: Int[Tensor, " B"], layer: int) -> Bool[Tensor, "B C"]:
        if not self.config.compresses or slots.score is None:
            return slots.valid
        ends = slots.generated & (slots.hop == closing[:, None])
        return slots.valid & (~ends | (slots.score >= 0))
