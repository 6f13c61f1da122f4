"""How long the prompt is: what every router must beat.

Source: none needed; a control.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mmroute.config import options
from mmroute.gate.base import Evidence, Gate, Needs, Ratings

__all__ = ["Length"]


class Length(Gate):
    """Long prompts go to the target."""

    needs: Needs = "nothing"

    @options
    class Config:
        key: Literal["text", "image"] = "text"
        """Tokens of the text, or of the images."""

    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        image = np.array([e.query.image_tokens for e in evidence], float)
        if self.config.key == "image":
            return Ratings(image)
        return Ratings(np.array([e.query.prompt_tokens for e in evidence], float) - image)
