"""Which positions go on: DART keeps, once and at one layer, a few pivots and the vision tokens least like them.

Legend: B batch, N positions, D hidden, W candidates of a group, P pivots.
Source: DART (EMNLP 2025, arXiv 2502.11494): pivots are the vision and text tokens with the largest L1 key norm; pivot
    by pivot the vision tokens of least cosine similarity to it join. No attention is read, so any kernel serves.
Deviates: the norm sums the lengths of a key's rotary pairs, where L1 sums its entries: cached keys are rotated, and L1
    would change with the padding before a row; pivots take turns in a fixed order (vision by norm, then text by norm)
    where the release iterates over a set; the count is exact, with the remainder given to the first pivots, where the
    release exceeds it; text pivots stand behind the hop's last image. Several images of a hop compete together;
    protected vision positions stay beside them.
Checked: twin (tests/unit/prune/test_twins_of_peers.py; on five families the sets equal those from the stock model's
    own keys and states, tests/conformance/test_peers_on_models.py), arithmetic as FastV; not run against the release.
"""

from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.prune import _rank
from mmroute.prune._cuts import LayerCut
from mmroute.prune.base import Keep, Site
from mmroute.select import Group
from mmroute.tokens import Modality, Tokens

__all__ = ["Dart"]


class Dart(LayerCut):
    """Training-free: one cut after a shallow layer, by difference from pivots."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision positions that runs from `start_layer` on."""
        start_layer: Annotated[int, Field(ge=1)] = 2
        """First layer, counted from 0, that runs on the survivors; K in the paper."""
        vision_pivots: Annotated[int, Field(ge=1)] = 4
        """Vision positions that are kept as pivots."""
        text_pivots: Annotated[int, Field(ge=0)] = 4
        """Text positions behind the image that serve as pivots too."""

    needs = frozenset({"keys", "final_normed"})
    config: Config

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        keep = super().keep(x, tokens, site)
        pivots = self.config.vision_pivots + self.config.text_pivots
        compared = sum(sum(g.width) for g in site.groups if g.modality == Modality.VISION)
        keep.extra_flops = 2 * x.shape[-1] * pivots * compared
        return keep

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        """1 for what was picked, 0 for the rest; as many are picked as run."""
        N = tokens.shape[1]
        keys = site.keys(site.layer - 1).float()
        norm = keys.unflatten(-1, (2, -1)).norm(dim=3).sum(dim=(2, 3))  # a rotary pair is a half apart
        unit = torch.nn.functional.normalize(site.final_normed(x.detach()).float(), dim=-1)
        score = torch.zeros(tokens.shape[0], N + 1, device=x.device)
        for group in site.groups:
            counts = self.counts(group, site.layer, site.num_layers)
            take = [k - p for k, p in zip(counts, group.protected, strict=True)]
            if group.modality == Modality.VISION and any(take):
                inside = _rank.competing(group)
                picked = self._pick(group, inside, take, norm, unit, tokens)
                score = score.scatter(1, group.free.masked_fill(~inside, N), picked.float())
        return score[:, :N]

    def _pick(
        self,
        group: Group,
        inside: Bool[Tensor, "B W"],
        take: list[int],
        norm: Float[Tensor, "B N"],
        unit: Float[Tensor, "B N D"],
        tokens: Tokens,
    ) -> Bool[Tensor, "B W"]:
        """Exactly `take` candidates of each row."""
        D, least = unit.shape[-1], float("-inf")
        room = torch.tensor(take, device=unit.device)
        unit_BWD = unit.gather(1, group.free[..., None].expand(-1, -1, D))
        by_norm = norm.gather(1, group.free).masked_fill(~inside, least).argsort(dim=1, descending=True, stable=True)
        vision = by_norm[:, : self.config.vision_pivots]
        vision_ok = torch.arange(vision.shape[1], device=unit.device) < room[:, None]
        picked = torch.zeros_like(inside).scatter(1, vision, vision_ok)

        column = torch.arange(tokens.shape[1], device=unit.device)
        given = tokens.valid & ~tokens.generated & (tokens.hop == group.hop)
        image_end = (column * (given & (tokens.modality == Modality.VISION))).amax(1, keepdim=True)
        behind = given & (tokens.modality == Modality.TEXT) & (column > image_end)
        text = norm.masked_fill(~behind, least).argsort(dim=1, descending=True, stable=True)[
            :, : self.config.text_pivots
        ]
        pivot_BPD = torch.cat(
            [
                unit_BWD.gather(1, vision[..., None].expand(-1, -1, D)),
                unit.gather(1, text[..., None].expand(-1, -1, D)),
            ],
            dim=1,
        )
        is_pivot = torch.cat([vision_ok, behind.gather(1, text)], dim=1)

        left, number = room - vision_ok.sum(1), is_pivot.sum(1).clamp(min=1)
        turn = is_pivot.long().cumsum(1) - 1
        quota = ((left // number)[:, None] + (turn < (left % number)[:, None])) * is_pivot
        for i in range(pivot_BPD.shape[1]):
            similar = (unit_BWD @ pivot_BPD[:, i, :, None]).squeeze(-1)
            order = similar.masked_fill(picked | ~inside, float("inf")).argsort(dim=1, stable=True)
            first = torch.arange(order.shape[1], device=order.device) < quota[:, i, None]
            picked = picked | torch.zeros_like(picked).scatter(1, order, first)
        return picked
