"""Which positions go on: those the ground truth of a generated task says are needed, then random ones.

Legend: B batch, N positions, D hidden.
Source: generated tasks know which patches each hop reads; levels are needed, then board, then background.
Deviates: a strong reference, not a bound: what a layer needs beside the relevant patches (bearings in the first
    layers, free cells on the way) is not in the levels. Equal levels are broken by the hash of `random`, so with no
    relevance at all it is `random`.
Checked: twin (tests/unit/prune/test_twins.py).
"""

from typing import Annotated, Any

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.prune import _rank
from mmroute.prune._borrowed import CountsOf, Rates, borrow
from mmroute.prune._budget import constant
from mmroute.prune.base import Pruner, Site
from mmroute.select import hashed
from mmroute.tokens import Modality, Tokens

__all__ = ["Oracle"]


class Oracle(Pruner):
    """Reference: ranks by the relevance that the caller hands in; generated tasks only."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision positions that runs each layer from `start_layer` on."""
        start_layer: Annotated[int, Field(ge=0)] = 0
        """First layer, counted from 0, that prunes."""
        seed: int = 0
        """Breaks ties of equal relevance."""
        counts_of: CountsOf | None = None
        """As in `random`: as many vision positions as another method keeps; text stays whole."""

    needs = frozenset({"relevance"})
    config: Config

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        c = self.config
        self._like: Rates | None = None
        if c.counts_of is not None:
            if (c.vision_keep, c.start_layer) != (0.5, 0):
                raise ConfigError("prune.oracle: counts_of says how many run; leave out vision_keep and start_layer")
            like = self.__dict__["_like"] = borrow(c.counts_of)  # no part of this module: nothing of it is learned
            self.action = like.action  # type: ignore[misc]  # an option decides

    @classmethod
    def plan(cls, budget: float, num_layers: int, start_layer: int = 0) -> dict[str, Any]:
        """Options that make the mean share of vision positions over all layers `budget`, or BudgetError."""
        return {"vision_keep": constant(budget, num_layers, start_layer), "start_layer": start_layer}

    def acts(self, layer: int, num_layers: int) -> bool:
        if self._like is not None:
            return self._like.acts(layer, num_layers)
        return layer >= self.config.start_layer

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        if modality is not Modality.VISION:
            return None
        if self._like is not None:
            return self._like.rate(layer, num_layers, hop, modality)
        if layer < self.config.start_layer:
            return None
        return self.config.vision_keep

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        tie = hashed(tokens, self.config.seed, site.layer)
        return _rank.lexicographic(site.relevance, tie, tokens.valid)
