"""What a hop is: the last hidden state, fed back in place of a word.

Source: Coconut (Hao et al., 2412.06769); the latent recursion of Vedas (arXiv 2604.10500), equations 1 to 3.
Deviates: the state is scaled to the size of word embeddings (`embed_rms`; both papers feed it raw); no start and end
    markers, so no vocabulary grows; with `stop: head` the model ends its thought itself, where its head would write
    the answer's first word.
"""

from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mmroute.config import options
from mmroute.think.base import LatentThinker, Mind, Thought
from mmroute.tokens import Modality

__all__ = ["Coconut"]

MAX_LATENTS = 64


class Coconut(LatentThinker):
    """Latent steps without images."""

    @options
    class Config:
        num_latents: Annotated[int, Field(ge=0, le=MAX_LATENTS)] = 4
        """Latent steps, T_r; with `stop: head` the most there are."""
        stop: Literal["fixed", "head"] = "fixed"
        """`fixed` takes all steps; `head` ends where the head, asked after a step, would write the answer's cue."""
        answer_cue: str = "answer:"
        """The first word of every answer; read by `stop: head` and by training."""
        latent_scale: Literal["embed_rms", "none", "learned"] = "embed_rms"
        """What the state is multiplied by: the size of word embeddings over that of the last norm, 1, or a learned
        number that starts at the former."""
        max_new_tokens: Annotated[int, Field(ge=1)] = 64
        """Longest answer."""
        instruction: str = "Answer with the final answer only."
        """Appended to a free question."""

    config: Any

    @property
    def num_latents(self) -> int:
        return self.config.num_latents

    @property
    def columns(self) -> int:
        return self.num_latents

    def fit(self, words: Float[Tensor, "W D"], norm: Float[Tensor, " D"]) -> None:
        if self.learned is None:
            self.learned = self._made(words.detach().float(), norm.detach().float())

    def _made(self, words: Float[Tensor, "W D"], norm: Float[Tensor, " D"]) -> nn.Module:
        scale = torch.ones(())
        if self.config.latent_scale != "none":
            scale = (words.square().mean().sqrt() / norm.square().mean().sqrt()).cpu()
        made = nn.Module()
        if self.config.latent_scale == "learned":
            made.scale = nn.Parameter(scale)
        else:
            made.register_buffer("scale", scale)
        return made

    def latent(self, mind: Mind) -> Float[Tensor, "B D"]:
        """What is fed back."""
        assert self.learned is not None, "the model is not attached with this way to think"
        scale: Any = self.learned.scale
        return mind.hidden * scale.to(mind.hidden.dtype)

    def step(self, mind: Mind) -> Thought:
        z, device = self.latent(mind)[:, None], mind.hidden.device
        B = z.shape[0]
        here = torch.ones(B, 1, dtype=torch.bool, device=device)
        nobody = torch.empty(B, 0, dtype=torch.long, device=device)
        places = mind.next_position[:, None].expand(mind.places.shape[0], -1, -1)
        return Thought(
            embeds=z,
            valid=here,
            modality=here.long() * int(Modality.LATENT),
            places=places,
            next_position=mind.next_position + 1,
            source=nobody,
            weight=nobody.float(),
        )
