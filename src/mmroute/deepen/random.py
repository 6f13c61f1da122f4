"""Which positions go again: random ones, with the step vectors learned as usual.

The control of a learned router: the same budgets, the same cost, the same training, another choice.

Source: Vedas (arXiv 2604.10500), against which its routers must be compared.
Deviates: not in the paper. The choice is a hash of (seed, layer, hop, place in the hop), so a row's choice does not
    depend on its batch, padded or not, and cached calls agree with full ones.
"""

from jaxtyping import Float
from torch import Tensor, nn

from mmroute.deepen._segments import at_random
from mmroute.deepen.vedas import Vedas
from mmroute.tokens import Tokens
from mmroute.trace import Shape

__all__ = ["Random"]


class Random(Vedas):
    """Random depth at equal cost; `gate` has no effect."""

    def fit(self, shape: Shape) -> None:
        super().fit(shape)
        self.router = nn.ModuleDict()  # nothing is ranked, and frozen weights would look like trained ones

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, layer: int) -> Float[Tensor, "B N"]:
        return at_random(tokens, self.config.seed, layer)

    def gates(self, score: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        return score.new_ones(score.shape)
