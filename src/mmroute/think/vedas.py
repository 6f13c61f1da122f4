"""What a hop is: the last hidden state fed back, behind the image tokens it attends to, weighed by that attention.

Source: Vedas (arXiv 2604.10500), equations 4 to 6.
Deviates: weights are the attention over its mean, so they average to 1 and copies keep their size; the paper's softmax
    over attention values of about 1/N is uniform to a percent, shrinks every copy by K, and passes hardly any gradient
    (`replay_weighting: softmax`, `rescale_mean_one: false`).
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmroute.config import options
from mmroute.think.base import Mind, Thought
from mmroute.think.ivtlr import IvtLr

__all__ = ["Vedas"]


class Vedas(IvtLr):
    """Latent steps with weighted visual replay."""

    @options
    class Config(IvtLr.Config):
        replay_weighting: Literal["renorm", "softmax", "softmax_std", "none"] = "renorm"
        """Attention over its sum, its softmax, its softmax after division by its spread, or equal."""
        rescale_mean_one: bool = True
        """Weights average to 1 rather than sum to 1."""
        replay_form: Literal["tokens", "soft_mix"] = "tokens"
        """`soft_mix` enters one token, the weighted mean of the chosen ones."""

    def weights(self, share: Float[Tensor, "B K"], here: Tensor) -> Float[Tensor, "B K"]:
        kind = self.config.replay_weighting
        count = here.sum(1, keepdim=True).clamp(min=1)
        share = share.masked_fill(~here, 0)
        even = here / count
        if kind == "none":
            weight = even
        elif kind == "renorm":
            total = share.sum(1, keepdim=True)
            # Layers that hold none of the chosen tokens give no attention at all.
            weight = (share / total.clamp(min=1e-12)).where(total > 1e-12, even)
        else:
            if kind == "softmax_std":
                mean = share.sum(1, keepdim=True) / count
                spread = (((share - mean) * here).square().sum(1, keepdim=True) / count).sqrt()
                share = share / spread.clamp(min=1e-12)
            weight = share.masked_fill(~here, float("-inf")).softmax(1).nan_to_num(0)
        return weight * count if self.config.rescale_mean_one else weight

    def step(self, mind: Mind) -> Thought:
        thought = super().step(mind)
        K = thought.source.shape[1]
        if self.config.replay_form == "tokens" or K == 0:
            return thought
        some = thought.valid[:, :K].any(1, keepdim=True)
        count = thought.valid[:, :K].sum(1).clamp(min=1)[:, None, None] if self.config.rescale_mean_one else 1

        def mixed(copies: Tensor) -> Tensor:
            return torch.cat([copies[..., :K, :].sum(-2, keepdim=True) / count, copies[..., K:, :]], -2)

        first = mind.next_position + some.squeeze(1)
        axes = thought.places.shape[0]
        places = mind.next_position[:, None].expand(axes, -1, -1)
        return Thought(
            embeds=mixed(thought.embeds),
            valid=torch.cat([some, thought.valid[:, K:]], 1),
            modality=thought.modality[:, K - 1 :],
            places=torch.cat([places, first[:, None].expand(axes, -1, -1)], 2),
            next_position=first + 1,
            source=thought.source,
            weight=thought.weight,
            deep=None if thought.deep is None else mixed(thought.deep),
        )
