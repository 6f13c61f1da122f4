"""Which positions go on: PyramidDrop drops, at a few stages of depth, the vision tokens the last instruction token
looks at least.

Legend: B batch, N positions, D hidden.
Source: PyramidDrop (CVPR 2025, arXiv 2410.17247): before stage layer s_j, attention of the last instruction token to
    the surviving tokens with that layer's own query and keys; keep lambda^j of all vision tokens.
Deviates: shares are of the full count and rounded up; the last instruction token is the last position of the call,
    and the softmax runs over the positions of this call (an image that enters later is not ranked against the cache);
    original positions are kept where the release renumbers; several images of a hop are ranked together.
Checked: twin (tests/unit/prune/test_twins.py; on five families the first stage's sets equal those from the stock
    model's own attention maps, tests/conformance/test_prune_on_models.py), arithmetic (stages 2, 7, 15, 23 of 32,
    lambda .5965 of 576 is 192 tokens); not run against the release.
"""

from typing import Annotated, Any

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.prune import _rank
from mmroute.prune._budget import geometric
from mmroute.prune.base import Pruner, Site
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

__all__ = ["PyramidDrop"]


class PyramidDrop(Pruner):
    """Training-free: several cuts in depth, each ranked by the last token's attention at that layer."""

    @options
    class Config:
        stage_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of the stage before that goes on at each stage; lambda in the paper."""
        stages: tuple[Annotated[float, Field(ge=0, lt=1)], ...] = (0.25, 0.5, 0.75)
        """Where stages begin, as shares of depth; 0.25 of 32 layers is layer 8."""

    action = "drop"
    needs = frozenset({"qk"})
    config: Config

    @classmethod
    def plan(cls, budget: float, num_layers: int, stages: tuple[float, ...] = (0.25, 0.5, 0.75)) -> dict[str, Any]:
        """Options that make the mean share of vision positions over all layers `budget`, or BudgetError."""
        starts = [_layer(stage, num_layers) for stage in sorted(stages)]
        return {"stage_keep": geometric(budget, num_layers, starts), "stages": stages}

    def acts(self, layer: int, num_layers: int) -> bool:
        return self._stage(layer, num_layers) > 0

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        stage = self._stage(layer, num_layers)
        if stage == 0 or modality is not Modality.VISION:
            return None
        return self.config.stage_keep**stage

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        return _rank.attention_of_last(*site.qk(x), tokens, site.groups)

    def overhead(self, layer: int, shape: Shape, new: int) -> int:
        starts = {_layer(stage, shape.layers) for stage in self.config.stages}
        return 2 * shape.heads * shape.head_dim * new if layer in starts else 0

    def _stage(self, layer: int, num_layers: int) -> int:
        return sum(layer >= _layer(stage, num_layers) for stage in self.config.stages)


def _layer(stage: float, num_layers: int) -> int:
    return int(stage * num_layers + 1e-6)
