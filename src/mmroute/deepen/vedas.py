"""Which positions go again: those that a learned router ranks highest in their segment.

A routed layer runs; its router scores what came out; the best positions run the same layer again among themselves, at
their old places, and a learned vector says how much of the change they keep. The vector starts at zero: a new router
leaves the model as it is.

Source: Vedas (arXiv 2604.10500), routing depth scaling, equations 9 to 11 and 14.
Deviates: the router reads the state over its root mean square (raw residuals have outlier channels); the gate is a
    sigmoid per position, where a softmax over the sequence would let later tokens change earlier ones; the update is
    gain * (f(x) - x), f holding the residual already; step vectors, undefined in the paper, start at 0; each segment
    chooses for itself and a second cache keeps what was chosen, so that chunks equal one pass; words that are written
    one by one do not go again; the cosine runs from `deepen_tokens` to `deepen_tokens_last`, which the printed equation
    does not.
"""

import math
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mmroute.config import options
from mmroute.deepen._segments import best, budgets
from mmroute.deepen.base import Again, Deepener
from mmroute.errors import ConfigError
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

__all__ = ["Vedas"]


class Vedas(Deepener):
    """Learned depth for chosen positions."""

    @options
    class Config:
        deepen_tokens: Annotated[int, Field(ge=0)] = 32
        """Positions of a given segment (prompt, observation) that run again; alpha in the paper."""
        deepen_share: Annotated[float, Field(gt=0, le=1)] | None = None
        """In place of the number, a share of the segment."""
        chunk_tokens: Annotated[int, Field(ge=0)] = 8
        """The same for a latent with its replayed image tokens; the latent is always among them."""
        schedule: Literal["constant", "cosine", "linear"] = "constant"
        """How the number changes from the first layer to the last."""
        deepen_tokens_last: Annotated[int, Field(ge=0)] = 16
        """The number at the last layer under `cosine` and `linear`."""
        layers: Literal["odd", "even", "all"] | list[int] = "odd"
        """Layers with a second pass, counted from 0."""
        max_depth: Annotated[int, Field(ge=1, le=4)] = 1
        """Extra passes; those after the first are for the same positions."""
        score_input: Literal["rms", "raw"] = "rms"
        """What the router reads; `raw` is the paper."""
        gate: Literal["sigmoid", "identity"] = "sigmoid"
        """What the score multiplies the update by; `identity` is equation 9 to the letter."""
        scale_init: float = 0.0
        """Start of the step vectors."""
        seed: int = 0
        """Of the routers' first weights."""

    config: Config

    def __init__(self, **given: object) -> None:
        super().__init__(**given)
        self.max_depth = self.config.max_depth
        self.num_layers = 0
        self.router = nn.ModuleDict()
        self.scale = nn.ParameterDict()

    def fit(self, shape: Shape) -> None:
        """Routers and step vectors for the layers of a model; those that fit already stay.

        Raises:
            ConfigError: a layer is named that the model does not have.
        """
        listed = self.config.layers if isinstance(self.config.layers, list) else []
        beyond = [i for i in listed if not 0 <= i < shape.layers]
        if beyond:
            raise ConfigError(f"deepen.vedas.layers: {beyond} given, the model has layers 0 to {shape.layers - 1}")
        self.num_layers = shape.layers
        wanted = [i for i in range(shape.layers) if self.acts(i, shape.layers)]
        if {name: p.shape[1] for name, p in self.scale.items()} == {str(i): shape.hidden for i in wanted}:
            return
        generator = torch.Generator().manual_seed(self.config.seed)
        self.router, self.scale = nn.ModuleDict(), nn.ParameterDict()
        for i in wanted:
            router = nn.Linear(shape.hidden, 1, device="meta").to_empty(device="cpu")
            with torch.no_grad():
                router.weight.copy_(torch.randn(1, shape.hidden, generator=generator) * 0.02)
                router.bias.zero_()
            self.router[str(i)] = router
            self.scale[str(i)] = nn.Parameter(torch.full((self.max_depth, shape.hidden), self.config.scale_init))

    def acts(self, layer: int, num_layers: int) -> bool:
        chosen = self.config.layers
        if isinstance(chosen, list):
            return layer in chosen
        return chosen == "all" or layer % 2 == (chosen == "odd")

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, layer: int) -> Float[Tensor, "B N"]:
        """fp32; larger runs again."""
        x = x.float()
        if self.config.score_input == "rms":
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return self.router[str(layer)](x).squeeze(-1)

    def gates(self, score: Float[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """What multiplies the step vector at each position."""
        return score.sigmoid() if self.config.gate == "sigmoid" else score

    def tokens_at(self, layer: int, num_layers: int) -> int:
        """Positions of a given segment that run this layer again.

        Example:
            >>> [Vedas(deepen_tokens=64, schedule="cosine").tokens_at(i, 5) for i in range(5)]
            [64, 57, 40, 23, 16]
        """
        c = self.config
        if c.schedule == "constant":
            return c.deepen_tokens
        done = layer / max(num_layers - 1, 1)
        share = (1 + math.cos(math.pi * done)) / 2 if c.schedule == "cosine" else 1 - done
        return round(c.deepen_tokens_last + (c.deepen_tokens - c.deepen_tokens_last) * share)

    def again(
        self,
        x: Float[Tensor, "B N D"],
        tokens: Tokens,
        ran: Bool[Tensor, "B N"],
        sizes: list[list[int]],
        latents: list[list[int]],
        layer: int,
        depth: int,
    ) -> Again | None:
        c = self.config
        budget = budgets(sizes, latents, self.tokens_at(layer, self.num_layers), c.deepen_share, c.chunk_tokens)
        if not any(map(any, budget)):
            return None
        score = self.scores(x, tokens, layer)
        mask = ran  # a later pass is for whom the first one chose
        if depth == 1:
            rank = score.detach().masked_fill(tokens.modality == Modality.LATENT, float("inf"))
            mask = best(rank, tokens, ran, budget)
        gain = self.gates(score)[..., None] * self.scale[str(layer)][depth - 1]
        return Again(mask, [sum(row) for row in budget], gain)
