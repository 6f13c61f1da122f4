"""The file `rater.json`: what a rating means, apart from the weights that read it; known to gateways without torch.

Legend: n ratings, R of draft and target.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mmroute.errors import CheckpointMismatch
from mmroute.gate._calibrate import Calibration
from mmroute.gate._verify import Verifier
from mmroute.gate.base import score_of

__all__ = ["FORMAT", "Manifest", "first_threshold", "verifier_of"]

FORMAT = "prp/1"


def first_threshold(facts: Mapping[str, Any], budget: float) -> float | None:
    """The threshold of a share of target calls on the calibration split; None where the file names no quantiles."""
    quantiles = facts.get("quantiles")
    return None if not quantiles else float(np.interp(1 - budget, np.linspace(0, 1, len(quantiles)), quantiles))


def verifier_of(facts: Mapping[str, Any]) -> Verifier | None:
    """The fit of a second look at finished answers; None where the file has none."""
    weights = facts.get("verify")
    return None if weights is None else Verifier(tuple(weights))


@dataclass(frozen=True)
class Manifest:
    """One artifact's file, read."""

    config: dict[str, Any]
    """Options of the gate `prp`."""
    base: str
    """Weights of the draft, as a hash."""
    weights: str
    """Of `rater.safetensors`; the hash of nothing where a form has no weights of its own."""
    calibrators: list[Calibration]
    facts: dict[str, Any]
    """The rest: pair, splits, quantiles, costs, figures."""
    text: bytes

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a folder that `mmroute train prp` wrote.

        Raises:
            CheckpointMismatch: it is missing, torn, or of another format.
        """
        try:
            text = (folder / "rater.json").read_bytes()
            found = json.loads(text)
            if found.get("format") != FORMAT:
                raise CheckpointMismatch(f"{folder}: format {found.get('format')!r}, this version reads {FORMAT!r}")
            config, base, weights = (found[key] for key in ("config", "base", "weights"))
            calibrators = [Calibration.from_dict(each) for each in found["calibrators"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointMismatch(f"{folder}: not a rater ({error}); `mmroute train prp` writes one") from None
        own = {"format", "config", "base", "weights", "calibrators"}
        facts = {key: value for key, value in found.items() if key not in own}
        return cls(config, base, weights, calibrators, facts, text)

    @property
    def is_written(self) -> bool:
        """Whether the draft writes its ratings, so that any server can serve it."""
        return self.config.get("form") == "tokens"

    def id_with(self, weights: bytes = b"") -> str:
        """The artifact's name in headers, logs and results."""
        return hashlib.sha256(weights + self.text).hexdigest()[:16]

    def calibrated(self, raw: Sequence[Float[np.ndarray, " n"]]) -> list[Float[np.ndarray, " n"]]:
        """Predicted chances, from what was read."""
        return [c(r) for c, r in zip(self.calibrators, raw, strict=True)] if self.calibrators else list(raw)

    def score(self, rated: Sequence[Float[np.ndarray, " n"]]) -> Float[np.ndarray, " n"]:
        """What queries are ranked by, from predicted chances."""
        target = rated[1] if len(rated) == 2 else None
        weight = self.config.get("cost_weight", 0.0)
        return score_of(self.config.get("score", "advantage"), rated[0], target, cost_weight=weight, cost_gap=1.0)
