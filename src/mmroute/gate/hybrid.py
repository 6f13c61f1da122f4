"""A classifier of the query alone: is the draft as good as the target here?

Source: Hybrid LLM (Ding et al., arXiv 2404.14618), its probabilistic and transformed labels.
Deviates: logistic regression on hashed words, lengths and cheap image figures, not a fine-tuned encoder.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from mmroute.config import options
from mmroute.gate._features import Features, Logistic
from mmroute.gate.base import Evidence, Gate, Needs, Ratings

__all__ = ["Hybrid"]


class Hybrid(Gate):
    """1 - P(q_d >= q_t - t)."""

    needs: Needs = "nothing"
    trained: ClassVar[bool] = True

    @options
    class Config:
        ridge: Annotated[float, Field(gt=0)] = 10.0
        """Weight of the squared coefficients."""
        slack: Literal["none", "spread"] = "none"
        """t: 0, or the one that spreads the labels furthest apart."""

    def fit(self, evidence: Sequence[Evidence]) -> None:
        draft, target = self._known(evidence)
        slacks = np.unique(np.concatenate([[0.0], target - draft])) if self.config.slack == "spread" else np.zeros(1)
        slacks = slacks[slacks >= 0]
        labels = [(draft >= target - t).astype(float) for t in slacks]
        spread = [label.mean() * (1 - label.mean()) for label in labels]  # half the mean pairwise distance
        self._features = Features()
        x = self._features.fit([e.query for e in evidence])
        self._model = Logistic(self.config.ridge).fit(x, labels[int(np.argmax(spread))])

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        return Ratings(1 - self._model(self._features([e.query for e in evidence])))
