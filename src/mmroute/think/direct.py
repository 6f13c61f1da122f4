"""What a hop is: nothing. The model answers at once.

Source: the direct-answer baseline of all three papers.
"""

from typing import Annotated

from pydantic import Field

from mmroute.config import options
from mmroute.think.base import Thinker

__all__ = ["Direct"]


class Direct(Thinker):
    """No reasoning is written: the prompt, then the answer."""

    @options
    class Config:
        max_new_tokens: Annotated[int, Field(ge=1)] = 16
        """Longest answer."""
        instruction: str = "Answer with the final answer only."
        """Appended to a free question."""

    style = "direct"
    config: Config
