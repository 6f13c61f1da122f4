"""What perfect knowledge would do: the ceiling, and perfect hardest-first below it.

Source: section 8 of this project's specification; the gap between the two is what rating the target as well can win.
"""

from collections.abc import Sequence
from typing import Literal

from mmroute.config import options
from mmroute.gate.base import Evidence, Gate, Needs, Ratings

__all__ = ["Oracle"]


class Oracle(Gate):
    """Reads the outcomes."""

    needs: Needs = "outcome"

    @options
    class Config:
        by: Literal["advantage", "difficulty"] = "advantage"
        """`advantage` is p_t - p_d, above every ranking at every share; `difficulty` is 1 - p_d."""

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        draft, target = self._known(evidence)
        return Ratings(target - draft if self.config.by == "advantage" else 1 - draft, draft, target)
