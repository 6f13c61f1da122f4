"""One model answers everything: the two ends of every curve.

Source: none needed; always-target is what accuracy and cost are compared with.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mmroute.config import options
from mmroute.gate.base import Evidence, Gate, Needs, Ratings

__all__ = ["Always"]


class Always(Gate):
    """The same score for every query."""

    needs: Needs = "nothing"

    @options
    class Config:
        route: Literal["draft", "target"] = "target"
        """Who answers."""

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        return Ratings(np.full(len(evidence), np.inf if self.config.route == "target" else -np.inf))
