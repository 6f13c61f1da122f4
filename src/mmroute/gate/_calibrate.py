"""From a rating to a probability, by a map that never changes the order: Platt's, or isotonic without its ties.

Legend: n ratings.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from mmroute.errors import ConfigError
from mmroute.gate._features import Logistic

__all__ = ["Calibration", "calibration", "logit"]

Array = Float[np.ndarray, " n"]
_TIE = 1e-6


@dataclass(frozen=True)
class Calibration:
    """One rating's map; plain data both ways."""

    kind: Literal["platt", "isotonic", "none"]
    slope: float = 1.0
    shift: float = 0.0
    knots: list[tuple[float, float]] = field(default_factory=list)

    def __call__(self, rating: Array) -> Array:
        """Probabilities in [0, 1]."""
        if self.kind == "platt":
            return 1 / (1 + np.exp(-(self.slope * logit(rating) + self.shift)))
        if self.kind == "isotonic":
            x, y = np.array(self.knots).T
            # Between knots straight lines; on a plateau a last digit of the rating itself keeps the order.
            return np.interp(rating, x, y) * (1 - _TIE) + _TIE * rating
        return rating

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Calibration":
        return cls(**{**data, "knots": [tuple(knot) for knot in data["knots"]]})


def calibration(kind: str, rating: Array, success: Array) -> Calibration:
    """Fits the map of one rating.

    Args:
        kind: `platt` (fine from 200 items on), `isotonic` (from 1000 on) or `none`.
        rating: in [0, 1].
        success: what happened.

    Raises:
        ConfigError: the rating falls where success rises, so no increasing map can help.
    """
    if kind == "none":
        return Calibration("none")
    if kind == "isotonic":
        return Calibration("isotonic", knots=_isotonic(rating, success))
    model = Logistic(ridge=1e-3).fit(logit(rating)[:, None], success)
    slope = float(model.weight[1])
    if slope <= 0:
        raise ConfigError(
            f"the rating is anti-correlated with success (slope {slope:.3g} on {len(rating)} items); train longer, "
            "collect more labels, or set calibration=none"
        )
    return Calibration("platt", slope, float(model.weight[0]))


def logit(p: Array) -> Array:
    """Log-odds, of probabilities kept off 0 and 1."""
    p = np.clip(p, 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p))


def _isotonic(rating: Array, success: Array) -> list[tuple[float, float]]:
    """Pool adjacent violators: block means of the ratings and of their successes."""
    order = np.argsort(rating, kind="stable")
    blocks: list[list[float]] = []  # weight, rating, success
    for x, y in zip(rating[order], success[order], strict=True):
        blocks.append([1.0, float(x), float(y)])
        while len(blocks) > 1 and blocks[-2][2] >= blocks[-1][2]:
            w, a, b = blocks.pop()
            v = blocks[-1][0]
            blocks[-1] = [v + w, (v * blocks[-1][1] + w * a) / (v + w), (v * blocks[-1][2] + w * b) / (v + w)]
    return [(x, y) for _, x, y in blocks]
