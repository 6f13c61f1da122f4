"""Which positions go on: random ones, a fresh set per layer or one set for good; as many as are asked for, or as many
as another method keeps in each layer and hop.

Legend: B batch, N positions, D hidden.
Source: the control every selection must beat at equal counts.
Deviates: "random" is a hash of (seed, layer, hop, rank of the position in its hop), never a draw: a row keeps the same
    positions alone and in a batch, padded or not, cached or not, on every device. Two rows of one length keep the same.
Checked: twin (tests/unit/prune/test_twins.py).
"""

from typing import Annotated, Any

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.prune._borrowed import CountsOf, Rates, borrow
from mmroute.prune._budget import constant
from mmroute.prune.base import Pruner, Site
from mmroute.select import hashed
from mmroute.tokens import Modality, Tokens

__all__ = ["Random"]


class Random(Pruner):
    """Control: hashed scores at given rates."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision positions that runs each layer from `start_layer` on."""
        text_keep: Annotated[float, Field(ge=0, le=1)] = 1.0
        """The same for text."""
        start_layer: Annotated[int, Field(ge=0)] = 0
        """First layer, counted from 0, that prunes."""
        seed: int = 0
        """Another seed, another set."""
        once: bool = False
        """One set that is dropped for good at `start_layer`, instead of a fresh set per layer."""
        counts_of: CountsOf | None = None
        """`@FOLDER` of trained routers, or name and options of a pruner: as many run, stay or are dropped in every
        layer, hop and modality as with it, and the shares above have no say."""

    config: Config

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        c = self.config
        self._like: Rates | None = None
        if c.once:
            self.action = "drop"  # type: ignore[misc]  # an option decides; the class says the default
        if c.counts_of is not None:
            if (c.vision_keep, c.text_keep, c.start_layer, c.once) != (0.5, 1.0, 0, False):
                raise ConfigError("prune.random: counts_of says how many run; leave out the other shares and `once`")
            like = self.__dict__["_like"] = borrow(c.counts_of)  # no part of this module: nothing of it is learned
            self.action = like.action  # type: ignore[misc]

    @classmethod
    def plan(cls, budget: float, num_layers: int, start_layer: int = 0) -> dict[str, Any]:
        """Options that make the mean share of vision positions over all layers `budget`, or BudgetError."""
        return {"vision_keep": constant(budget, num_layers, start_layer), "start_layer": start_layer}

    def acts(self, layer: int, num_layers: int) -> bool:
        if self._like is not None:
            return self._like.acts(layer, num_layers)
        return layer >= self.config.start_layer

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        if self._like is not None:
            return self._like.rate(layer, num_layers, hop, modality)
        if layer < self.config.start_layer or modality is Modality.LATENT:
            return None
        return self.config.vision_keep if modality is Modality.VISION else self.config.text_keep

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        return hashed(tokens, self.config.seed, self.config.start_layer if self.config.once else site.layer)
