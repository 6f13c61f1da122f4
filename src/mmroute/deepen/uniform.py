"""Which positions go again: a fixed number of each segment, chosen without learning.

The control of learned depth at equal cost (`pick = random`) and its ceiling (`pick = all`).

Source: Vedas, the uniform and random rows of its ablation.
Deviates: random picks are a hash of (seed, layer, hop, place in the hop), so a row's choice does not depend on its
    batch, padded or not, and cached calls agree with full ones; a segment of one position selects nothing unless
    `pick = all`.
"""

from typing import Annotated, Literal

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.deepen._segments import at_random, best
from mmroute.deepen.base import Again, Deepener
from mmroute.tokens import Tokens

__all__ = ["Uniform"]


class Uniform(Deepener):
    """Training-free: the same budget in every routed layer."""

    @options
    class Config:
        deepen_tokens: Annotated[int, Field(ge=0)] = 32
        """Positions of each segment that run again."""
        pick: Literal["all", "random", "last"] = "random"
        """Which of a segment's positions those are; `all` ignores the count."""
        gain: float = 1.0
        """Strength of the second pass; 0 leaves the model as it is."""
        every: Annotated[int, Field(ge=1)] = 2
        """Every which layer has a second pass: 2 is layers 1, 3, 5, ..."""
        seed: int = 0
        """Another seed, another random pick."""

    config: Config

    def acts(self, layer: int, num_layers: int) -> bool:
        return layer % self.config.every == self.config.every - 1

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
        gain = x.new_full((*x.shape[:2], 1), self.config.gain)
        if self.config.pick == "all":
            return Again(ran, [sum(row) for row in sizes], gain)
        if self.config.pick == "random":
            score = at_random(tokens, self.config.seed, layer)
        else:
            score = tokens.position.float()
        budget = [[min(n, self.config.deepen_tokens) if n > 1 else 0 for n in row] for row in sizes]
        if not any(map(any, budget)):
            return None
        return Again(best(score, tokens, ran, budget), [sum(row) for row in budget], gain)
