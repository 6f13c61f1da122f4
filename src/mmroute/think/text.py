"""What a hop is: one written step of a chain of thought.

Source: chain of thought as DARE's hops (one thought is one hop) and the baseline of Vedas.
Deviates: no paper says where a written thought ends. Here a hop begins where a step is named (`s3`, `Step 3`), or
    after a line break; the pattern is an option.
"""

import re
from typing import Annotated, Any

from pydantic import Field

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.think.base import Thinker

__all__ = ["Text"]


class Text(Thinker):
    """Written chain of thought, step by step, then the answer."""

    @options
    class Config:
        max_new_tokens: Annotated[int, Field(ge=1)] = 512
        """Longest chain, answer included."""
        instruction: str = "Think step by step, one step a line, and end with: Answer: <answer>"
        """Appended to a free question."""
        hop_pattern: str = r"^\s*s\d+$|\n|^\s*answer:$"
        """Regular expression over the text of one generated token; a match begins a hop."""

    style = "cot"
    config: Config

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        try:
            self._begins = re.compile(self.config.hop_pattern)
        except re.error as error:
            raise ConfigError(f"think.text.hop_pattern: not a regular expression: {error}") from None

    def starts_hop(self, piece: str) -> bool:
        return self._begins.search(piece) is not None
