"""A scorer of the draft's answer: is this what a right answer to such a question reads like?

Source: FrugalGPT (Chen et al., arXiv 2305.05176): a learned score of query and answer decides whether to ask on.
Deviates: logistic regression on hashed words of both, lengths and cheap image figures, not a fine-tuned encoder; one
model to fall back on, so its order of models and its thresholds are the policy's.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from jaxtyping import Float
from pydantic import Field

from mmroute.config import options
from mmroute.errors import InputError
from mmroute.gate._features import Features, Logistic
from mmroute.gate.base import Evidence, Gate, Needs, Query, Ratings

__all__ = ["Frugal"]


class Frugal(Gate):
    """1 - g(query, answer); the draft's whole answer is paid for on every query."""

    needs: Needs = "answer"
    trained: ClassVar[bool] = True

    @options
    class Config:
        ridge: Annotated[float, Field(gt=0)] = 10.0
        """Weight of the squared coefficients."""
        buckets: Annotated[int, Field(ge=1)] = 512
        """Places that the words of the answer are hashed to; its query has as many."""

    def fit(self, evidence: Sequence[Evidence]) -> None:
        draft, _ = self._known(evidence)
        self._query, self._answer = Features(self.config.buckets), Features(self.config.buckets)
        x = [self._query.fit([e.query for e in evidence]), self._answer.fit(_answers(evidence))]
        self._model = Logistic(self.config.ridge).fit(np.concatenate(x, 1), draft)

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        x = [self._query([e.query for e in evidence]), self._answer(_answers(evidence))]
        draft: Float[np.ndarray, " n"] = self._model(np.concatenate(x, 1))
        return Ratings(1 - draft, draft)


def _answers(evidence: Sequence[Evidence]) -> list[Query]:
    """The answers as texts of their own; what was read out of one where the text was not kept.

    Raises:
        InputError: an answer is missing.
    """
    out = []
    for each in evidence:
        text = "" if each.answer is None else each.answer.text or each.answer.label
        if not text:
            raise InputError(f"query {each.query.id!r} has no answer of the draft to score; collect it with its text")
        out.append(Query(each.query.id, text=text))
    return out
