"""What a hop is: a learned placeholder, the same whatever was seen.

The control of latent reasoning: as many extra positions to compute in, no state that is handed on.

Source: Goyal et al., Think before you speak (2310.02226), as the control of Vedas (arXiv 2604.10500).
Deviates: every step has a placeholder of its own, outside the vocabulary; they start as random vectors of the size of
    word embeddings.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmroute.think.base import Mind
from mmroute.think.coconut import Coconut

__all__ = ["Pause"]


class Pause(Coconut):
    """Latent steps without feedback; `latent_scale` has no effect."""

    def _made(self, words: Float[Tensor, "W D"], norm: Float[Tensor, " D"]) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(self.num_latents, words.shape[1], generator=generator)
        made = nn.Module()
        made.placeholders = nn.Parameter(start * words.square().mean().sqrt().cpu())
        return made

    def latent(self, mind: Mind) -> Float[Tensor, "B D"]:
        assert self.learned is not None, "the model is not attached with this way to think"
        placeholders: Any = self.learned.placeholders
        return placeholders[mind.step].to(mind.hidden.dtype).expand_as(mind.hidden)
