"""Which positions stay in the cache: those whose keys point away from the common direction.

Legend: B batch, N positions, D hidden, K key-value heads, E head dim.
Source: KeyDiff (arXiv 2504.15364): keep the keys of least cosine to the mean normalised key; no attention is read.
Deviates: one set for all key-value heads (scores are averaged over them); separate shares for vision and text; only
    positions that enter together compete, generated ones stay, where the paper evicts block by block while it reads.
Checked: twin (tests/unit/prune/test_twins.py; on five families the sets equal those from the stock model's own cache,
    tests/conformance/test_prune_on_models.py); not run against the release.
"""

from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.prune import _rank
from mmroute.prune._cache_only import ByKey
from mmroute.prune.base import Site
from mmroute.tokens import Tokens

__all__ = ["KeyDiff"]


class KeyDiff(ByKey):
    """Training-free, cache only: all positions run, and those whose keys resemble the rest are forgotten."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision keys that stays cached."""
        text_keep: Annotated[float, Field(ge=0, le=1)] = 1.0
        """The same for text."""
        start_layer: Annotated[int, Field(ge=0)] = 0
        """First layer, counted from 0, whose cache is pruned."""

    flops_per_number = 4  # a norm, and a product with the mean
    config: Config

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        return _rank.key_difference(site.keys(site.layer), tokens.valid)
