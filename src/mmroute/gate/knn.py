"""What the target gained on the most similar known queries.

Source: the kNN router of RouterBench (arXiv 2403.12031).
Deviates: cosine similarity of hashed words, lengths and cheap image figures, not of an encoder's embeddings.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float
from pydantic import Field

from mmroute.config import options
from mmroute.gate._features import Features
from mmroute.gate.base import Evidence, Gate, Needs, Ratings

__all__ = ["Knn"]


class Knn(Gate):
    """Mean of c_t - c_d over the neighbours."""

    needs: Needs = "nothing"
    trained: ClassVar[bool] = True

    @options
    class Config:
        neighbours: Annotated[int, Field(ge=1)] = 64
        """How many; fewer where fewer are known."""

    def fit(self, evidence: Sequence[Evidence]) -> None:
        self._features = Features()
        self._known_queries = _unit(self._features.fit([e.query for e in evidence]))
        self._success = np.stack(self._known(evidence), 1)

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        similar = _unit(self._features([e.query for e in evidence])) @ self._known_queries.T
        k = min(self.config.neighbours, similar.shape[1])
        nearest = np.argpartition(-similar, k - 1, axis=1)[:, :k]
        draft, target = self._success[nearest].mean(1).T
        return Ratings(target - draft, draft, target)


def _unit(x: Float[np.ndarray, "n F"]) -> Float[np.ndarray, "n F"]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
