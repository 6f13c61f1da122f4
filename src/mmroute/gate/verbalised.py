"""Asks the draft for a number: how likely is it that it will be, or was, right?

Source: verbalised confidence, Lin et al. (arXiv 2205.14334), zero-shot.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from mmroute.config import options
from mmroute.errors import InputError
from mmroute.gate.base import Evidence, Gate, Needs, Question, Ratings

__all__ = ["Verbalised"]

_PRE = "How likely are you to answer this correctly? Write one number from 0 to 100 and nothing else."
_POST = "How likely is it that this answer is correct? Write one number from 0 to 100 and nothing else."


class Verbalised(Gate):
    """1 - number / certain; the answer and one more call are paid for on every query."""

    needs: Needs = "answer"

    @options
    class Config:
        when: Literal["pre", "post"] = "post"
        """Asked before the draft answers, or after."""
        text: str = ""
        """What is asked, if not in English; a model of few words needs others."""
        certain: Annotated[float, Field(gt=0)] = 100.0
        """The number that means certain."""

    def __init__(self, **given: object) -> None:
        super().__init__(**given)
        if self.config.when == "pre":
            self.needs = "prefill"

    @property
    def questions(self) -> list[Question]:
        when = self.config.when
        text = self.config.text or (_PRE if when == "pre" else _POST)
        return [Question(f"verbalised_{when}", text, after_answer=when == "post")]

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        said = np.clip(replies(evidence, self.questions[0].name) / self.config.certain, 0, 1)
        return Ratings(1 - said, draft=said)


def replies(evidence: Sequence[Evidence], name: str) -> np.ndarray:
    """What the draft replied to a question, by query.

    Raises:
        InputError: it was not asked.
    """
    missing = [e.query.id for e in evidence if name not in e.replies]
    if missing:
        raise InputError(f"{len(missing)} queries have no reply to {name!r} ({missing[0]!r}); the draft must be asked")
    return np.array([e.replies[name] for e in evidence], dtype=float)
