"""A linear probe of the frozen draft's hidden state at the last prompt token: does it know that it knows?

Source: P(IK), Kadavath et al. (arXiv 2207.05221); layer and ridge picked on held-out groups, as in PIKA.
Deviates: linear, on the state of one layer.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float

from mmroute.config import options
from mmroute.errors import InputError
from mmroute.gate._features import Logistic, held_out
from mmroute.gate.base import Evidence, Gate, Needs, Prefill, Ratings, score_of

__all__ = ["Probe"]

_RIDGES = (1.0, 10.0, 100.0)


class Probe(Gate):
    """1 - sigmoid(w h + b), or the difference of two such heads."""

    needs: Needs = "prefill"
    trained: ClassVar[bool] = True

    @options
    class Config:
        at: Literal["last", "mean"] = "last"
        """The last prompt position, or the mean over the prompt."""
        heads: Literal[1, 2] = 1
        """1 rates the draft alone; 2 the target too, which gives the advantage."""

    def fit(self, evidence: Sequence[Evidence]) -> None:
        known = self._known(evidence)[: self.config.heads]
        states, held = self._states(evidence), held_out(evidence)
        held = held if 0 < held.sum() < len(held) else np.arange(len(held)) % 5 == 0
        self._centre, self._scale = states.mean(0), states.std(0) + 1e-6
        states = (states - self._centre) / self._scale
        self._heads: list[tuple[int, Logistic]] = []
        for y in known:
            found = []
            for layer in range(states.shape[1]):
                x = states[:, layer]
                for ridge in _RIDGES:
                    loss = Logistic(ridge).fit(x[~held], y[~held]).loss(x[held], y[held])
                    found.append((loss, layer, ridge))
            _, layer, ridge = min(found)
            self._heads.append((layer, Logistic(ridge).fit(states[:, layer], y)))

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        states = (self._states(evidence) - self._centre) / self._scale
        rated = [model(states[:, layer]) for layer, model in self._heads]
        target = rated[1] if self.config.heads == 2 else None
        return Ratings(score_of("draft" if target is None else "advantage", rated[0], target), rated[0], target)

    def _states(self, evidence: Sequence[Evidence]) -> Float[np.ndarray, "n L D"]:
        out = []
        for each in evidence:
            state = getattr(each.session, self.config.at) if isinstance(each.session, Prefill) else None
            if state is None:
                raise InputError(f"query {each.query.id!r} has no hidden states of the draft's prefill; collect them")
            out.append(state)
        return np.stack(out).astype(np.float64)
