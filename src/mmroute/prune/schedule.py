"""Which positions go on: a keep rate per layer, measured once for a model (`mmroute calibrate schedule`) and filled
by a score that needs no training.

Legend: B batch, N positions, D hidden.
Source: DARE's information cliff (known to us from slides and a summary): layers before it need vision, layers behind
    it do not. Ranked by the attention row of the last query at the layer before, as FastV does.
Deviates: DARE learns scores and rates, nothing is learned here; a table for another depth is interpolated over
    depth; behind the cliff vision is skipped or, with `scope: drop`, gone. What did not run the layer before has no
    attention there, so with `row` the same positions tend to stay out; where rates rise, they come back from the left.
Checked: twin (tests/unit/prune/test_twins.py).
"""

import math
from typing import Annotated, Any, Literal

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.prune import _rank
from mmroute.prune._budget import two_level
from mmroute.prune.base import Pruner, Site
from mmroute.select import hashed
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

__all__ = ["Schedule"]

_Rates = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)]
_NEEDS = {
    "row": frozenset({"row"}),
    "knorm": frozenset({"qk"}),
    "random": frozenset[str](),
    "oracle": frozenset({"relevance"}),
}


class Schedule(Pruner):
    """Training-free: calibrated keep rates per layer, ranked by attention, key norm, chance or truth."""

    @options
    class Config:
        vision: _Rates = (1.0, 1.0, 0.25, 0.05, 0.05, 0.05)
        """Share of vision positions that runs, layer by layer; another number of layers interpolates over depth."""
        text: _Rates = (1.0,)
        """The same for text; one number serves all layers."""
        scorer: Literal["row", "knorm", "random", "oracle"] = "row"
        """What ranks: the last query's attention at the layer before, small key norm, a hash, or ground truth."""
        scope: Literal["skip", "drop"] = "skip"
        """Whether a position that was left out may come back in a later layer."""
        seed: int = 0
        """Seed of the hash, for `random` and the ties of `oracle`."""

    config: Config

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.action = self.config.scope  # type: ignore[misc]  # an option decides
        self.needs = _NEEDS[self.config.scorer]
        for name, rates in (("vision", self.config.vision), ("text", self.config.text)):
            if self.config.scorer == "row" and rates[0] < 1:
                raise ConfigError(
                    f"prune.schedule.{name}: layer 0 keeps {rates[0]}, but scorer 'row' has no layer before it to "
                    "read; begin with 1.0 or use scorer 'knorm'"
                )
            rises = [i for i in range(1, len(rates)) if rates[i] > rates[i - 1]]
            if self.config.scope == "drop" and rises:
                raise ConfigError(
                    f"prune.schedule.{name}: rises to {rates[rises[0]]} at entry {rises[0]}, but with scope 'drop' "
                    "nothing comes back; make the rates fall or use scope 'skip'"
                )

    @classmethod
    def plan(
        cls, budget: float, num_layers: int, cutoff_layer: int | None = None, scorer: str = "row", scope: str = "skip"
    ) -> dict[str, Any]:
        """Options for a mean share of vision positions without calibration, or BudgetError.

        Two levels of rates; the control `cut` (scorer random, scope drop): whole layers, at most one with a share,
        then none.
        """
        if (scorer, scope) == ("random", "drop"):
            whole = math.ceil(budget * num_layers - 1e-6)
            return {"vision": tuple(two_level(budget, num_layers, whole, first_layer=whole - 1, deep_keep=0.0))}
        cutoff = num_layers // 2 if cutoff_layer is None else cutoff_layer
        return {"vision": tuple(two_level(budget, num_layers, cutoff))}

    def acts(self, layer: int, num_layers: int) -> bool:
        return self._share(self.config.vision, layer, num_layers) < 1 or (
            self._share(self.config.text, layer, num_layers) < 1
        )

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        if modality is Modality.LATENT:
            return None
        rates = self.config.vision if modality is Modality.VISION else self.config.text
        share = self._share(rates, layer, num_layers)
        return share if share < 1 else None

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        match self.config.scorer:
            case "row":
                return site.row
            case "knorm":
                return -_rank.key_norm(site.qk(x)[1].transpose(1, 2))
            case "random":
                return hashed(tokens, self.config.seed, self._layer_key(site))
            case "oracle":
                tie = hashed(tokens, self.config.seed, self._layer_key(site))
                return _rank.lexicographic(site.relevance, tie, tokens.valid)

    def overhead(self, layer: int, shape: Shape, new: int) -> int:
        choosing = self.config.scorer == "knorm" and self.acts(layer, shape.layers)
        return 2 * shape.kv_heads * shape.head_dim * new if choosing else 0

    def _layer_key(self, site: Site) -> int:
        return 0 if self.config.scope == "drop" else site.layer

    @staticmethod
    def _share(rates: tuple[float, ...], layer: int, num_layers: int) -> float:
        """The table at this depth, linear between its entries; exact where it has one entry per layer."""
        if len(rates) == num_layers or len(rates) == 1:
            return rates[min(layer, len(rates) - 1)]
        at = layer * (len(rates) - 1) / max(num_layers - 1, 1)
        low = min(int(at), len(rates) - 2)
        return rates[low] + (at - low) * (rates[low + 1] - rates[low])
