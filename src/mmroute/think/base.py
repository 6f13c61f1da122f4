"""The contract of a way to think: what a reasoning hop is made of, and where one ends.

It knows hops and no layers, caches or models; `reason.py` runs the loop of written ones, `rollout.py` that of latents.

Legend: B batch, D hidden, V most image tokens of a row, C positions of one latent step, K copies of image tokens,
A axes of a place (1, or 3: time, row and column), W words of the vocabulary, T layers that the vision tower adds to.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmroute.config import options, parse

__all__ = ["Box", "LatentThinker", "LookingThinker", "Mind", "Thinker", "Thought", "Window"]

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge, as shares of the picture's width and height."""
Window = tuple[int, int, int, int]
"""First row and column, rows and columns of cells of a grid."""


@dataclass
class Mind:
    """What a latent way to think goes on from: one batch, after its prompt and `step` latent steps.

    It belongs to one session; a thinker keeps nothing of it.
    """

    hidden: Float[Tensor, "B D"]
    """Behind the last norm, at each row's last position."""
    next_position: Int[Tensor, " B"]
    """The first place that nothing stands at."""
    vision: Float[Tensor, "B V D"]
    """Input embeddings of the image tokens of all images; rows with fewer are filled up at their end."""
    places: Int[Tensor, "A B V"]
    """Where they stand."""
    cells: Int[Tensor, "B V 3"]
    """Their image, counted from 0 in each row, and their row and column in its grid."""
    counts: list[int]
    """[row]: image tokens that are real."""
    columns: Int[Tensor, "B V"]
    """Logical columns in which they entered, -1 where there is none."""
    row: Float[Tensor, "B V"] | None
    """Attention of the last position on them, mean over layers and heads; for who `needs_row`."""
    visited: Bool[Tensor, "B V"]
    left: list[int]
    """[row]: image tokens that were not visited."""
    seeds: Int[Tensor, " B"]
    """A number for each conversation, for choices that are meant to be random."""
    deep: Float[Tensor, "T B V D"] | None = None
    """What the vision tower adds to the image tokens behind the first T layers; None where it adds nothing."""
    step: int = 0


@dataclass
class Thought:
    """The positions that one latent step enters: replayed image tokens in front, the latent last."""

    embeds: Float[Tensor, "B C D"]
    valid: Bool[Tensor, "B C"]
    """False in front of rows that replay fewer."""
    modality: Int[Tensor, "B C"]
    places: Int[Tensor, "A B C"]
    next_position: Int[Tensor, " B"]
    source: Int[Tensor, "B K"]
    """Which image tokens are replayed, -1 for none."""
    weight: Float[Tensor, "B K"]
    """By how much each is multiplied, 0 for none; in training, gradient flows through it to the attention."""
    deep: Float[Tensor, "T B C D"] | None = None
    """What goes with the copies behind the first T layers, multiplied alike; None where the tower adds nothing."""


class Thinker:
    """Base class of the files in `think/`."""

    @options
    class Config:
        pass

    style: ClassVar[Literal["cot", "direct", "latent", "image"]]
    """Prompt style that generated tasks and benchmarks use for it."""
    config: Any
    needs_row: ClassVar[bool] = False
    """Whether it reads the attention on the image tokens and their embeddings."""
    draws: ClassVar[bool] = False
    """Whether hops end with pictures that the model writes; `interleave.Drawing` sees to them."""
    learned: nn.Module | None = None
    """What `fit` made; it is trained and saved with the routers."""

    def __init__(self, **given: Any) -> None:
        self.config = parse(type(self).Config, given, f"think.{type(self).__module__.rpartition('.')[2]}")

    @property
    def cues(self) -> list[str]:
        """Texts that ask for this way of thinking, best first; a free question gets the first one that the model's
        vocabulary can write. Default: the option `instruction`, then the word by which small models know the style."""
        return [self.config.instruction, f"{self.style}:"]

    @property
    def max_new_tokens(self) -> int:
        """Longest completion; default the option of that name."""
        return self.config.max_new_tokens

    @property
    def num_latents(self) -> int:
        """Latent steps between the prompt and what is written."""
        return 0

    @property
    def columns(self) -> int:
        """Positions that all latent steps enter at most."""
        return 0

    def fit(self, words: Float[Tensor, "W D"], norm: Float[Tensor, " D"]) -> None:
        """Reads off a model what latent steps need; called when it is attached. What was learned stays.

        Args:
            words: embeddings of its text tokens.
            norm: weight of its last norm.
        """

    def starts_hop(self, piece: str) -> bool:
        """Whether a generated token with this text begins a new hop; the hop before it is then closed. Default: none
        does."""
        return False


class LatentThinker(Thinker, ABC):
    """Thinks in latent steps between the prompt and what is written."""

    style = "latent"

    @property
    @abstractmethod
    def num_latents(self) -> int:
        """Latent steps at most."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Positions that all of them enter at most."""

    @abstractmethod
    def step(self, mind: Mind) -> Thought:
        """The next latent step; marks in `mind` what it visits."""


class LookingThinker(Thinker, ABC):
    """Ends hops with boxes, whose image features then enter; `interleave.Looking` sees to them."""

    @abstractmethod
    def box_at(self, text: str) -> Box | None:
        """The box that what was written so far ends with."""

    @abstractmethod
    def window(self, box: Box, rows: int, columns: int) -> Window:
        """The cells of a grid of image features that a box stands for."""
