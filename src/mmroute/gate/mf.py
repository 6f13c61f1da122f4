"""Each model as a vector, each query as another: their product is how likely the model is to be right.

Source: the matrix factorisation router of RouteLLM (arXiv 2406.18665).
Deviates: fitted on each model's own success, not on which of two answers people liked; a query is hashed words, lengths
and cheap image figures, not an embedding.

Legend: n queries, F features, M models (draft, target), r rank.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float
from pydantic import Field

from mmroute.config import options
from mmroute.gate._features import Features
from mmroute.gate.base import Evidence, Gate, Needs, Ratings

__all__ = ["MatrixFactorisation"]

_STEPS, _RATE, _DECAY = 400, 0.02, 1e-8


class MatrixFactorisation(Gate):
    """sigmoid(v_t . W e + b_t) - sigmoid(v_d . W e + b_d)."""

    needs: Needs = "nothing"
    trained: ClassVar[bool] = True

    @options
    class Config:
        rank: Annotated[int, Field(ge=1)] = 16
        """Length of a model's vector."""
        ridge: Annotated[float, Field(gt=0)] = 10.0
        """Weight of the squared entries of both factors."""
        seed: Annotated[int, Field(ge=0)] = 0
        """Of the first values."""

    def fit(self, evidence: Sequence[Evidence]) -> None:
        success = np.stack(self._known(evidence), 1)
        self._features = Features()
        x = self._features.fit([e.query for e in evidence])
        rng, rank = np.random.default_rng(self.config.seed), self.config.rank
        factors = {
            "v": rng.normal(size=(2, rank)) / rank**0.5,
            "w": rng.normal(size=(rank, x.shape[1])) / x.shape[1] ** 0.5,
            "b": np.zeros(2),
        }
        moments = {name: [np.zeros_like(f), np.zeros_like(f)] for name, f in factors.items()}
        for step in range(1, _STEPS + 1):
            slopes = self._slopes(factors, x, success)
            for name, slope in slopes.items():  # Adam
                first, second = moments[name]
                first += 0.1 * (slope - first)
                second += 0.001 * (slope**2 - second)
                move = (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + _DECAY)
                factors[name] = factors[name] - _RATE * (1 - step / _STEPS) * move
        self._factors = factors

    def _slopes(
        self, factors: dict[str, np.ndarray], x: Float[np.ndarray, "n F"], success: Float[np.ndarray, "n M"]
    ) -> dict[str, np.ndarray]:
        """Gradient of the mean cross-entropy plus ridge / 2n times the squares of both factors."""
        v, w, n = factors["v"], factors["w"], len(x)
        hidden = x @ w.T
        off = (_sigmoid(hidden @ v.T + factors["b"]) - success) / n
        shrink = self.config.ridge / n
        return {"v": off.T @ hidden + shrink * v, "w": v.T @ (off.T @ x) + shrink * w, "b": off.sum(0)}

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        x = self._features([e.query for e in evidence])
        f = self._factors
        draft, target = _sigmoid(x @ f["w"].T @ f["v"].T + f["b"]).T
        return Ratings(target - draft, draft, target)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -40, 40)))
