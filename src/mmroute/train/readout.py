"""What helps latents to learn and is thrown away with the run: the network of the closer look, and readouts of words.

Legend: n latents, J words in front of a group's last, D hidden.

Source: TokenSR is that of Vedas (arXiv 2604.10500, section 3.3). Readouts are ours, after the step decoder of SIM-CoT
    (arXiv 2509.20317): a latent that stands for several words is told all of them, not the last alone.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmroute.train.coherence import TokenSR
from mmroute.train.curriculum import TrainConfig

__all__ = ["MAX_WORDS", "Helpers", "Readout"]

MAX_WORDS = 7
"""Words of a group that are read beside its last one."""


class Readout(nn.Module):
    """One linear map for each place before a group's last word; fp32, from the identity."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.eye(hidden).repeat(MAX_WORDS, 1, 1))

    def forward(self, h: Float[Tensor, "n D"], words: int) -> Float[Tensor, "n J D"]:
        """What the model's head reads each of the `words` words off; the first is the one next to the last."""
        return torch.einsum("nd,jed->nje", h.float(), self.maps[:words])


class Helpers(nn.Module):
    """Those that a recipe asks for; None where it does not."""

    def __init__(self, hidden: int, config: TrainConfig) -> None:
        super().__init__()
        self.sr = TokenSR(hidden, config.seed) if config.recon_weight else None
        self.readout = Readout(hidden) if config.readout_weight else None
