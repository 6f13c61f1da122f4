"""Asks the draft, after its answer, whether the answer is correct.

Source: P(True), Kadavath et al. (arXiv 2207.05221).
"""

from collections.abc import Sequence

from mmroute.gate.base import Evidence, Gate, Needs, Question, Ratings
from mmroute.gate.verbalised import replies

__all__ = ["PTrue"]

_ASKED = Question("p_true", "Is this answer correct?\n(A) True\n(B) False\nThe answer is (", ("A", "B"))


class PTrue(Gate):
    """1 - p(A) / (p(A) + p(B)); the answer and one more call are paid for on every query."""

    needs: Needs = "answer"

    @property
    def questions(self) -> list[Question]:
        return [_ASKED]

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        said = replies(evidence, _ASKED.name)
        return Ratings(1 - said, draft=said)
