"""Asks the draft, after its answer, whether the answer is correct.

Source: P(True), Kadavath et al. (arXiv 2207.05221).
"""

from collections.abc import Sequence

from mmroute.config import options
from mmroute.gate.base import Evidence, Gate, Needs, Question, Ratings
from mmroute.gate.verbalised import replies

__all__ = ["PTrue"]


class PTrue(Gate):
    """1 - p(A) / (p(A) + p(B)); the answer and one more call are paid for on every query."""

    needs: Needs = "answer"

    @options
    class Config:
        text: str = "Is this answer correct?\n(A) True\n(B) False\nThe answer is ("
        """What is asked; a model of few words needs others."""
        choices: tuple[str, str] = ("A", "B")
        """The tokens that say true and false."""

    @property
    def questions(self) -> list[Question]:
        return [Question("p_true", self.config.text, self.config.choices)]

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        said = replies(evidence, "p_true")
        return Ratings(1 - said, draft=said)
