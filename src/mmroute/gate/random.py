"""The control: a share of queries goes to the target, whatever they are.

Source: every routing paper's baseline; its curve is the straight line between draft and target.
"""

from collections.abc import Sequence

import numpy as np

from mmroute.config import options
from mmroute.gate._policy import hash01
from mmroute.gate.base import Evidence, Gate, Needs, Ratings

__all__ = ["Random"]


class Random(Gate):
    """A number that depends on the query's id and the seed alone."""

    needs: Needs = "nothing"

    @options
    class Config:
        seed: int = 0
        """Another seed, another order."""

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        return Ratings(np.array([hash01(f"{self.config.seed} {e.query.id}") for e in evidence]))
