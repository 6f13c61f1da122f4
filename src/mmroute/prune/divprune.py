"""Which positions go on: DivPrune keeps, before the first layer, the vision tokens that lie farthest apart.

Legend: B batch, N positions, D hidden, W candidates of a group.
Source: DivPrune (CVPR 2025, arXiv 2503.02175): max-min diversity over the projected vision embeddings, distance
    1 - cosine, greedy; the first token is the one farthest from its nearest neighbour.
Deviates: several images of a hop compete together; vision positions that are protected stay without being measured;
    equal distances (to 2^-20) go to the lower column.
Checked: twin (tests/unit/prune/test_twins_of_peers.py; on five families the sets equal those from the stock model's
    own embeddings, tests/conformance/test_peers_on_models.py), the greedy set's spread is at least half of the best
    set's, by brute force; not run against the release.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.prune import _rank
from mmroute.prune._cuts import EntryCut
from mmroute.prune.base import Keep, Site
from mmroute.select import Group
from mmroute.tokens import Modality, Tokens

__all__ = ["DivPrune"]


class DivPrune(EntryCut):
    """Training-free: one cut before layer 0, by diversity alone; blind to the question."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision positions that runs, in every layer."""

    config: Config

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        keep = super().keep(x, tokens, site)
        D = x.shape[-1]
        for group, take in self._images(site):  # all pairs once, then one row of them per pick
            keep.extra_flops += sum(2 * D * w * (w + k) for w, k in zip(group.width, take, strict=True))
        return keep

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        """Minus the turn at which a candidate is taken; behind the first cut there is nothing left to choose."""
        B, N = tokens.shape
        score = torch.zeros(B, N + 1, device=x.device)
        for group, take in self._images(site):
            inside = _rank.competing(group)
            column = group.free[..., None].expand(-1, -1, x.shape[-1])
            unit = torch.nn.functional.normalize(x.detach().float().gather(1, column), dim=-1)
            turn = _rank.most_spread(unit, inside, max(take))
            score = score.scatter(1, group.free.masked_fill(~inside, N), -turn.float())
        return score[:, :N]

    def _images(self, site: Site) -> list[tuple[Group, list[int]]]:
        """Groups of vision positions, and how many of their candidates each row takes."""
        found = []
        for group in site.groups:
            counts = self.counts(group, site.layer, site.num_layers)
            take = [k - p for k, p in zip(counts, group.protected, strict=True)]
            if group.modality == Modality.VISION and any(take):
                found.append((group, take))
        return found
