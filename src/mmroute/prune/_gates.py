"""DARE's gates: hard sets with the gradient of soft ones, for what enters a layer and for what hop closes leave.

Legend: B batch, N positions of this call.

Source: DARE, straight-through selection with noise, ratio and hard losses.
Deviates: `capped` trains as `progressive` does: a bound that inference trims to has no gate.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmroute.prune import _closing
from mmroute.prune._rates import ROUTED, KeepRates, target
from mmroute.prune._topk import clip_outliers, logistic_noise, soft_topk, straight_through
from mmroute.prune.base import Keep, Site, keep_count
from mmroute.select import Group, top
from mmroute.tokens import Modality, Tokens

__all__ = ["Gates", "Relaxation"]


@dataclass
class Relaxation:
    """How soft training is at the moment; a trainer moves it, inference never reads it."""

    temperature: float = 0.3
    noise: float = 0.0
    """Scale of the logistic noise on logits."""
    vision_ramp: float = 1.0
    """How far the vision rate has come down: 0 keeps everything, 1 is the rate itself."""
    text_ramp: float = 1.0
    gate_clip: float = 0.98
    """Quantile at which the gradient of each layer's gates is clipped; 1 clips nothing."""
    hard_reduction: Literal["mean", "sum"] = "mean"
    """How the hard loss of a layer is put together from its positions."""
    ratio_side: Literal["both", "cap"] = "both"
    """Whether a share below its target counts in the ratio loss."""
    generator: torch.Generator | None = None
    settled: bool = False
    """Routers and rates stand still: training chooses as inference does, and only the backbone learns."""

    def ramp(self, modality: Modality) -> float:
        return self.vision_ramp if modality is Modality.VISION else self.text_ramp


