"""Which positions go on: SparseVLM drops, after three layers, the vision tokens that words matching the image look at
least, and merges the best of what it drops into a few.

Legend: B batch, N positions, D hidden, H query heads, Q text positions that may rate, G hops, R recycled positions,
C clusters.
Source: SparseVLM (ICML 2025, arXiv 2410.04417): raters are the text positions behind the image whose input embeddings
    match the vision tokens more than average; behind layers 2, 6, 15 of 32 the vision tokens are ranked by the raters'
    attention there; of those dropped the top 30 % are clustered by density peaks and averaged. Version 2: the half of
    the heads with most text-to-vision attention ranks, nothing is recycled.
Deviates: a stage's share counts its merged tokens too, so what runs is what was asked (the paper adds them on top);
    counts are fixed shares, as in the released code, where the paper adapts them to the rank of the attention map; a
    merged token takes the slot and the position of its cluster's centre where the release appends it and renumbers;
    density looks at the nearest others, not at the point itself; version 2's division by the rotary response is left
    out. All text positions are asked and weighted, so that no count is read off the device: the charge is for all.
Checked: twin (tests/unit/prune/test_twins_of_peers.py; on five families raters' scores equal those from the stock
    model's own attention maps, tests/conformance/test_peers_on_models.py), clusters against a naive loop, arithmetic
    (300/200/110 of 576 at 32 layers runs 203 on average, 303/110/36 141, 66/30/17 79); not run against the release.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.prune import _rank
from mmroute.prune._budget import scaled
from mmroute.prune.base import Keep, Pruner, Site
from mmroute.select import Group, first_true, top
from mmroute.tokens import Modality, Tokens

__all__ = ["SparseVLM"]

_TIERS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
"""Published counts of 576 behind each of the three layers, by the label of the tier."""
_Share = Annotated[float, Field(ge=0, le=1)]


class SparseVLM(Pruner):
    """Training-free: several cuts, ranked by the words that matter for the image; what is dropped is partly merged."""

    @options
    class Config:
        keeps: Annotated[tuple[_Share, ...], Field(min_length=1)] = (300 / 576, 200 / 576, 110 / 576)
        """Share of all vision positions that runs behind each cut, merged ones included."""
        after: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (
            2 / 32,
            6 / 32,
            15 / 32,
        )
        """Layers whose output is cut, as shares of depth; 0.0625 of 32 layers is layer 2."""
        version: Literal["v1", "v2"] = "v1"
        """v1 averages all heads and recycles; v2 the half that looks at vision most, and drops."""

    action = "drop"
    needs = frozenset({"rows", "embeddings"})
    config: Config

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        keeps, after = self.config.keeps, self.config.after
        if len(keeps) != len(after):
            raise ConfigError(f"prune.sparsevlm: {len(keeps)} keeps and {len(after)} cuts (after); give as many")
        if any(b > a for a, b in pairwise(keeps)) or any(b < a for a, b in pairwise(after)):
            raise ConfigError("prune.sparsevlm: dropped positions never return; keeps must fall and after must rise")

    @classmethod
    def plan(cls, budget: float, num_layers: int) -> dict[str, Any]:
        """Options that make the mean share of vision positions over all layers `budget`, or BudgetError: the published
        counts of the nearest tier, times one factor."""
        tier = _TIERS[min(_TIERS, key=lambda label: abs(label / 576 - budget))]
        starts = cls()._starts(num_layers)
        return {"keeps": tuple(scaled(budget, num_layers, starts, [n / 576 for n in tier]))}

    def acts(self, layer: int, num_layers: int) -> bool:
        return self._stage(layer, num_layers) > 0

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        stage = self._stage(layer, num_layers)
        if stage == 0 or modality is not Modality.VISION:
            return None
        return self.config.keeps[stage - 1]

    def queries(self, tokens: Tokens, site: Site) -> tuple[Int[Tensor, "B Q"], Float[Tensor, "B G Q"]] | None:
        if site.layer + 1 not in self._starts(site.num_layers):
            return None
        if "raters" not in site.memo:
            site.memo["raters"] = _raters(tokens, site)
        return site.memo["raters"]

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        score = self.scores(x, tokens, site)
        take = {i: self.counts(group, site.layer, site.num_layers) for i, group in enumerate(site.groups)}
        if self.config.version == "v2":
            return Keep(*top(score, tokens, site.groups, take), ranked=score)
        merged, stays, flops = x, torch.zeros_like(score), 0
        for i, group in enumerate(site.groups):
            if group.modality != Modality.VISION:
                continue
            for b, width in enumerate(group.width):
                best, clusters = _split(width, take[i][b] - group.protected[b])
                columns = group.free[b, :width]
                ranked = columns[score[b, columns].argsort(descending=True, stable=True)]
                stays[b, ranked[:best]] = 1.0
                if clusters:
                    recycled = ranked[best : best + _recycled(width - best)]
                    centres, label = _density_peaks(x[b, recycled].detach().float(), clusters)
                    stays[b, recycled[centres]] = 1.0
                    members = torch.nn.functional.one_hot(label, clusters).T.to(x.dtype)
                    mean = members @ x[b, recycled] / members.sum(1, keepdim=True)
                    merged = merged.index_put((torch.tensor(b, device=x.device), recycled[centres]), mean)
                    flops += 2 * x.shape[-1] * len(recycled) * (len(recycled) + clusters)
        keep = Keep(*top(stays, tokens, site.groups, take), ranked=score, extra_flops=flops)
        if flops:
            keep.write = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]), merged
        return keep

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        """The raters' mean attention, each hop's vision by the raters of that hop."""
        rows_BHGN = site.rows
        hops = _hops(site.groups)
        # A group of the last hop may hold later ones too.
        here = [(tokens.hop.clamp(max=hops[-1]) == hop) & (tokens.modality == Modality.VISION) for hop in hops]
        score = torch.zeros(tokens.shape, device=x.device)
        for g, vision in enumerate(here):
            look_BHN = rows_BHGN[:, :, g]
            if self.config.version == "v2":
                mass_BH = (look_BHN * vision[:, None]).sum(-1)
                most = mass_BH.argsort(dim=1, descending=True, stable=True)[:, : max(1, mass_BH.shape[1] // 2)]
                look_BHN = look_BHN.gather(1, most[..., None].expand(-1, -1, look_BHN.shape[-1]))
            score = torch.where(vision, look_BHN.mean(1), score)
        return score

    def _starts(self, num_layers: int) -> list[int]:
        """First layer that runs on what each cut left."""
        return [int(share * num_layers + 1e-6) + 1 for share in self.config.after]

    def _stage(self, layer: int, num_layers: int) -> int:
        return sum(layer >= start for start in self._starts(num_layers))


def _hops(groups: list[Group]) -> list[int]:
    """Hops of this call."""
    return sorted({group.hop for group in groups})


def _raters(tokens: Tokens, site: Site) -> tuple[Int[Tensor, "B Q"], Float[Tensor, "B G Q"]]:
    """Text positions, and for each hop equal weights on those that rate its image.

    Where nothing stands behind the image, the row's last given position rates.
    """
    x, hops = site.embeddings.detach().float(), _hops(site.groups)
    B, N = tokens.shape
    given = tokens.valid & ~tokens.generated
    column = torch.arange(N, device=x.device)
    text, vision = given & (tokens.modality == Modality.TEXT), given & (tokens.modality == Modality.VISION)
    last = given & (column == _rank.last_valid(given)[:, None])
    sizes = {m: [sum(g.size[b] for g in site.groups if g.modality == m) for b in range(B)] for m in Modality}
    columns = first_true(text | last, min(max(sizes[Modality.TEXT]) + 1, N))
    places = first_true(vision, max(sizes[Modality.VISION]))
    seen = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
    match_BVQ = seen @ x.gather(1, columns[..., None].expand(-1, -1, x.shape[-1])).transpose(1, 2)
    weights = []
    hop_of = tokens.hop.clamp(max=hops[-1])
    for hop in hops:
        image = vision & (hop_of == hop)
        end = (column * image).amax(1, keepdim=True)
        behind = (text & (hop_of == hop) & (column > end)).gather(1, columns)
        among = torch.softmax(match_BVQ.masked_fill(~behind[:, None], torch.finfo(x.dtype).min), dim=-1)
        rows = image.gather(1, places).float()
        g = (rows[:, None] @ among).squeeze(1) / rows.sum(1, keepdim=True).clamp(min=1)
        mean = (g * behind).sum(1, keepdim=True) / behind.sum(1, keepdim=True).clamp(min=1)
        rates = behind & (g > mean)
        rates = torch.where(rates.any(1, keepdim=True), rates, behind)  # all equal: all of them
        rates = torch.where(rates.any(1, keepdim=True), rates, last.gather(1, columns))
        weights.append(rates / rates.sum(1, keepdim=True).clamp(min=1))
    return columns, torch.stack(weights, dim=1)


def _recycled(dropped: int) -> int:
    """How many of the dropped are merged rather than forgotten."""
    return int(0.3 * dropped) + 1 if dropped else 0


def _clusters(dropped: int) -> int:
    return _recycled(dropped) // 10 + 1 if dropped else 0


def _split(candidates: int, room: int) -> tuple[int, int]:
    """How many of `room` positions are kept as they are, and how many hold clusters of those dropped."""
    best = next((m for m in range(room, -1, -1) if m + _clusters(candidates - m) <= room), 0)
    return best, min(_clusters(candidates - best), room - best)


def _density_peaks(x: Float[Tensor, "R D"], clusters: int) -> tuple[Int[Tensor, " C"], Int[Tensor, " R"]]:
    """Centres by density times distance to anything denser, and the cluster of each point: its nearest centre's."""
    R, D = x.shape
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / D**0.5
    near = distance.masked_fill(torch.eye(R, dtype=torch.bool, device=x.device), float("inf")).sort(dim=1).values
    density = torch.exp(-near[:, : min(clusters, R - 1)].square().mean(1)) if R > 1 else x.new_ones(R)
    denser = density[None] > density[:, None]
    delta = torch.where(denser, distance, torch.inf).amin(1)
    delta = torch.where(delta.isinf(), distance.max(), delta)
    centres = (delta * density).argsort(descending=True, stable=True)[:clusters]
    label = distance[:, centres].argmin(1)
    label[centres] = torch.arange(len(centres), device=x.device)
    return centres, label
