"""What helps latents to learn and is thrown away with the run: the network of the closer look, and readouts of words.

Legend: n latents, J words of a group beside the one that the head reads, D hidden.

Source: TokenSR is that of Vedas (arXiv 2604.10500, section 3.3). Readouts are ours, after the step decoder of SIM-CoT
    (arXiv 2509.20317): a latent that stands for several words is told all of them, not one alone.
"""

from types import TracebackType
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmroute.errors import ConfigError
from mmroute.train.coherence import TokenSR
from mmroute.train.curriculum import TrainConfig

__all__ = ["MAX_WORDS", "Helpers", "Inner", "Readout"]

MAX_WORDS = 7
"""Words of a group that are read beside the head's."""


class Readout(nn.Module):
    """One linear map for each of a group's words that the head does not read; fp32, from the identity."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(torch.eye(hidden).repeat(MAX_WORDS, 1, 1))

    def forward(self, h: Float[Tensor, "n D"], words: int) -> Float[Tensor, "n J D"]:
        """What the model's head reads each of the `words` words off; those at the group's end come first."""
        return torch.einsum("nd,jed->nje", h.float(), self.maps[:words])


class Helpers(nn.Module):
    """Those that a recipe asks for; None where it does not."""

    def __init__(self, hidden: int, config: TrainConfig) -> None:
        super().__init__()
        self.sr = TokenSR(hidden, config.seed) if config.recon_weight else None
        self.readout = Readout(hidden) if config.readout_weight else None


class Inner:
    """While open, keeps what one layer gives at each call: `seen[call]` is (B, N, D)."""

    def __init__(self, layers: nn.ModuleList, number: int) -> None:
        """
        Args:
            number: of the layer, from 1.

        Raises:
            ConfigError: there is no such layer.
        """
        if number > len(layers):
            raise ConfigError(
                f"train.readout_layer is {number}, the model has {len(layers)} layers; give 1 to {len(layers)}, or "
                "leave it out to read behind the last"
            )
        self.seen: list[Float[Tensor, "B N D"]] = []
        self._handle = layers[number - 1].register_forward_hook(self._keep)

    def _keep(self, _layer: nn.Module, _given: Any, out: Any) -> None:
        self.seen.append(out[0] if isinstance(out, tuple) else out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._handle.remove()
