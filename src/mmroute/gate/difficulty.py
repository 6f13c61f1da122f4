"""A classifier of the query alone: will the draft fail?

Source: query-difficulty routers, as in RouteLLM (arXiv 2406.18665) and its kin.
Deviates: logistic regression on hashed words, lengths and cheap image figures, not a fine-tuned encoder.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from mmroute.config import options
from mmroute.gate._features import Features, Logistic
from mmroute.gate.base import Evidence, Gate, Needs, Ratings

__all__ = ["Difficulty"]


class Difficulty(Gate):
    """P(draft wrong) from what is known before any model reads the query."""

    needs: Needs = "nothing"
    trained: ClassVar[bool] = True

    @options
    class Config:
        ridge: Annotated[float, Field(gt=0)] = 10.0
        """Weight of the squared coefficients."""

    def fit(self, evidence: Sequence[Evidence]) -> None:
        draft, _ = self._known(evidence)
        self._features = Features()
        self._model = Logistic(self.config.ridge).fit(self._features.fit([e.query for e in evidence]), draft)

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        draft: np.ndarray = self._model(self._features([e.query for e in evidence]))
        return Ratings(1 - draft, draft)
