"""What methods share that drop vision tokens once, before the first layer or before a later one.

Their files spell out their options all the same, for `mmroute list` reads them there without importing anything.
"""

from typing import Any

from mmroute.errors import ConfigError
from mmroute.prune._budget import constant
from mmroute.prune.base import Pruner
from mmroute.tokens import Modality

__all__ = ["EntryCut", "LayerCut"]


class EntryCut(Pruner):
    """One cut before layer 0; a `Config` has `vision_keep`."""

    action = "drop"

    @classmethod
    def plan(cls, budget: float, num_layers: int) -> dict[str, Any]:
        """Options that make the mean share of vision positions over all layers `budget`."""
        return {"vision_keep": constant(budget, num_layers, 0)}

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        return self.config.vision_keep if modality is Modality.VISION else None


class LayerCut(Pruner):
    """One cut before `start_layer`, by what the layers before it show; a `Config` has `vision_keep` too."""

    action = "drop"

    @classmethod
    def plan(cls, budget: float, num_layers: int, start_layer: int = 2) -> dict[str, Any]:
        """Options that make the mean share of vision positions over all layers `budget`, or BudgetError."""
        return {"vision_keep": constant(budget, num_layers, start_layer), "start_layer": start_layer}

    def acts(self, layer: int, num_layers: int) -> bool:
        if self.config.start_layer >= num_layers:
            name = type(self).__module__.rpartition(".")[2]
            raise ConfigError(
                f"prune.{name}.start_layer: {self.config.start_layer} given, the model has layers 0 to "
                f"{num_layers - 1}; nothing would ever be pruned"
            )
        return layer >= self.config.start_layer

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        if layer < self.config.start_layer or modality is not Modality.VISION:
            return None
        return self.config.vision_keep
