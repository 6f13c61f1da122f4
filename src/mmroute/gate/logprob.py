"""How sure the draft was of what it wrote, read off its finished answer; and of the first tokens, read off those.

Source: cascades by sequence probability (Gupta et al., arXiv 2404.10136: the quantile is the best simple one);
self-consistent tails from DeepConf (arXiv 2508.15260).
Deviates: DeepConf's confidence is that of the token written, not of the k best.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mmroute.config import options
from mmroute.errors import InputError
from mmroute.gate.base import Evidence, Gate, Needs, Ratings

__all__ = ["LogProb"]

_READS = {
    # option: figure, and the sign that makes larger mean "unsure"
    "mean": ("lp_mean", -1),
    "sum": ("lp_sum", -1),
    "min": ("lp_min", -1),
    "quantile": ("lp_q90", -1),
    "entropy": ("ent_mean", 1),
    "max_entropy": ("ent_max", 1),
    "margin": ("margin", -1),
    "answer": ("lp_answer", -1),
    "tail": ("conf_tail", -1),
    "lowest": ("conf_low", -1),
}


class LogProb(Gate):
    """Unsure answers go to the target; the draft's whole answer is paid for on every query."""

    needs: Needs = "answer"

    @options
    class Config:
        stat: Literal[
            "mean", "sum", "min", "quantile", "entropy", "max_entropy", "margin", "answer", "tail", "lowest"
        ] = "mean"
        """Which figure of the tokens' distributions; `quantile` is the .9 quantile of -log p, `answer` looks at the
        answer's own tokens."""

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        name, sign = _READS[self.config.stat]
        return Ratings(sign * figures(evidence, name))


def figures(evidence: Sequence[Evidence], name: str) -> np.ndarray:
    """One figure of every answer.

    Raises:
        InputError: an answer is missing, or was collected without it.
    """
    out = np.empty(len(evidence))
    for i, each in enumerate(evidence):
        wrote = each.answer or each.early
        if wrote is None or name not in wrote.stats:
            raise InputError(
                f"query {each.query.id!r} has no {name} of the draft's answer; collect it with log-probabilities"
            )
        out[i] = wrote.stats[name]
    return out
