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

from mmroute import __version__, repository
from mmroute.errors import CheckpointMismatch
from mmroute.gate._calibrate import Calibration
from mmroute.gate._verify import Verifier
from mmroute.gate.base import score_of

__all__ = ["FORMAT", "MANIFEST", "WEIGHTS", "Manifest", "first_threshold", "folder_of", "shipped", "verifier_of"]

FORMAT = "prp/1"
MANIFEST, WEIGHTS = "rater.json", "rater.safetensors"
_ASSETS = Path(__file__).parent.parent / "assets"


def shipped(name: str | Path) -> Path | None:
    """The folder of a rater that comes with this package; None where none has that name."""
    folder = _ASSETS / name
    return folder if isinstance(name, str) and (folder / MANIFEST).is_file() else None


def folder_of(name: str | Path) -> Path:
    """Where a rater lies: a bundled name, a folder, or a Hub id, which is fetched.

    Raises:
        CheckpointMismatch: a Hub id that the Hub does not give.
    """
    here = shipped(name)
    if here is not None:
        return here
    if not Path(name).exists() and repository.is_hub_id(name):
        return repository.fetched(str(name), (MANIFEST, WEIGHTS), "`mmroute train prp`")
    return Path(name)


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
            text = (folder / MANIFEST).read_bytes()
            found = json.loads(text)
            if found.get("format") != FORMAT:
                raise CheckpointMismatch(
                    f"{folder}: {MANIFEST} is of format {found.get('format')!r}, this version of mmroute "
                    f"({__version__}) reads {FORMAT!r}; train the rater with it, or install the version that wrote it"
                )
            config, base, weights = (found[key] for key in ("config", "base", "weights"))
            calibrators = [Calibration.from_dict(each) for each in found["calibrators"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            hint = "`mmroute train prp` writes one"
            if (folder / "mmroute.json").is_file():
                hint = "it holds routing parts: mmroute.from_pretrained reads them"
            raise CheckpointMismatch(f"{folder}: not a rater ({error}); {hint}") from None
        own = {"format", "config", "base", "weights", "calibrators"}
        facts = {key: value for key, value in found.items() if key not in own}
        return cls(config, base, weights, calibrators, facts, text)

    @property
    def is_written(self) -> bool:
        """Whether the draft writes its ratings, so that any server can serve it."""
        return self.config.get("form") == "tokens"

    @property
    def pair(self) -> dict[str, str]:
        """`draft`, `target`, `target_weights`, as far as they are known."""
        return self.facts.get("pair") or {}

    @property
    def has_own_draft(self) -> bool:
        """Whether training changed the draft, so that the one it began with does not fit."""
        return self.is_written or bool((self.facts.get("train") or {}).get("train_reasoning"))

    @property
    def drafted_for(self) -> str | None:
        """The draft that fits, by the name it had in training; None where that one was changed, or is not named."""
        return None if self.has_own_draft else self.pair.get("draft")

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
