"""The contract of a way to think: what a reasoning hop is made of, and where one ends.

It knows hops and no layers, caches or models; `reason.py` runs the loop.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from mmroute.config import options, parse

__all__ = ["Thinker"]


class Thinker(ABC):
    """Base class of the files in `think/`."""

    @options
    class Config:
        pass

    style: ClassVar[Literal["cot", "direct"]]
    """Prompt style that generated tasks and benchmarks use for it."""
    config: Any

    def __init__(self, **given: Any) -> None:
        self.config = parse(type(self).Config, given, f"think.{type(self).__module__.rpartition('.')[2]}")

    @property
    @abstractmethod
    def cues(self) -> list[str]:
        """Texts that ask for this way of thinking, best first; a free question gets the first one that the model's
        vocabulary can write."""

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """Longest completion."""

    @abstractmethod
    def starts_hop(self, piece: str) -> bool:
        """Whether a generated token with this text begins a new hop; the hop before it is then closed."""
