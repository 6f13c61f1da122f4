"""What is known of a query before any model reads it, as numbers; and the small models that are fitted on them.

Legend: n queries, F features.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from mmroute.errors import ConfigError
from mmroute.gate.base import Evidence, Query

__all__ = ["Features", "Logistic", "held_out"]

Array = Float[np.ndarray, " n"]
Matrix = Float[np.ndarray, "n F"]


@lru_cache(maxsize=100_000)
def _bucket(word: str, buckets: int) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") % buckets


def _words(text: str) -> list[str]:
    words = text.lower().split()
    return [*words, *(f"{a} {b}" for a, b in pairwise(words))]


class Features:
    """Hashed words and word pairs by TF-IDF, lengths, and cheap figures of the images; standardised on what it was
    fitted on."""

    def __init__(self, buckets: int = 512) -> None:
        self.buckets = buckets
        self._idf = np.ones(buckets)
        self._centre = self._scale = np.zeros(0)

    def fit(self, queries: Sequence[Query]) -> Matrix:
        """Learns the scales; returns the features of these queries."""
        counts = self._counts(queries)
        self._idf = np.log((1 + len(queries)) / (1 + (counts > 0).sum(0))) + 1
        raw = self._raw(queries, counts)
        self._centre, self._scale = raw.mean(0), raw.std(0)
        self._scale[self._scale < 1e-9] = 1.0
        return (raw - self._centre) / self._scale

    def __call__(self, queries: Sequence[Query]) -> Matrix:
        """The features of other queries."""
        return (self._raw(queries, self._counts(queries)) - self._centre) / self._scale

    def _counts(self, queries: Sequence[Query]) -> Matrix:
        out = np.zeros((len(queries), self.buckets))
        for row, query in zip(out, queries, strict=True):
            np.add.at(row, [_bucket(word, self.buckets) for word in _words(query.text)], 1)
        return out

    def _raw(self, queries: Sequence[Query], counts: Matrix) -> Matrix:
        text = np.log1p(counts) * self._idf
        text /= np.maximum(np.linalg.norm(text, axis=1, keepdims=True), 1e-9)
        sizes = np.array([[np.log1p(q.prompt_tokens), np.log1p(q.image_tokens), len(q.images)] for q in queries])
        width = max((len(q.pixels) for q in queries), default=0)
        pixels = np.array([[*q.pixels, *[0.0] * (width - len(q.pixels))] for q in queries]).reshape(len(queries), width)
        return np.concatenate([text, sizes, pixels], axis=1)


class Logistic:
    """Ridge logistic regression by Newton steps; labels may be shares."""

    def __init__(self, ridge: float = 1.0, steps: int = 25) -> None:
        self.ridge, self.steps = ridge, steps
        self.weight = np.zeros(0)

    def fit(self, x: Matrix, y: Array) -> "Logistic":
        """Minimises the cross-entropy plus ridge / 2 times the squared weights, the constant left free.

        Raises:
            ConfigError: nothing to fit on.
        """
        if len(x) == 0:
            raise ConfigError("a classifier needs labelled queries; the train split is empty")
        z = np.concatenate([np.ones((len(x), 1)), x], axis=1)
        penalty = np.full(z.shape[1], self.ridge)
        penalty[0] = 1e-6
        self.weight = np.zeros(z.shape[1])
        for _ in range(self.steps):
            p = _sigmoid(z @ self.weight)
            slope = z.T @ (p - y) + penalty * self.weight
            curvature = (z * (p * (1 - p) + 1e-9)[:, None]).T @ z + np.diag(penalty)
            step = np.linalg.solve(curvature, slope)
            self.weight = self.weight - step
            if np.abs(step).max() < 1e-8:
                break
        return self

    def __call__(self, x: Matrix) -> Array:
        """Probabilities."""
        return _sigmoid(self.weight[0] + x @ self.weight[1:])

    def loss(self, x: Matrix, y: Array) -> float:
        """Mean squared error on other queries: what ridge and layer are picked by."""
        return float(((self(x) - y) ** 2).mean())


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -40, 40)))


def held_out(evidence: Sequence[Evidence], share: float = 0.2) -> np.ndarray:
    """Which queries a fit keeps for picking its settings: whole groups, by their names."""
    names = [e.query.group or e.query.id for e in evidence]
    return np.array([_bucket(f"inner {name}", 1000) < 1000 * share for name in names], dtype=bool)
