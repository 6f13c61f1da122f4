"""Which positions go on: FastV drops, once and at one layer, the vision tokens the last position looks at least.

Legend: B batch, N positions, D hidden.
Source: FastV (ECCV 2024, arXiv 2403.06764): rank by the attention of layer K - 1, keep the top share from layer K on.
Deviates: the paper averages the attention a token receives over all queries, the released code reads the last row;
    ours is the last row, which needs no N x N map. Several images of a hop are ranked together.
Checked: twin (tests/unit/prune/test_twins.py; on five families the sets equal those from the stock model's own
    attention maps, tests/conformance/test_prune_on_models.py), arithmetic (K = 3, keep .2644 of 576 on 32 layers is
    192 tokens); not run against the release.
"""

from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.prune._cuts import LayerCut
from mmroute.prune.base import Site
from mmroute.tokens import Tokens

__all__ = ["FastV"]


class FastV(LayerCut):
    """Training-free: one cut after a shallow layer, ranked by the last row of attention."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision positions that runs from `start_layer` on."""
        start_layer: Annotated[int, Field(ge=1)] = 2
        """First layer, counted from 0, that runs on the survivors; K in the paper."""

    needs = frozenset({"row"})
    config: Config

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        return site.row  # of the layer before, mean over heads; behind the cut there is nothing left to choose
