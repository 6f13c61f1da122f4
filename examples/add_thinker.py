"""What a hop is: one bullet. Ask for a list, and close a hop where the next bullet begins.

python examples/add_thinker.py FOLDER_OR_HUB_ID maze.png "Which exit is reached?"

Source: none, an example.
Deviates: nothing to deviate from.
"""

import sys
from typing import Annotated, Any

from pydantic import Field

import mmroute
from mmroute.config import options
from mmroute.think.base import Thinker

__all__ = ["Bullets"]


class Bullets(Thinker):
    """Written thoughts as a list; each item is a hop."""

    @options
    class Config:
        max_new_tokens: Annotated[int, Field(ge=1)] = 256
        """Longest list, answer included."""
        mark: str = "-"
        """What an item begins with."""

    style = "cot"  # the prompt style that generated tasks use for it
    config: Config

    @property
    def cues(self) -> list[str]:
        """What is appended to a free question; the first that the vocabulary can write."""
        return [f"Think in a list, each step after '{self.config.mark}', then write: Answer: <answer>", "cot:"]

    def starts_hop(self, piece: str) -> bool:
        return piece.strip() == self.config.mark


def main(model_name: str, image: Any, question: str, **given: Any) -> list[str]:
    with mmroute.attach(mmroute.load(model_name)) as routed:
        answer = routed.answer(question, image, think=Bullets(**given))
    for number, hop in enumerate(answer.hops, 1):
        print(f"hop {number}: {hop!r}")
    return answer.hops


if __name__ == "__main__":
    main(*sys.argv[1:4])
