"""Which positions run a layer, and which stay cached when a thought ends: a linear router per layer and modality, and
keep rates learned per layer (DARE-L) or per layer and hop (DARE-LH).

Legend: B batch, N positions of this call, D hidden, H hops, L layers, G groups of generated positions, C slots.

Source: DARE (token routing, ICLR 2026), known to us from slides and a summary: sigmoid linear score per layer and
    modality, learned rates per hop, layer and modality, straight-through selection, a hard loss on vision behind the
    information cliff, hop-wise compression.
Deviates: skip with re-entry; rates are shares of the full count, protected positions inside; the mean over layers is
    exact (`rates: learned`) instead of pulled by a loss; the first layers run whole; the score reads the RMS-normed
    stream without gradient; noise lies on logits, not on scores; forward gates are 1 instead of the score. Under a
    fixed count the hard loss changes no count, so behind the cutoff a position must also score above `hard_threshold`
    in training, and the share that does becomes the rate of inference. Hop, close and cache rules are ours.
Checked: equations (tests/unit/prune/test_dare.py), masking (tests/equivalence/test_dare.py).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from mmroute.config import options
from mmroute.engine.select import Group, top
from mmroute.errors import BudgetError, ConfigError
from mmroute.prune import _rank
from mmroute.prune._budget import two_level
from mmroute.prune._topk import clip_outliers, logistic_noise, soft_topk, straight_through
from mmroute.prune.base import Keep, Pruner, Site, Slots, keep_count
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

__all__ = ["Dare"]

log = logging.getLogger(__name__)

_ROUTED = (Modality.TEXT, Modality.VISION)
"""Latents are never left out."""
_NEEDS = {"last_row": {"row"}, "knorm": {"qk"}, "oracle": {"relevance"}}
_EMA = 0.95
_Schedule = Literal["auto", "flat", "two_level"] | tuple[Annotated[float, Field(ge=0, le=1)], ...]
_Share = Annotated[float, Field(gt=0, le=1)]


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
    generator: torch.Generator | None = None
    settled: bool = False
    """Routers and rates stand still: training chooses as inference does, and only the backbone learns."""

    def ramp(self, modality: Modality) -> float:
        return self.vision_ramp if modality is Modality.VISION else self.text_ramp


class Dare(Pruner):
    """Learned, asymmetric token routing."""

    @options
    class Config:
        vision_keep: _Share = 0.40
        """Mean share of vision positions that run a layer, over layers and hops; 1 leaves vision alone."""
        text_keep: _Share = 0.70
        """The same for text."""
        variant: Literal["l", "lh"] = "lh"
        """Rates per layer, or per layer and hop."""
        rates: Literal["learned", "penalty", "bernoulli", "fixed"] = "learned"
        """Learned with an exact mean; pulled by a loss; by each position's own coin; or a schedule."""
        vision_schedule: _Schedule = "auto"
        """Where learned rates start (auto: flat) or fixed ones stay (auto: two_level); a list has one per layer."""
        text_schedule: _Schedule = "auto"
        """The same for text; auto is flat."""
        hop_table: Literal["factorised", "full"] = "factorised"
        """Learned rates of `lh`: a number per layer plus one per hop, or one for each pair."""
        max_hops: Annotated[int, Field(ge=1, le=32)] = 8
        """Hops with rates of their own; later ones share the last."""
        first_layer: Annotated[int, Field(ge=0)] = 2
        """Layers before it run everything."""
        cutoff_layer: Annotated[int, Field(ge=0)] | None = None
        """First deep layer for vision, as `mmroute calibrate cliff` finds it; half of the layers if not given."""
        deep_vision: Literal["rate", "threshold", "drop"] = "rate"
        """Behind the cutoff: a fixed share, that share and a score above `hard_threshold`, or nothing."""
        deep_vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.05
        """Largest share of vision that runs a deep layer."""
        hard_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1
        """Score below which vision has no business behind the cutoff."""
        scorer: Literal["router", "last_row", "knorm", "random", "oracle"] = "router"
        """What ranks vision; `random` ranks text too. All but `router` are controls at a router's own counts."""
        score_input: Literal["rms", "raw"] = "rms"
        """Whether the router reads the normed stream or the stream itself."""
        detach_input: bool = True
        """Keeps the router's gradient out of the backbone."""
        carry: bool = False
        """Whether a layer's logit adds to the next one's, so that sets agree over layers."""
        relaxation: Literal["soft_topk", "paper_softmax"] = "soft_topk"
        """What the gates' gradient is taken of."""
        gain: Literal["ste", "tanh", "score"] = "ste"
        """What multiplies the update of a chosen position: 1, 1 + 0.2 tanh(logit), or the score."""
        cache_policy: Literal["auto", "append", "progressive"] = "auto"
        """At a hop's end: what it wrote is compressed, or everything cached is ranked again; auto: by variant."""
        age_discount: _Share = 1.0
        """Factor on a stored score per hop of age, for `progressive`."""

    config: Config
    hop_counts: Tensor
    """(2, H): how positions of each modality spread over hops in training data."""
    deep_share: Tensor
    """(L,): share of vision that passed the threshold behind the cutoff."""
    realised: Tensor
    """(2, H, L): shares that coins kept, under `bernoulli`."""
    theta: nn.Parameter
    beta: nn.Parameter
    adjustable = frozenset({"vision_keep", "text_keep", "scorer", "cache_policy", "age_discount", "deep_vision"})

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        c = self.config
        self.needs = frozenset({"scores_kept"} | _NEEDS.get(c.scorer, set()))
        self.syncs = c.deep_vision == "threshold"  # type: ignore[misc]  # an option decides
        self.relax = Relaxation()
        self.num_layers = self._hidden = 0
        self.router = nn.ModuleDict()
        self._tables: dict[int, list[list[list[float]]]] = {}
        self._untrained = False
        self.register_load_state_dict_post_hook(lambda module, keys: module.export())

    # ------------------------------------------------------------------ what is learned

    def fit(self, shape: Shape) -> None:
        """Makes routers and rates for a model of this shape; nothing is random.

        Raises:
            ConfigError: made for another shape already, or the rates cannot be met with so many layers.
        """
        if self.num_layers:
            if (self.num_layers, self._hidden) != (shape.layers, shape.hidden):
                raise ConfigError(
                    f"this pruner was made for {self.num_layers} layers of width {self._hidden}, the model has "
                    f"{shape.layers} of {shape.hidden}; build a new one"
                )
            return
        c, L, H = self.config, shape.layers, self.config.max_hops
        self.num_layers, self._hidden = L, shape.hidden
        for m in _ROUTED:
            if c.rates == "learned" and self._target(m) < 1:
                self._feasible(m, L)
        start = torch.stack([self._start(m, L) for m in _ROUTED])
        for layer in range(L):
            if self.acts(layer, L):
                row = nn.Linear(shape.hidden, len(_ROUTED))
                nn.init.zeros_(row.weight)
                nn.init.zeros_(row.bias)
                self.router[str(layer)] = row
        if c.rates in ("learned", "penalty"):
            full = c.variant == "lh" and c.hop_table == "full"
            logits = torch.logit(start.clamp(0.03, 0.97)).float()
            self.theta = nn.Parameter(logits[:, None].repeat(1, H if full else 1, 1))  # (2, H or 1, L)
            if c.variant == "lh" and not full and H > 1:
                self.beta = nn.Parameter(torch.zeros(len(_ROUTED), H - 1))
        counts = torch.zeros(len(_ROUTED), H)
        counts[:, 0] = 1
        self.register_buffer("hop_counts", counts)
        self.register_buffer("deep_share", torch.full((L,), self._deep_cap))
        self.register_buffer("realised", start[:, None].repeat(1, H, 1).float())
        if c.scorer != "router":  # a control ranks by something that is not learned
            self.requires_grad_(False)
        self.export()

    def export(self) -> None:
        """Reads learned rates into Python once; inference looks nothing up on the device."""
        self._tables = {}
        if self.num_layers:
            self._tables[self.num_layers] = self.rates().detach().tolist()
            rows = [p for r in self.router.values() for p in r.parameters()]
            self._untrained = self.config.scorer == "router" and not any(bool(p.detach().any()) for p in rows)

    def train(self, mode: bool = True) -> "Dare":
        super().train(mode)
        if not mode:
            self.export()
        return self

    def rates(self) -> Float[Tensor, "2 H L"]:
        """Share that runs, by modality, hop and layer, with gradients to what is learned; fp64."""
        L, H, c = self.num_layers, self.config.max_hops, self.config
        if c.rates == "fixed":
            return torch.stack([self._start(m, L) for m in _ROUTED])[:, None].expand(-1, H, -1)
        return torch.stack([self._modality_rates(m) for m in _ROUTED])

    def _modality_rates(self, modality: Modality) -> Float[Tensor, "H L"]:
        L, H, c, m = self.num_layers, self.config.max_hops, self.config, int(modality)
        device = self.hop_counts.device
        out = torch.ones(H, L, dtype=torch.float64, device=device)
        if self._target(modality) == 1:
            return out
        free = [i for i in range(L) if i >= c.first_layer and not self._deep(i, L, modality)]
        deep = [i for i in range(L) if i >= c.first_layer and self._deep(i, L, modality)]
        share = self.deep_share.double().clamp(max=self._deep_cap)
        if deep:
            out[:, deep] = share[deep]
        if not free:
            return out
        if c.rates == "bernoulli":
            out[:, free] = self.realised[m][:, free].double()
            return out
        logits = self.theta[m].double()[:, free].expand(H, -1)
        if hasattr(self, "beta"):
            logits = logits + torch.cat([self.beta.new_zeros(1), self.beta[m]])[:, None].double()
        if c.rates == "penalty":
            found = torch.sigmoid(logits)
        else:
            left = self._target(modality) * L - c.first_layer - float(share[deep].sum())
            left = min(left, len(free))  # deep layers that turn out to need less than their cap
            counts = self.hop_counts[m].double()
            counts = counts / counts.sum()
            weight = counts[:, None].expand(-1, len(free)).reshape(1, -1)
            k = torch.full((1, 1), left, dtype=torch.float64, device=device)
            everywhere = torch.ones_like(weight, dtype=torch.bool)
            found = soft_topk(logits.reshape(1, -1), k, 1.0, everywhere, weight, margin=1e-6).view(H, -1)
        at = torch.tensor(free, device=device)
        return out.index_copy(1, at, found)

    def _feasible(self, modality: Modality, layers: int) -> None:
        first = min(self.config.first_layer, layers)
        num_deep = sum(self._deep(i, layers, modality) for i in range(first, layers))
        free, deep = layers - first - num_deep, num_deep * self._deep_cap
        left = self._target(modality) * layers - first - deep
        if not -1e-6 <= left <= free + 1e-6:
            name = modality.name.lower()
            raise BudgetError(
                f"prune.dare.{name}_keep: a mean of {self._target(modality)} over {layers} layers cannot be met: with "
                f"first_layer {self.config.first_layer} and cutoff_layer {self._cutoff(layers)} it can be "
                f"{(first + deep) / layers:.3f} to {(first + deep + free) / layers:.3f}"
            )

    def _start(self, modality: Modality, layers: int) -> Float[Tensor, " L"]:
        """The schedule that rates begin with; fixed rates keep it."""
        c = self.config
        given = c.vision_schedule if modality is Modality.VISION else c.text_schedule
        target, first, fixed = self._target(modality), min(c.first_layer, layers), c.rates == "fixed"
        if target == 1:
            return torch.ones(layers, dtype=torch.float64)
        if given == "auto":
            given = "two_level" if fixed and modality is Modality.VISION else "flat"
        if given == "two_level":
            shares = two_level(
                target, layers, self._cutoff(layers), first_layer=c.first_layer, deep_keep=self._deep_cap
            )
        elif given == "flat":
            shares = [1.0] * first + [target] * (layers - first)
        elif len(given) == layers:
            shares = list(given)
        else:
            name = modality.name.lower()
            raise ConfigError(
                f"prune.dare.{name}_schedule has {len(given)} shares for {layers} layers; give one for each"
            )
        return torch.tensor(shares, dtype=torch.float64)

    def _target(self, modality: Modality) -> float:
        return self.config.vision_keep if modality is Modality.VISION else self.config.text_keep

    def _cutoff(self, layers: int) -> int:
        return layers // 2 if self.config.cutoff_layer is None else self.config.cutoff_layer

    def _deep(self, layer: int, layers: int, modality: Modality) -> bool:
        return modality is Modality.VISION and layer >= self._cutoff(layers)

    @property
    def _deep_cap(self) -> float:
        return 0.0 if self.config.deep_vision == "drop" else self.config.deep_vision_keep

    @torch.no_grad()
    def observe(self, tokens: Tokens, masks: Mapping[int, Bool[Tensor, "B N"]]) -> None:
        """Follows what training data is like: counts per hop, and shares that really ran where a coin or a threshold
        decides.

        Args:
            tokens: of one training call.
            masks: by layer: which positions ran.
        """
        hop = tokens.hop.clamp(max=self.config.max_hops - 1)
        for m in _ROUTED:
            of = tokens.valid & (tokens.modality == m)
            here = torch.stack([(of & (hop == h)).sum() for h in range(self.config.max_hops)]).float()
            if here.sum() > 0:
                self.hop_counts[m].lerp_(here / here.sum(), 1 - _EMA)
            given = of & ~tokens.generated
            for layer, mask in masks.items():
                if self._deep(layer, self.num_layers, m) and given.any():
                    share = (mask & given).sum() / given.sum()
                    self.deep_share[layer].lerp_(share.clamp(max=self._deep_cap), 1 - _EMA)
                if self.config.rates == "bernoulli":
                    for h in range(self.config.max_hops):
                        total = (given & (hop == h)).sum()
                        if total > 0:
                            share = (mask & given & (hop == h)).sum() / total
                            self.realised[m, h, layer].lerp_(share, 1 - _EMA)

    # ------------------------------------------------------------------ contract

    def acts(self, layer: int, num_layers: int) -> bool:
        return layer >= self.config.first_layer and min(self.config.vision_keep, self.config.text_keep) < 1

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        if modality is Modality.LATENT or self._target(modality) == 1 or not self.acts(layer, num_layers):
            return None
        return min(1.0, max(0.0, self._table(num_layers)[modality][min(hop, self.config.max_hops - 1)][layer]))

    def _table(self, num_layers: int) -> list[list[list[float]]]:
        if num_layers not in self._tables:
            other = Dare(**vars(self.config))
            other.fit(Shape(1, num_layers, 1, 1, 1, 1, 1, 4))
            self._tables[num_layers] = other._tables[num_layers]
        return self._tables[num_layers]

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        own = self._logits(x, tokens, site)
        match self.config.scorer:
            case "router":
                return own
            case "random":
                return _rank.hashed(tokens, 0, site.layer)
            case "last_row":
                other = site.row.detach().float()
            case "knorm":
                other = -_rank.key_norm(site.qk(x)[1].transpose(1, 2)).detach()
            case "oracle":
                tie = _rank.hashed(tokens, 0, site.layer)
                other = _rank.lexicographic(site.relevance, tie, tokens.valid)
        return torch.where(tokens.modality == Modality.VISION, other, own)

    def _logits(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        key = str(site.layer)
        if key not in self.router:
            return torch.zeros(tokens.shape, device=x.device)
        x = (x.detach() if self.config.detach_input else x).float()
        if self.config.score_input == "rms":
            x = x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        both = self.router[key](x)
        own = torch.where(tokens.modality == Modality.VISION, both[..., Modality.VISION], both[..., Modality.TEXT])
        if self.config.carry:
            own = own + site.memo.get("dare carried", 0.0)
            site.memo["dare carried"] = own
        return own

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        """At inference the best of each group by rate; in training the same with noise, gates and losses."""
        scores = self.scores(x, tokens, site)
        learns = site.training and not self.relax.settled and self.config.scorer == "router"
        if learns and scores.requires_grad:
            return self._learn(scores, tokens, site)
        if self._untrained and not site.training:
            log.warning(
                "dare: the routers are not trained, so they keep the first positions; dare-tf needs no training"
            )
            self._untrained = False  # said once
        take = {i: self.counts(group, site.layer, site.num_layers) for i, group in enumerate(site.groups)}
        mask, ran = top(scores.float(), tokens, site.groups, take)
        if self.syncs and self._deep(site.layer, site.num_layers, Modality.VISION):
            mask, ran = self._above(mask, scores, tokens)
        return Keep(mask, ran, logits=scores, gain=self._gain(scores, tokens))

    def _above(self, mask: Tensor, scores: Tensor, tokens: Tokens) -> tuple[Tensor, list[list[int]]]:
        """Deep vision must also score above the threshold; how many that is, is read off the device."""
        low = (tokens.modality == Modality.VISION) & (torch.sigmoid(scores) <= self.config.hard_threshold)
        mask = mask & ~(low & ~tokens.protected & ~tokens.generated)
        ran = torch.stack([(mask & (tokens.modality == m)).sum(1) for m in Modality], dim=1)
        return mask, ran.tolist()

    def _gain(self, logits: Tensor, tokens: Tokens) -> Tensor | None:
        if self.config.gain == "ste":
            return None
        value = 1 + 0.2 * torch.tanh(logits) if self.config.gain == "tanh" else torch.sigmoid(logits)
        return torch.where(self._competes(tokens), value, 1.0)

    def _competes(self, tokens: Tokens) -> Bool[Tensor, "B N"]:
        routed = torch.zeros_like(tokens.valid)
        for m in _ROUTED:
            if self._target(m) < 1:
                routed = routed | (tokens.modality == m)
        return routed & tokens.valid & ~tokens.protected & ~tokens.generated

    def overhead(self, layer: int, shape: Shape, new: int) -> int:
        return 2 * shape.hidden * new if self.acts(layer, shape.layers) else 0

    # ------------------------------------------------------------------ training

    def _learn(self, logits: Float[Tensor, "B N"], tokens: Tokens, site: Site) -> Keep:
        c, relax = self.config, self.relax
        if "dare rates" not in site.memo:
            found = self.rates().float()
            site.memo["dare rates"] = found, found.tolist()
        rates, numbers = site.memo["dare rates"]
        noisy = torch.sigmoid(logits) if c.relaxation == "paper_softmax" else logits
        if relax.noise > 0:
            noisy = noisy + relax.noise * logistic_noise(noisy, relax.generator)
        given = [g for g in site.groups if not g.generated and self._routes(g)]
        hops = {id(g): min(g.hop, c.max_hops - 1) for g in given}
        take = {}
        for i, g in enumerate(site.groups):
            share = 1.0
            if id(g) in hops:
                m = Modality(g.modality)
                share = 1 - relax.ramp(m) * (1 - numbers[m][hops[id(g)]][site.layer])
                if self._deep(site.layer, site.num_layers, m):
                    share = 1 - relax.ramp(m) * (1 - self._deep_cap)
            rows = zip(g.size, g.protected, g.width, strict=True)
            take[i] = [min(keep_count(n, min(share, 1.0), p), p + w) for n, p, w in rows]
        mask, ran = top(noisy.detach().float(), tokens, site.groups, take)
        coin = c.rates == "bernoulli"
        z = mask.float()
        losses: dict[str, Tensor] = {}
        for g in given:
            m = Modality(g.modality)
            deep = self._deep(site.layer, site.num_layers, m)
            among = self._members(g, tokens)
            if coin and not deep:
                hard, soft = noisy.detach() > 0, torch.sigmoid(noisy / relax.temperature)
            else:
                k = self._soft_count(g, rates[m, hops[id(g)], site.layer], m, deep, logits.device)
                if c.relaxation == "soft_topk":
                    soft = soft_topk(noisy, k, relax.temperature, among)
                else:
                    q = torch.softmax((noisy / relax.temperature).masked_fill(~among, -1e9), dim=-1)
                    soft = (k.clamp(min=0) * q).clamp(0, 1)
                hard = mask
                if deep:  # not yet hard at the start of the ramp, where everything still runs
                    eps = torch.logit(torch.tensor(c.hard_threshold)).item()
                    if relax.ramp(m) == 1:
                        hard = hard & (torch.sigmoid(logits) > c.hard_threshold)
                    soft = soft * torch.sigmoid((logits - eps) / relax.temperature)
            z = torch.where(among, straight_through(hard, soft), z)
            name = f"ratio_{m.name.lower()}{'_deep' if deep else ''}"
            size = torch.tensor([max(n, 1) for n in g.size], device=z.device)
            column = (tokens.modality == m) & (tokens.hop == g.hop) & tokens.valid & ~tokens.generated
            realised = (z * column).sum(1) / size
            losses[name] = losses.get(name, 0.0) + (realised.mean() - self._target(m)).square()
            if deep:
                above = (torch.sigmoid(logits) - c.hard_threshold).clamp(min=0)
                losses["hard"] = losses.get("hard", 0.0) + (above * among).sum() / among.sum().clamp(min=1)
        mask = z.detach() > 0.5
        if coin or any(self._deep(site.layer, site.num_layers, Modality(g.modality)) for g in given):
            counted = torch.stack([(mask & (tokens.modality == m)).sum(1) for m in Modality], dim=1)
            ran = counted.tolist()
        clip_outliers(z, relax.gate_clip)
        alive = self._alive(z, noisy, tokens, site, rates)
        return Keep(mask, ran, logits=logits, z=z, alive=alive, gain=self._gain(logits, tokens), losses=losses)

    def _routes(self, group: Group) -> bool:
        return group.modality != Modality.LATENT and self._target(Modality(group.modality)) < 1

    @staticmethod
    def _members(group: Group, tokens: Tokens) -> Bool[Tensor, "B N"]:
        of = (tokens.modality == group.modality) & (tokens.hop == group.hop)
        return of & tokens.valid & ~tokens.protected & ~tokens.generated

    def _soft_count(self, group: Group, rate: Tensor, m: Modality, deep: bool, device: Any) -> Float[Tensor, "B 1"]:
        size = torch.tensor(group.size, device=device, dtype=torch.float32)[:, None]
        protected = torch.tensor(group.protected, device=device, dtype=torch.float32)[:, None]
        share = torch.full_like(size, self._deep_cap) if deep else rate
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
            for m in _ROUTED:
                if self._target(m) == 1:
                    continue
                closing = torch.full((z.shape[0],), h, device=z.device)
                candidates, base = self._candidates(m, tokens, now.detach() > 0.5, closing)
                rate = rates[m, min(h, self.config.max_hops - 1), site.layer]
                rate = 1 - self.relax.ramp(m) * (1 - rate)
                aged = self._aged(rank, tokens.hop, closing)
                stays = _best(aged, candidates, tokens.protected, base, rate.detach().expand(z.shape[0]))
                among = candidates & ~tokens.protected
                k = rate * base[:, None] - (candidates & tokens.protected).sum(1, keepdim=True)
                soft = soft_topk(noisy, k, self.relax.temperature, among)
                gate = torch.where(among, straight_through(stays, soft), 1.0)
                clip_outliers(gate, self.relax.gate_clip)
                now = now * gate
            out.append(now)
        return torch.stack(out, dim=1)

    # ------------------------------------------------------------------ hops

    def decode(self, x: Float[Tensor, "B 1 D"], tokens: Tokens, site: Site) -> Keep | None:
        """A generated position runs every layer; its logit waits beside its key for the end of the hop."""
        if not self.acts(site.layer, site.num_layers) or not self.closes:
            return None
        if self.config.scorer == "random":  # one position has no rank in its hop to hash
            logits = torch.frac(tokens.position * 0.754877666 + site.layer * 0.569840296).float()
        else:
            logits = self._logits(x, tokens, site)
        return Keep(tokens.valid, [[int(m == Modality.TEXT) for m in Modality]] * tokens.shape[0], logits=logits)

    @property
    def closes(self) -> bool:
        return self.config.text_keep < 1 or (self._policy == "progressive" and self.config.vision_keep < 1)

    @property
    def _policy(self) -> str:
        if self.config.cache_policy == "auto":
            return "append" if self.config.variant == "l" else "progressive"
        return self.config.cache_policy

    def close(self, slots: Slots, closing: Int[Tensor, " B"], layer: int) -> Bool[Tensor, "B C"]:
        """`append`: of what the closing hop wrote, the best share stays; `progressive`: of all that is cached."""
        if not self.acts(layer, self.num_layers) or slots.score is None:
            return slots.valid
        stays = slots.valid
        for m in _ROUTED:
            if self._target(m) == 1:
                continue
            candidates, base = self._candidates(m, slots, slots.valid, closing)
            table = torch.tensor(
                [self.rate(layer, self.num_layers, h, m) for h in range(self.config.max_hops)], device=closing.device
            )
            rate = table[closing.clamp(0, self.config.max_hops - 1)]
            score = self._aged(slots.score, slots.hop, closing)
            best = _best(score, candidates, slots.protected, base, rate)
            stays = torch.where(candidates, best | slots.protected, stays)
        return stays

    def _candidates(
        self, m: Modality, at: Tokens | Slots, present: Bool[Tensor, "B n"], closing: Int[Tensor, " B"]
    ) -> tuple[Bool[Tensor, "B n"], Float[Tensor, " B"]]:
        """What competes when a hop closes, and the count its share is taken of."""
        of = (at.modality == m) & at.valid
        if self._policy == "append":
            mine = of & present & at.generated & (at.hop == closing[:, None])
            return mine, mine.sum(1).float()
        until = of & (at.hop <= closing[:, None])
        seen = at.seen[:, m] if isinstance(at, Slots) else until.sum(1)
        return until & present, seen.float()

    def _aged(self, score: Tensor, hop: Tensor, closing: Tensor) -> Tensor:
        """Order of score x discount ^ age, in logarithms, where large logits stay apart."""
        if self.config.age_discount == 1:
            return score
        age = (closing[:, None] - hop).clamp(min=0)
        return torch.nn.functional.logsigmoid(score) + age * torch.tensor(self.config.age_discount).log().item()


def _best(
    score: Float[Tensor, "B n"],
    candidates: Bool[Tensor, "B n"],
    protected: Bool[Tensor, "B n"],
    base: Float[Tensor, " B"],
    rate: Float[Tensor, " B"],
) -> Bool[Tensor, "B n"]:
    """The ceil(rate x base) best candidates of each row, protected ones first and counted inside."""
    fixed = candidates & protected
    free = candidates & ~protected
    k = torch.ceil(rate.double() * base.double() - 1e-6).long() - fixed.sum(1)
    order = score.masked_fill(~free, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return fixed | (free & (rank < k[:, None]))
