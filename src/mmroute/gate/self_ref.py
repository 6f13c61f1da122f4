"""Two tokens, "confident" and "unsure", that the draft learns to tell right from wrong answers by.

Source: Self-REF (Chuang et al., arXiv 2410.13284).
Deviates: the draft stays frozen and the two tokens are two new rows of its output layer, so the choice between them is
a logistic regression on the last hidden state; the paper fine-tunes the model too. `pre` is ours: the same before the
first token, which sets supervised tuning apart from what is learned by reward.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from pydantic import Field

from mmroute.config import options
from mmroute.errors import InputError
from mmroute.gate._features import Logistic
from mmroute.gate.base import Evidence, Gate, Needs, Prefill, Ratings

__all__ = ["SelfRef"]


class SelfRef(Gate):
    """p(unsure) / (p(unsure) + p(confident)) after the draft's own answer, or before it."""

    needs: Needs = "answer"
    trained: ClassVar[bool] = True

    @options
    class Config:
        when: Literal["pre", "post"] = "post"
        """After the answer, which is then paid for on every query, or before."""
        ridge: Annotated[float, Field(gt=0)] = 10.0
        """Weight of the squared coefficients."""

    def __init__(self, **given: object) -> None:
        super().__init__(**given)
        if self.config.when == "pre":
            self.needs = "prefill"

    def fit(self, evidence: Sequence[Evidence]) -> None:
        draft, _ = self._known(evidence)
        x = self._states(evidence)
        self._centre, self._scale = x.mean(0), x.std(0) + 1e-6
        self._model = Logistic(self.config.ridge).fit((x - self._centre) / self._scale, draft)

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        draft: np.ndarray = self._model((self._states(evidence) - self._centre) / self._scale)
        return Ratings(1 - draft, draft)

    def _states(self, evidence: Sequence[Evidence]) -> Float[np.ndarray, "n D"]:
        out = []
        for each in evidence:
            if self.config.when == "pre":
                state = each.session.last[-1] if isinstance(each.session, Prefill) else None
            else:
                state = each.answer.last if each.answer is not None else None
            if state is None:
                raise InputError(
                    f"query {each.query.id!r} has no hidden state {self.config.when} the answer; collect it"
                )
            out.append(state)
        return np.stack(out).astype(np.float64)
