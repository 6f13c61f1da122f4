"""What a hop is: some words and a picture that the model writes, code by code.

Source: MVoT (arXiv 2501.07542): visual thoughts in the token stream of a model that writes images (Anole); its
    released roll-out for `markov2`.
Deviates: none of the codes is sampled apart from the words; where a picture begins is the model's choice, as in the
    release. In `markov2` what was written is entered anew behind the prompt, which stays cached; the release enters
    the prompt anew too, to the same end.
"""

from typing import Annotated, Literal

from pydantic import Field

from mmroute.config import options
from mmroute.think.base import Thinker

__all__ = ["Image"]


class Image(Thinker):
    """Visual thoughts: each hop is drawn."""

    @options
    class Config:
        context: Literal["accumulate", "markov2"] = "accumulate"
        """Which pictures later hops see: all, or those of the prompt and the last one drawn. Words stay."""
        max_new_tokens: Annotated[int, Field(ge=1)] = 4096
        """Longest chain, codes of pictures and the answer included; an Anole picture has 1024."""
        instruction: str = "Think step by step, draw the state after each step, and end with: Answer: <answer>"
        """Appended to a free question."""

    style = "image"
    draws = True
    config: Config