@dataclass
class Gates:
    """How one pruner chooses while it learns."""

    config: Any
    """`Dare.Config`."""
    rates: KeepRates
    relax: Relaxation
    policy: str
    """What a hop's end compresses."""
    closes: bool
    """Whether it may evict anything."""

    def keep(self, logits: Float[Tensor, "B N"], gain: Tensor | None, tokens: Tokens, site: Site) -> Keep:
        """The set that inference would keep but for the noise, with gates whose gradient reaches what it leaves out."""
        c, relax = self.config, self.relax
        if "dare rates" not in site.memo:
            found = self.rates.table().float()
            site.memo["dare rates"] = found, found.tolist()
        rates, numbers = site.memo["dare rates"]
        noisy = torch.sigmoid(logits) if c.relaxation == "paper_softmax" else logits
        if relax.noise > 0:
            noisy = noisy + relax.noise * logistic_noise(noisy, relax.generator)
        given = [g for g in site.groups if not g.generated and self._routes(g)]
        hops = {id(g): min(g.hop, c.max_hops - 1) for g in given}
        mask, ran = top(noisy.detach().float(), tokens, site.groups, self._takes(site, hops, numbers))
        coin = c.rates == "bernoulli"
        z = mask.float()
        losses: dict[str, Tensor] = {}
        kept: dict[str, tuple[Tensor, int]] = {}
        for g in given:
            m = Modality(g.modality)
            deep = self.rates.is_deep(site.layer, m)
            among = self._members(g, tokens)
            if "dare open" in site.memo:
                among = among & (site.memo["dare open"].detach() > 0.5)
            if coin and not deep:
                hard, soft = noisy.detach() > 0, torch.sigmoid(noisy / relax.temperature)
            else:
                k = self._soft_count(g, rates[m, hops[id(g)], site.layer], m, deep, logits.device)
                hard, soft = mask, self._soft(noisy, k, among)
                if deep:  # not yet hard at the start of the ramp, where everything still runs
                    eps = torch.logit(torch.tensor(c.hard_threshold)).item()
                    if relax.ramp(m) == 1:
                        hard = hard & (torch.sigmoid(logits) > c.hard_threshold)
                    soft = soft * torch.sigmoid((logits - eps) / relax.temperature)
            z = torch.where(among, straight_through(hard, soft), z)
            name = f"{m.name.lower()}{'_deep' if deep else ''}"
            size = torch.tensor([max(n, 1) for n in g.size], device=z.device)
            column = (tokens.modality == m) & (tokens.hop == g.hop) & tokens.valid & ~tokens.generated
            realised = ((z * column).sum(1) / size).mean()
            apart = realised - target(self.config, m)
            apart = apart.clamp(min=0) if relax.ratio_side == "cap" else apart
            losses[f"ratio_{name}"] = losses.get(f"ratio_{name}", 0.0) + apart.square()
            total, count = kept.get(name, (torch.zeros_like(realised), 0))
            kept[name] = total + realised * sum(g.size), count + sum(g.size)
            if deep:
                above = ((torch.sigmoid(logits) - c.hard_threshold).clamp(min=0) * among).sum()
                above = above if relax.hard_reduction == "sum" else above / among.sum().clamp(min=1)
                losses["hard"] = losses.get("hard", 0.0) + above
        losses |= {f"share_{name}": total / max(count, 1) for name, (total, count) in kept.items()}
        if c.scope == "drop":  # who was left out before stays out, and that gate goes on acting
            z = site.memo["dare open"] = z * site.memo.get("dare open", 1.0)
        mask = z.detach() > 0.5
        if coin or c.scope == "drop" or any(self.rates.is_deep(site.layer, Modality(g.modality)) for g in given):
            counted = torch.stack([(mask & (tokens.modality == m)).sum(1) for m in Modality], dim=1)
            ran = counted.tolist()
        clip_outliers(z, relax.gate_clip)
        alive = self._alive(z, noisy, tokens, site, rates)
        if c.gain == "none":  # keys stay gated, updates do not: the same numbers, without their gradient
            alive, z = z[:, None] if alive is None else alive, z.detach()
        return Keep(mask, ran, logits=logits, z=z, alive=alive, gain=gain, losses=losses)

    def _routes(self, group: Group) -> bool:
        return group.modality != Modality.LATENT and target(self.config, Modality(group.modality)) < 1

    @staticmethod
    def _members(group: Group, tokens: Tokens) -> Bool[Tensor, "B N"]:
        of = (tokens.modality == group.modality) & (tokens.hop == group.hop)
        return of & tokens.valid & ~tokens.protected & ~tokens.generated

    def _takes(self, site: Site, hops: dict[int, int], numbers: list[Any]) -> dict[int, list[int]]:
        """[group][row]: how many run, at the share to which the ramp has come down.

        Args:
            site: of the layer.
            hops: by id of the groups that are routed, the hop whose rate they have.
            numbers: [modality][hop][layer]: the rates as Python floats.
        """
        take = {}
        for i, g in enumerate(site.groups):
            share = 1.0
            if id(g) in hops:
                m = Modality(g.modality)
                rate = numbers[m][hops[id(g)]][site.layer]
                rate = self.rates.deep_cap if self.rates.is_deep(site.layer, m) else rate
                share = 1 - self.relax.ramp(m) * (1 - rate)
            rows = zip(g.size, g.protected, g.width, strict=True)
            take[i] = [min(keep_count(n, min(share, 1.0), p), p + w) for n, p, w in rows]
        return take

    def _soft(
        self, noisy: Float[Tensor, "B N"], k: Float[Tensor, "B 1"], among: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B N"]:
        """How far each member is among the best k."""
        if self.config.relaxation == "soft_topk":
            return soft_topk(noisy, k, self.relax.temperature, among)
        q = torch.softmax((noisy / self.relax.temperature).masked_fill(~among, -1e9), dim=-1)
        return (k.clamp(min=0) * q).clamp(0, 1)

    def _soft_count(self, group: Group, rate: Tensor, m: Modality, deep: bool, device: Any) -> Float[Tensor, "B 1"]:
        size = torch.tensor(group.size, device=device, dtype=torch.float32)[:, None]
        protected = torch.tensor(group.protected, device=device, dtype=torch.float32)[:, None]
        share = torch.full_like(size, self.rates.deep_cap) if deep else rate
        return (1 - self.relax.ramp(m) * (1 - share)) * size - protected

    def _alive(
        self, z: Tensor, noisy: Tensor, tokens: Tokens, site: Site, rates: Tensor
    ) -> Float[Tensor, "B hops N"] | None:
        """Which keys each hop still finds: what hop closes leave, with their gradient; None where none closes."""
        written = [g for g in site.groups if g.generated]
        if not written or not self.closes:
            return None
        last = max(g.hop for g in site.groups)
        rank = noisy.detach().half().float()  # as the cache stores it
        out = [z, z] if last >= 1 else [z]
        for h in range(1, last):
            now = out[-1]
            for m in ROUTED:
                if target(self.config, m) == 1:
                    continue
                closing = torch.full((z.shape[0],), h, device=z.device)
                candidates, base = _closing.candidates(self.policy, m, tokens, now.detach() > 0.5, closing)
                rate = rates[m, min(h, self.config.max_hops - 1), site.layer]
                rate = 1 - self.relax.ramp(m) * (1 - rate)
                aged = _closing.aged(rank, tokens.hop, closing, self.config.age_discount)
                stays = _closing.best(aged, candidates, tokens.protected, base, rate.detach().expand(z.shape[0]))
                among = candidates & ~tokens.protected
                k = rate * base[:, None] - (candidates & tokens.protected).sum(1, keepdim=True)
                soft = soft_topk(noisy, k, self.relax.temperature, among)
                gate = torch.where(among, straight_through(stays, soft), 1.0)
                clip_outliers(gate, self.relax.gate_clip)
                now = now * gate
            out.append(now)
        return torch.stack(out, dim=1)
