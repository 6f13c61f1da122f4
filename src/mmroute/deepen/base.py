"""The contract of a deepener: which positions run a layer a second time.

Legend: B batch, N positions of this call, D hidden.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmroute.config import options, parse
from mmroute.tokens import Tokens
from mmroute.trace import Shape

__all__ = ["Again", "Deepener"]


@dataclass
class Again:
    """One layer's choice of what runs again."""

    mask: Bool[Tensor, "B N"]
    """True where the position runs again; a subset of what ran the layer."""
    counts: list[int]
    """[row]: how many that is; Python integers."""
    gain: Float[Tensor, "B N 1"] | Float[Tensor, "B N D"] | None = None
    """Multiplies the update of the second pass, x + gain (f(x) - x); None is 1."""


class Deepener(nn.Module):
    """Base class; pure, as pruners are."""

    @options
    class Config:
        pass

    config: Any
    max_depth: int = 1
    """Extra passes per layer at most."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.config = parse(type(self).Config, given, f"deepen.{type(self).__module__.rpartition('.')[2]}")

    def fit(self, shape: Shape) -> None:
        """Makes what is learned for a model of these sizes; called when it is attached."""

    def acts(self, layer: int, num_layers: int) -> bool:
        """Whether this layer has a second pass at all."""
        return True

    @abstractmethod
    def again(
        self,
        x: Float[Tensor, "B N D"],
        tokens: Tokens,
        ran: Bool[Tensor, "B N"],
        sizes: list[list[int]],
        latents: list[list[int]],
        layer: int,
        depth: int,
    ) -> Again | None:
        """What runs again after pass `depth` (1 is the first extra one); None ends it.

        Args:
            x: the layer's output so far.
            ran: the positions that ran the layer, or its last extra pass; nothing else may run again.
            sizes: [row][hop]: how many of `ran` each hop of this call has, as Python integers; a hop is a segment.
            latents: [row][hop]: how many of them are latents.
        """
