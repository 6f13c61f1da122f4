"""What a hop is: the last hidden state fed back, behind copies of the image tokens it attends to most.

Source: IVT-LR (2510.12603); the replay of Vedas (arXiv 2604.10500), equation 4 and 5.
Deviates: attention is the last position's row, mean over all layers and heads, on original image tokens only; visited
    tokens are left out (equation 5 prints the opposite of its prose); copies stand in raster order at the next text
    places; what to do when an image is used up is an option, never an empty token.
"""

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.think.base import Mind, Thought
from mmroute.think.coconut import Coconut
from mmroute.tokens import Modality

__all__ = ["IvtLr"]


class IvtLr(Coconut):
    """Latent steps that look again."""

    @options
    class Config(Coconut.Config):
        replay_tokens: Annotated[int, Field(ge=0)] = 32
        """Image tokens copied beside a latent, K; all that are left where there are fewer."""
        latents_per_hop: Annotated[int, Field(ge=1)] = 1
        """Latent steps that make a hop, c; the first of them replays."""
        replay_at: Literal["hop", "step"] = "hop"
        """`step` replays at every latent."""
        replay_pick: Literal["saliency", "random"] = "saliency"
        """`random` is the control: as many tokens, chosen by a hash."""
        visited: Literal["exclude", "allow"] = "exclude"
        """Whether a token is copied once at most."""
        on_exhausted: Literal["shrink", "reset", "stop"] = "shrink"
        """Where fewer than K are left: copy those, begin anew with all of them, or copy nothing more."""
        replay_order: Literal["raster", "rank"] = "raster"
        """Of the copies: as in the image, or by attention."""
        replay_positions: Literal["sequential", "source", "mini_grid"] = "sequential"
        """Where the copies stand: the next text places, their own places in the image, or a second small image."""

    needs_row = True

    @property
    def columns(self) -> int:
        return self.num_latents * (self.config.replay_tokens + 1)

    def step(self, mind: Mind) -> Thought:
        z = super().step(mind)
        take = self._take(mind)
        K = max(take, default=0)
        if K == 0:
            return z
        index = self._chosen(mind, take, K)
        here = index >= 0
        at = index.clamp(min=0)
        share = mind.row.gather(1, at) if mind.row is not None else torch.ones_like(at, dtype=torch.float32)
        weight = self.weights(share, here)
        picked = mind.vision.gather(1, at[..., None].expand(-1, -1, mind.vision.shape[-1]))
        copies, deep = picked * weight[..., None].to(picked.dtype), None
        if mind.deep is not None:  # a copy is the whole token: what the tower adds to it later comes along
            deep = mind.deep.gather(2, at[..., None].expand(len(mind.deep), -1, -1, mind.deep.shape[-1]))
            deep = F.pad(deep * weight[..., None].to(deep.dtype), (0, 0, 0, 1))
        self._visit(mind, at, here, take)
        places, latent_at = self._places(mind, at, here)
        return Thought(
            embeds=torch.cat([copies, z.embeds], 1),
            valid=torch.cat([here, z.valid], 1),
            modality=torch.cat([torch.full_like(at, int(Modality.VISION)), z.modality], 1),
            places=torch.cat([places, latent_at[:, None].expand(len(places), -1, -1)], 2),
            next_position=latent_at + 1,
            source=index,
            weight=weight,
            deep=deep,
        )

    def weights(self, share: Float[Tensor, "B K"], here: Tensor) -> Float[Tensor, "B K"]:
        """What multiplies each copy: 1, and 0 where there is none.

        Args:
            share: attention on each.
            here: (B, K) bool: whether there is one.
        """
        return here.float()

    # ------------------------------------------------------------------ choosing

    def _take(self, mind: Mind) -> list[int]:
        """[row]: how many are copied now; begins anew where that is asked for."""
        c = self.config
        if c.replay_at == "hop" and mind.step % c.latents_per_hop:
            return [0] * len(mind.counts)
        out = []
        for b, (total, left) in enumerate(zip(mind.counts, mind.left, strict=True)):
            if left < c.replay_tokens and c.on_exhausted == "reset":
                mind.visited[b], left = False, total
            elif left < c.replay_tokens and c.on_exhausted == "stop" and left < total:
                left = 0
            mind.left[b] = left
            out.append(min(left, c.replay_tokens))
        return out

    def _chosen(self, mind: Mind, take: list[int], K: int) -> Int[Tensor, "B K"]:
        """Ascending image tokens of each row, or by rank; -1 in front where a row has fewer. Ties go to the lower."""
        V = mind.visited.shape[1]
        device = mind.visited.device
        if self.config.replay_pick == "random":
            score = _hashed(torch.arange(V, device=device) + 1009 * mind.seeds[:, None], mind.step)
        else:
            assert mind.row is not None, "the attention on the image was not recorded"
            score = mind.row.detach()
        beyond = torch.arange(V, device=device) >= torch.tensor(mind.counts, device=device)[:, None]
        score = score.masked_fill(mind.visited | beyond, float("-inf"))
        order = score.argsort(dim=1, descending=True, stable=True)[:, :K]
        spare = torch.arange(K, device=device) >= torch.tensor(take, device=device)[:, None]
        index = order.masked_fill(spare, -1)
        if self.config.replay_order == "raster":
            return index.sort(1).values
        return index.gather(1, (~spare).long().argsort(dim=1, stable=True))

    def _visit(self, mind: Mind, at: Int[Tensor, "B K"], here: Tensor, take: list[int]) -> None:
        if self.config.visited == "allow":
            return
        V = mind.visited.shape[1]
        spare = torch.cat([mind.visited, mind.visited.new_zeros(len(at), 1)], 1)  # takes the writes of missing ones
        mind.visited = spare.scatter(1, at.masked_fill(~here, V), True)[:, :V]
        mind.left = [left - k for left, k in zip(mind.left, take, strict=True)]

    def _places(self, mind: Mind, at: Int[Tensor, "B K"], here: Tensor) -> tuple[Any, Any]:
        """Places of the copies (A, B, K), and of the latent behind them (B,)."""
        kind, first, axes = self.config.replay_positions, mind.next_position, mind.places.shape[0]
        if kind == "sequential":
            places = first[:, None] + here.long().cumsum(1) - here.long()
            return places.expand(axes, -1, -1), first + here.sum(1)
        if kind == "source":
            return mind.places.gather(2, at.expand(axes, -1, -1)), first
        if axes != 3:
            raise ConfigError(
                "think.replay_positions mini_grid needs places with a row and a column, which this model has not; "
                "use sequential or source"
            )
        cell = mind.cells.gather(1, at[..., None].expand(-1, -1, 3))
        places = first[:, None] + torch.stack([torch.zeros_like(at), cell[..., 1], cell[..., 2]])
        side = mind.cells[..., 1:].amax((1, 2)) + 1
        return places, first + side.masked_fill(~here.any(1), 0)


def _hashed(number: Int[Tensor, "B V"], step: int) -> Float[Tensor, "B V"]:
    """Scores in [0, 1) that depend on the number and the step alone."""
    mixed = number.long() * 2654435761 + (step + 1) * 2246822519
    for multiplier in (2146121005, 2221713035):
        mixed = (mixed ^ ((mixed & 0xFFFFFFFF) >> 16)) * multiplier & 0xFFFFFFFF
    return (mixed ^ (mixed >> 15)).float() / 2**32
