"""How sure the draft is of its first tokens: the fair foil to rating before the first one.

Source: early-exit variants of cascades; ours.
"""

from collections.abc import Sequence
from typing import Literal

from mmroute.config import options
from mmroute.gate.base import Evidence, Gate, Needs, Ratings
from mmroute.gate.logprob import figures

__all__ = ["Early"]


class Early(Gate):
    """Minus the mean log-probability of the first tokens; a query that is sent pays those steps."""

    needs: Needs = "early"

    @options
    class Config:
        steps: Literal[8, 16, 64] = 8
        """First tokens that are looked at."""

    @property
    def steps(self) -> int:
        return self.config.steps

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        return Ratings(-figures(evidence, f"lp_early_{self.config.steps}"))
