"""Which positions go on: FastV's or PyramidDrop's choice made recoverable; at each stage all vision tokens compete
again, and between stages those left out bypass the layers.

Legend: B batch, N positions, D hidden, Q queries whose attention is read, G averages of them.
Source: Reroute (code elmma/mllm-reroute, behaviour only): drop becomes bypass with re-entry at stage boundaries, at
    the same counts, so at the same FLOPs.
Deviates: FastV's score at its first stage is the attention row of the layer before, as in FastV; at later stages, where
    not all ran the layer before, it is the last query's attention by the stage layer's own queries and keys, as in
    PyramidDrop. Shares are of the full count and rounded up; several images of a hop are ranked together.
Checked: twin (tests/unit/prune/test_twins_of_peers.py); with one stage it keeps what FastV or PyramidDrop keeps; not
    run against the release.
"""

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.prune import _rank
from mmroute.prune._budget import constant, geometric
from mmroute.prune.base import Keep, Pruner, Site
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

__all__ = ["Reroute"]

_STAGES = {"fastv": (3 / 32, 7 / 32, 15 / 32, 23 / 32), "pyramiddrop": (0.25, 0.5, 0.75)}


class Reroute(Pruner):
    """Training-free: staged choice with re-entry, by the last token's attention."""

    @options
    class Config:
        method: Literal["fastv", "pyramiddrop"] = "fastv"
        """Whose score and shares: one share from the first stage on, or a falling one."""
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision positions that runs from the first stage on, of all or (pyramiddrop) of the stage before."""
        stages: tuple[Annotated[float, Field(ge=0, lt=1)], ...] | None = None
        """Where stages begin, as shares of depth; null is 3, 7, 15, 23 of 32 for fastv, quarters for pyramiddrop."""

    needs = frozenset({"qk"})
    config: Config

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if self.config.method == "fastv":
            self.needs = frozenset({"qk", "rows"})
        if self.config.stages == ():
            raise ConfigError("prune.reroute.stages: empty, so nothing would ever be pruned; name at least one")

    @classmethod
    def plan(cls, budget: float, num_layers: int, method: str = "fastv") -> dict[str, Any]:
        """Options that make the mean share of vision positions over all layers `budget`, or BudgetError."""
        starts = cls(method=method)._starts(num_layers)
        keep = constant(budget, num_layers, starts[0]) if method == "fastv" else geometric(budget, num_layers, starts)
        return {"method": method, "vision_keep": keep}

    def acts(self, layer: int, num_layers: int) -> bool:
        return self._stage(layer, num_layers) > 0

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        stage = self._stage(layer, num_layers)
        if stage == 0 or modality is not Modality.VISION:
            return None
        return self.config.vision_keep ** (stage if self.config.method == "pyramiddrop" else 1)

    def queries(self, tokens: Tokens, site: Site) -> tuple[Int[Tensor, "B Q"], Float[Tensor, "B G Q"]] | None:
        if site.layer + 1 != self._starts(site.num_layers)[0]:
            return None
        last = _rank.last_valid(tokens.valid & ~tokens.generated)[:, None]
        return last, torch.ones(tokens.shape[0], 1, 1, device=last.device)

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        """The choice of the stage that this layer is in."""
        key = ("reroute", self._stage(site.layer, site.num_layers))
        if key not in site.memo:
            site.memo[key] = super().keep(x, tokens, site)
        return site.memo[key]

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        if self.config.method == "fastv" and site.layer == self._starts(site.num_layers)[0]:
            return site.rows[:, :, 0].mean(1)
        return _rank.attention_of_last(*site.qk(x), tokens, site.groups)

    def overhead(self, layer: int, shape: Shape, new: int) -> int:
        starts = self._starts(shape.layers)
        ranks = layer in (starts[1:] if self.config.method == "fastv" else starts)
        return 2 * shape.heads * shape.head_dim * new if ranks else 0

    def _starts(self, num_layers: int) -> list[int]:
        """First layer of each stage. FastV's score reads the layer before, so it begins at layer 1 or later."""
        least = 1 if self.config.method == "fastv" else 0
        shares = _STAGES[self.config.method] if self.config.stages is None else self.config.stages
        return sorted(max(least, int(share * num_layers + 1e-6)) for share in shares)

    def _stage(self, layer: int, num_layers: int) -> int:
        return sum(layer >= start for start in self._starts(num_layers))
