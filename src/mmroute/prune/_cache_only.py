"""What methods share that run every position everywhere and only forget: a share of each modality's keys stays cached.

Their files spell out their options all the same, for `mmroute list` reads them there without importing anything.
"""

from typing import Any, ClassVar

from mmroute.prune._budget import constant
from mmroute.prune.base import Pruner
from mmroute.tokens import Modality
from mmroute.trace import Shape

__all__ = ["ByKey", "CacheOnly"]


class CacheOnly(Pruner):
    """The same shares in every layer; a `Config` has `vision_keep` and `text_keep`."""

    action = "kv_only"

    @classmethod
    def plan(cls, budget: float, num_layers: int) -> dict[str, Any]:
        """Options that make the mean share of cached vision keys over all layers `budget`."""
        return {"vision_keep": constant(budget, num_layers, 0)}

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        if modality is Modality.LATENT or not self.acts(layer, num_layers):
            return None
        return self.config.vision_keep if modality is Modality.VISION else self.config.text_keep


class ByKey(CacheOnly):
    """Ranks by cached keys alone, from a first layer on; a `Config` has `start_layer` too."""

    needs = frozenset({"keys"})
    flops_per_number: ClassVar[int]
    """FLOPs of a score for each number of a key."""

    @classmethod
    def plan(cls, budget: float, num_layers: int, start_layer: int = 0) -> dict[str, Any]:
        """Options that make the mean share of cached vision keys over all layers `budget`, or BudgetError."""
        return {"vision_keep": constant(budget, num_layers, start_layer), "start_layer": start_layer}

    def acts(self, layer: int, num_layers: int) -> bool:
        return layer >= self.config.start_layer

    def overhead(self, layer: int, shape: Shape, new: int) -> int:
        if not self.acts(layer, shape.layers):
            return 0
        return self.flops_per_number * shape.kv_heads * shape.head_dim * new
