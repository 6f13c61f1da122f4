"""Which positions run a layer, and which stay cached when a thought ends: a linear router per layer and modality, and
keep rates learned per layer (DARE-L) or per layer and hop (DARE-LH).

Legend: B batch, N positions of this call, D hidden, H hops, L layers, Q queries whose attention is read, G averages of
it, C slots.

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

import functools
import logging
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.prune import _closing, _rank
from mmroute.prune._gates import Gates, Relaxation
from mmroute.prune._rates import ROUTED, KeepRates, policy, target
from mmroute.prune._scorers import last_queries, needs_of, vision_scores
from mmroute.prune.base import Keep, Pruner, Site, Slots
from mmroute.select import hashed, top
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

__all__ = ["Dare"]

log = logging.getLogger(__name__)

_SLACK = 64
"""Positions that a trim frees beyond the bound, so that not every step trims; a quarter of a small bound."""
_Schedule = (
    Literal["auto", "flat", "two_level", "cosine"]
    | Annotated[str, Field(pattern=r"^@.+")]
    | tuple[Annotated[float, Field(ge=0, le=1)], ...]
)
_Share = Annotated[float, Field(gt=0, le=1)]


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
        """Where learned rates start (auto: flat) or fixed ones stay (auto: two_level). A list has one per layer;
        `@PATH` takes the prompt's from a folder of trained routers or from what `mmroute calibrate schedule` wrote."""
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
        scope: Literal["skip", "drop"] = "skip"
        """Whether what a layer leaves out may come back at the next."""
        scorer: Literal["router", "last_row", "received", "knorm", "diverse", "random", "oracle"] = "router"
        """What ranks vision; `random` ranks text too. The training-free ones rank by the last query's attention, by
        that of the last 16 queries, by small keys, by distance to what is taken already. All but `router` serve as
        controls at a router's own counts."""
        score_input: Literal["rms", "raw"] = "rms"
        """Whether the router reads the normed stream or the stream itself."""
        detach_input: bool = True
        """Keeps the router's gradient out of the backbone."""
        carry: bool = False
        """Whether a layer's logit adds to the next one's, so that sets agree over layers."""
        relaxation: Literal["soft_topk", "paper_softmax"] = "soft_topk"
        """What the gates' gradient is taken of."""
        gain: Literal["ste", "tanh", "score", "none"] = "ste"
        """What multiplies the update of a chosen position: 1, 1 + 0.2 tanh(logit), the score, or 1 without a gradient,
        so that routers learn only from what a position's key and value are worth to others."""
        decode: Literal["keep", "threshold"] = "keep"
        """Whether a written position runs every layer, or those where it scores above what training text did."""
        cache_policy: Literal["auto", "append", "progressive", "capped"] = "auto"
        """At a hop's end: what it wrote is compressed, or everything cached is ranked again, or that and never more
        than `kv_positions` or `kv_bytes` between two calls; auto: by variant."""
        kv_positions: Annotated[int, Field(ge=8)] | None = None
        """Most positions that a layer caches of a sample, for `capped`."""
        kv_bytes: Annotated[int, Field(ge=1)] | None = None
        """Most bytes of keys and values that all layers cache of a sample, for `capped`."""
        age_discount: _Share = 1.0
        """Factor on a stored score per hop of age, for `progressive`."""

    config: Config
    rates: KeepRates
    floors: Tensor
    """(L,): score above which written text runs a layer, under `decode: threshold`."""
    adjustable = frozenset(
        {
            *("vision_keep", "text_keep", "scorer", "cache_policy", "age_discount", "deep_vision"),
            *("decode", "kv_positions", "kv_bytes"),
        }
    )

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        c = self.config
        self.needs = frozenset({"scores_kept"} | needs_of(c.scorer))
        self.action = c.scope  # type: ignore[misc]  # an option decides, here and below
        self.syncs = c.deep_vision == "threshold" or c.decode == "threshold"  # type: ignore[misc]
        if (c.cache_policy == "capped") != (c.kv_positions is not None or c.kv_bytes is not None):
            raise ConfigError(
                "prune.dare: cache_policy capped goes with kv_positions or kv_bytes, and these with it "
                f"(given {c.cache_policy}, {c.kv_positions}, {c.kv_bytes})"
            )
        self.relax = Relaxation()
        self.num_layers = self._hidden = 0
        self.cap: int | None = None
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
        self.rates = KeepRates(self.config, shape.layers)
        if self.config.cutoff_layer is None and self.config.vision_keep < 1:
            _tell_of_half(shape.layers)
        self.num_layers, self._hidden = shape.layers, shape.hidden
        for layer in range(shape.layers):
            if self.acts(layer, shape.layers):
                row = nn.Linear(shape.hidden, len(ROUTED))
                nn.init.zeros_(row.weight)
                nn.init.zeros_(row.bias)
                self.router[str(layer)] = row
        self.register_buffer("floors", torch.full((shape.layers,), -torch.inf))
        self.cap = self._cap(shape)
        if self.config.scorer != "router":  # a control ranks by something that is not learned
            self.requires_grad_(False)
        self.export()

    def _cap(self, shape: Shape) -> int | None:
        c = self.config
        if c.cache_policy != "capped":
            return None
        bounds = [] if c.kv_positions is None else [c.kv_positions]
        if c.kv_bytes is not None:
            each = shape.layers * 2 * shape.kv_heads * shape.head_dim * shape.itemsize
            if c.kv_bytes < 8 * each:
                raise ConfigError(
                    f"prune.dare.kv_bytes: {c.kv_bytes} is less than 8 positions, {8 * each} bytes; give more"
                )
            bounds.append(c.kv_bytes // each)
        return min(bounds)

    def export(self) -> None:
        """Reads learned rates into Python once; inference looks nothing up on the device."""
        self._tables = {}
        if self.num_layers:
            self._tables[self.num_layers] = self.rates.table().detach().tolist()
            rows = [p for r in self.router.values() for p in r.parameters()]
            self._untrained = self.config.scorer == "router" and not any(bool(p.detach().any()) for p in rows)

    def train(self, mode: bool = True) -> "Dare":
        super().train(mode)
        if not mode:
            self.export()
        return self

    @torch.no_grad()
    def observe(self, tokens: Tokens, keeps: dict[int, Keep]) -> None:
        """Follows what training data is like: how it spreads over hops, what thresholds and coins let through.

        Args:
            tokens: of one training call.
            keeps: what this pruner chose in it, by layer.
        """
        self.rates.observe(tokens, {layer: keep.mask for layer, keep in keeps.items()})
        written = tokens.valid & tokens.generated & (tokens.modality == Modality.TEXT)
        if not written.any() or self.config.text_keep == 1:
            return
        table = self.rates.table()[Modality.TEXT, -1].tolist()
        for layer, keep in keeps.items():
            if keep.logits is not None:
                floor = keep.logits[written].float().quantile(1 - table[layer])
                old = self.floors[layer]
                self.floors[layer] = torch.where(old.isfinite(), old.lerp(floor, 0.05), floor)

    # ------------------------------------------------------------------ contract

    def acts(self, layer: int, num_layers: int) -> bool:
        return layer >= self.config.first_layer and min(self.config.vision_keep, self.config.text_keep) < 1

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        if modality is Modality.LATENT or target(self.config, modality) == 1 or not self.acts(layer, num_layers):
            return None
        return min(1.0, max(0.0, self._table(num_layers)[modality][min(hop, self.config.max_hops - 1)][layer]))

    def _table(self, num_layers: int) -> list[list[list[float]]]:
        if num_layers not in self._tables:
            other = Dare(**vars(self.config))
            other.fit(Shape(1, num_layers, 1, 1, 1, 1, 1, 4))
            self._tables[num_layers] = other._tables[num_layers]
        return self._tables[num_layers]

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        if self.config.scorer == "random":
            return hashed(tokens, 0, site.layer)
        own = self._logits(x, tokens, site)
        if self.config.scorer == "router":
            return own
        other = vision_scores(self.config.scorer, x, tokens, site)
        return torch.where(tokens.modality == Modality.VISION, other, own)

    def queries(self, tokens: Tokens, site: Site) -> tuple[Int[Tensor, "B Q"], Float[Tensor, "B G Q"]] | None:
        """The last positions of each row, for the scorer `received`."""
        return last_queries(tokens) if self.config.scorer == "received" else None

    def _logits(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        key = str(site.layer)
        if key not in self.router:
            return torch.zeros(tokens.shape, device=x.device)
        both = self.router[key](self.reads(x))
        own = torch.where(tokens.modality == Modality.VISION, both[..., Modality.VISION], both[..., Modality.TEXT])
        if self.config.carry:
            own = own + site.memo.get("dare carried", 0.0)
            site.memo["dare carried"] = own
        return own

    def reads(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """What routers see of the stream, in fp32."""
        x = (x.detach() if self.config.detach_input else x).float()
        if self.config.score_input == "rms":
            x = _rank.rms_normed(x)
        return x

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        """At inference the best of each group by rate; in training the same with noise, gates and losses."""
        scores = self.scores(x, tokens, site)
        learns = site.training and not self.relax.settled and self.config.scorer == "router"
        if learns and scores.requires_grad:
            gates = Gates(self.config, self.rates, self.relax, policy(self.config), self.closes)
            return gates.keep(scores, self._gain(scores, tokens), tokens, site)
        if self._untrained and not site.training:
            log.warning(
                "dare: the routers are not trained, so they keep the first positions; dare-tf needs no training"
            )
            self._untrained = False  # said once
        take = {i: self.counts(group, site.layer, site.num_layers) for i, group in enumerate(site.groups)}
        mask, ran = top(scores.float(), tokens, site.groups, take)
        if self.config.deep_vision == "threshold" and self.rates.is_deep(site.layer, Modality.VISION):
            mask, ran = self._above(mask, scores, tokens)
        return Keep(mask, ran, logits=scores, gain=self._gain(scores, tokens))

    def _above(self, mask: Tensor, scores: Tensor, tokens: Tokens) -> tuple[Tensor, list[list[int]]]:
        """Deep vision must also score above the threshold; how many that is, is read off the device."""
        low = (tokens.modality == Modality.VISION) & (torch.sigmoid(scores) <= self.config.hard_threshold)
        mask = mask & ~(low & ~tokens.protected & ~tokens.generated)
        ran = torch.stack([(mask & (tokens.modality == m)).sum(1) for m in Modality], dim=1)
        return mask, ran.tolist()

    def _gain(self, logits: Tensor, tokens: Tokens) -> Tensor | None:
        if self.config.gain in ("ste", "none"):
            return None
        value = 1 + 0.2 * torch.tanh(logits) if self.config.gain == "tanh" else torch.sigmoid(logits)
        return torch.where(self._competes(tokens), value, 1.0)

    def _competes(self, tokens: Tokens) -> Bool[Tensor, "B N"]:
        routed = torch.zeros_like(tokens.valid)
        for m in ROUTED:
            if target(self.config, m) < 1:
                routed = routed | (tokens.modality == m)
        return routed & tokens.valid & ~tokens.protected & ~tokens.generated

    def overhead(self, layer: int, shape: Shape, new: int) -> int:
        return 2 * shape.hidden * new if self.acts(layer, shape.layers) else 0

    # ------------------------------------------------------------------ hops

    def decode(self, x: Float[Tensor, "B 1 D"], tokens: Tokens, site: Site) -> Keep | None:
        """A generated position runs every layer, or those where it scores enough; its logit waits for the hop's end."""
        if not self.acts(site.layer, site.num_layers) or not (self.closes or self.config.decode == "threshold"):
            return None
        if self.config.scorer == "random":  # one position has no rank in its hop to hash
            logits = torch.frac(tokens.position * 0.754877666 + site.layer * 0.569840296).float()
        else:
            logits = self._logits(x, tokens, site)
        runs = tokens.valid
        if self.config.decode == "threshold":
            runs = runs & (tokens.protected | (logits >= self.floors[site.layer]))
            return Keep(runs, [[n, 0, 0] for n in runs.sum(1).tolist()], logits=logits)
        return Keep(runs, [[int(m == Modality.TEXT) for m in Modality]] * tokens.shape[0], logits=logits)

    @property
    def closes(self) -> bool:
        return self.config.text_keep < 1 or (policy(self.config) != "append" and self.config.vision_keep < 1)

    def close(self, slots: Slots, closing: Int[Tensor, " B"], layer: int) -> Bool[Tensor, "B C"]:
        """`append`: of what the closing hop wrote, the best share stays; `progressive`: of all that is cached."""
        if not self.acts(layer, self.num_layers) or slots.score is None:
            return slots.valid
        stays = slots.valid
        for m in ROUTED:
            if target(self.config, m) == 1:
                continue
            candidates, base = _closing.candidates(policy(self.config), m, slots, slots.valid, closing)
            table = torch.tensor(
                [self.rate(layer, self.num_layers, h, m) for h in range(self.config.max_hops)], device=closing.device
            )
            rate = table[closing.clamp(0, self.config.max_hops - 1)]
            score = _closing.aged(slots.score, slots.hop, closing, self.config.age_discount)
            best = _closing.best(score, candidates, slots.protected, base, rate)
            stays = torch.where(candidates, best | slots.protected, stays)
        return stays

    def trim(self, slots: Slots, layer: int) -> Bool[Tensor, "B C"]:
        """Which slots of a layer stay when it holds more than `cap`; some room below it is freed at once."""
        assert self.cap is not None
        latest = slots.hop.amax(1)
        score = slots.position.float() if slots.score is None else slots.score
        if slots.score is not None:
            score = _closing.aged(score, slots.hop, latest, self.config.age_discount)
        hop = min(int(latest.max()), self.config.max_hops - 1)
        weight = {}
        for m in Modality:
            share = self.rate(layer, self.num_layers, hop, m)
            weight[int(m)] = slots.seen[:, m] * (1.0 if share is None else share)
        room = self.cap - min(_SLACK, self.cap // 4)
        return _closing.capped(score, slots.modality, slots.valid, slots.protected, room, weight)


@functools.cache
def _tell_of_half(layers: int) -> None:  # once, however many budgets a bench has
    log.warning(
        "dare: no cutoff_layer is given, so vision counts as deep in the later half of %d layers; "
        "`mmroute calibrate cliff` measures it",
        layers,
    )
