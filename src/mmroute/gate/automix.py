"""Asks the draft, after its answer and some examples of such checks, for several verdicts on it, and counts them.

Source: AutoMix (Madaan et al., arXiv 2310.12963): few-shot self-verification, sampled several times.
Deviates: its meta-verifier, which learns when to trust the share, is the policy's threshold; a verdict is one token, so
the samples are drawn from one reading of the question, which is what they are charged.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from mmroute.config import options
from mmroute.gate.base import Evidence, Gate, Needs, Question, Ratings
from mmroute.gate.verbalised import replies

__all__ = ["AutoMix"]

_TEXT = """Check the answer above against the image and the question. Examples of such checks:
Question: what colour is the bus? In the image: a red bus. Answer: red. Verdict: (A)
Question: how many dogs are there? In the image: two dogs. Answer: three. Verdict: (B)
Question: is the door open? In the image: an open door. Answer: yes. Verdict: (A)
(A) is a right answer, (B) a wrong one. Verdict on the answer above: ("""


class AutoMix(Gate):
    """1 - the share of verdicts that say correct; the answer and the check are paid for on every query."""

    needs: Needs = "answer"

    @options
    class Config:
        verdicts: Annotated[int, Field(ge=1)] = 8
        """Sampled, at temperature 1."""
        text: str = _TEXT
        """What is asked, with its examples; a model of few words needs others."""
        choices: tuple[str, str] = ("A", "B")
        """The tokens that say right and wrong."""

    @property
    def questions(self) -> list[Question]:
        config = self.config
        return [Question("automix", config.text, config.choices, draws=config.verdicts)]

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        said = replies(evidence, "automix")
        return Ratings(1 - said, draft=said)
