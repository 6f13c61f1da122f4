"""How a local draft's query is rated: by what was trained for it, or by how sure the draft is of its first token.

Legend: V vocabulary.
"""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from mmroute.gate.base import Rating
from mmroute.session import Session

__all__ = ["FirstToken", "SessionRater", "TrainedRater"]


class SessionRater(Protocol):
    """Rates a query from the draft's prompt, read and cached, before the first thought."""

    artifact: str
    """Named in headers and logs, so that a threshold has a provenance."""
    after: int
    """Tokens that the draft writes before it is rated."""

    def rate(self, session: Session, logits: Tensor) -> Rating:
        """May enter positions; must leave the session as it was.

        Args:
            logits: (1, V) of the prompt's last position.
        """

    def start(self, budget: float) -> float | None:
        """The threshold of a share for a policy's first decisions, if it is known from calibration."""


class FirstToken:
    """Without training: how sure the draft is of its first token.

    Source: the maximum softmax probability, as any log-probability baseline, read before anything is written.
    Deviates: PRP trains a rating; this one is what a pair without a trained rater starts with, and no good judge of a
        long chain of thought.
    """

    artifact, after = "first-token", 0

    def rate(self, session: Session, logits: Tensor) -> Rating:
        sure = float(logits[0].float().softmax(-1).max())
        return Rating(1 - sure, sure)

    def start(self, budget: float) -> float | None:
        return None


class TrainedRater:
    """What `mmroute train prp` made, a folder or on the Hub, on the draft it was trained on."""

    def __init__(self, name: str | Path, model: Any) -> None:
        from mmroute.gate.prp import Prp

        self.gate = Prp.from_pretrained(name, model)
        self.artifact, self.after = f"prp:{self.gate.facts['artifact']}", self.gate.steps

    def rate(self, session: Session, logits: Tensor) -> Rating:
        return self.gate.one(self.gate.rate_session(session), 0)

    def start(self, budget: float) -> float | None:
        return self.gate.start(budget)
