"""How far the draft agrees with itself over several sampled answers.

Source: self-consistency (Wang et al., arXiv 2203.11171) as a cascade's test (Yue et al., arXiv 2310.03094).
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mmroute.config import options
from mmroute.errors import InputError
from mmroute.gate.base import Evidence, Gate, Needs, Ratings

__all__ = ["SelfConsistency"]


class SelfConsistency(Gate):
    """Answers that disagree go to the target; every sample is paid for on every query."""

    needs: Needs = "samples"

    @options
    class Config:
        measure: Literal["vote", "entropy"] = "vote"
        """`vote` is 1 - the share of the most frequent answer, `entropy` that of all answers."""

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        missing = [e.query.id for e in evidence if len(e.samples) < 2]
        if missing:
            raise InputError(
                f"self-consistency needs two samples at least; {len(missing)} queries have fewer ({missing[0]!r})"
            )
        return Ratings(np.array([self._disagreement([s.label for s in e.samples]) for e in evidence]))

    def _disagreement(self, labels: list[str]) -> float:
        share = np.array(list(Counter(labels).values())) / len(labels)
        return float(1 - share.max()) if self.config.measure == "vote" else float(-(share * np.log(share)).sum())
