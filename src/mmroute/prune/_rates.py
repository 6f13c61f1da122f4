"""DARE's keep rates: what share of each modality runs each layer in each hop, learned under a mean that is met exactly.

Legend: H hops with rates of their own, L layers; modality 0 is text, 1 is vision.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmroute.config import read_yaml
from mmroute.errors import BudgetError, ConfigError
from mmroute.prune._borrowed import borrow
from mmroute.prune._budget import cosine, two_level
from mmroute.prune._topk import soft_topk
from mmroute.tokens import Modality, Tokens

__all__ = ["ROUTED", "KeepRates", "policy", "target"]

ROUTED = (Modality.TEXT, Modality.VISION)
"""Latents are never left out."""
_EMA = 0.95


def target(config: Any, modality: Modality) -> float:
    """The mean keep rate over layers and hops that a `Dare.Config` asks for; 1 leaves the modality alone."""
    return config.vision_keep if modality is Modality.VISION else config.text_keep


def policy(config: Any) -> str:
    """What a hop's end compresses, `auto` settled: `append`, `progressive` or `capped`."""
    if config.cache_policy == "auto":
        return "append" if config.variant == "l" else "progressive"
    return config.cache_policy


class KeepRates(nn.Module):
    """The table of rates and what it is computed from."""

    hop_counts: Tensor
    """(2, H): how positions of each modality spread over hops in training data."""
    deep_share: Tensor
    """(L,): share of vision that passed the threshold behind the cutoff."""
    certain: Tensor
    """(2, H): share that is protected, so no smaller one can be met: of the hop under `append`, else of all so far."""
    realised: Tensor
    """(2, H, L): shares that coins kept, under `bernoulli`."""
    theta: nn.Parameter
    """(2, H or 1, L): logit of each layer's rate."""
    beta: nn.Parameter
    """(2, H - 1): what each later hop adds to it, under `factorised`."""

    def __init__(self, config: Any, layers: int) -> None:
        """
        Args:
            config: of the pruner (`Dare.Config`).
            layers: L.

        Raises:
            BudgetError: the targets cannot be met with so many layers.
            ConfigError: a schedule of another length.
        """
        super().__init__()
        self.config, self.num_layers = config, layers
        H = config.max_hops
        for m in ROUTED:
            if config.rates == "learned" and self.target(m) < 1:
                self._feasible(m)
        start = torch.stack([self._start(m) for m in ROUTED])
        if config.rates in ("learned", "penalty"):
            full = config.variant == "lh" and config.hop_table == "full"
            logits = torch.logit(start.clamp(0.03, 0.97)).float()
            self.theta = nn.Parameter(logits[:, None].repeat(1, H if full else 1, 1))
            if config.variant == "lh" and not full and H > 1:
                self.beta = nn.Parameter(torch.zeros(len(ROUTED), H - 1))
        counts = torch.zeros(len(ROUTED), H)
        counts[:, 0] = 1
        self.register_buffer("hop_counts", counts)
        self.register_buffer("certain", torch.zeros(len(ROUTED), H))
        self.register_buffer("deep_share", torch.full((layers,), self.deep_cap))
        self.register_buffer("realised", start[:, None].repeat(1, H, 1).float())

    def target(self, modality: Modality) -> float:
        """The mean over layers and hops; see `target`."""
        return target(self.config, modality)

    @property
    def cutoff(self) -> int:
        """First deep layer of vision."""
        return self.num_layers // 2 if self.config.cutoff_layer is None else self.config.cutoff_layer

    def is_deep(self, layer: int, modality: Modality) -> bool:
        """Whether the layer lies behind the information cliff of this modality."""
        return modality is Modality.VISION and layer >= self.cutoff

    @property
    def deep_cap(self) -> float:
        """Largest share of vision that runs a deep layer."""
        return 0.0 if self.config.deep_vision == "drop" else self.config.deep_vision_keep

    def table(self) -> Float[Tensor, "2 H L"]:
        """Share that runs, by modality, hop and layer, with gradients to what is learned; fp64."""
        if self.config.rates == "fixed":
            start = torch.stack([self._start(m) for m in ROUTED])
            return start[:, None].expand(-1, self.config.max_hops, -1)
        return torch.stack([self._of(m) for m in ROUTED])

    def _of(self, modality: Modality) -> Float[Tensor, "H L"]:
        L, H, c, m = self.num_layers, self.config.max_hops, self.config, int(modality)
        device = self.hop_counts.device
        out = torch.ones(H, L, dtype=torch.float64, device=device)
        if self.target(modality) == 1:
            return out
        free = [i for i in range(L) if i >= c.first_layer and not self.is_deep(i, modality)]
        deep = [i for i in range(L) if i >= c.first_layer and self.is_deep(i, modality)]
        share = self.deep_share.double().clamp(max=self.deep_cap)
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
            left = self.target(modality) * L - c.first_layer - float(share[deep].sum())
            left = min(left, len(free))  # deep layers that turn out to need less than their cap
            counts = self.hop_counts[m].double()
            counts = (counts / counts.sum())[:, None].expand(-1, len(free))
            # What is protected runs whatever the rate says: only the rest is shared out, or the mean is not met.
            floor = self.certain[m].double()[:, None].clamp(max=left / len(free)).expand(-1, len(free))
            weight = (counts * (1 - floor)).reshape(1, -1)
            k = (left - (counts * floor).sum()).view(1, 1)
            everywhere = torch.ones_like(weight, dtype=torch.bool)
            soft = soft_topk(logits.reshape(1, -1), k, 1.0, everywhere, weight, margin=1e-6).view(H, -1)
            found = floor + (1 - floor) * soft
        return out.index_copy(1, torch.tensor(free, device=device), found)

    def _feasible(self, modality: Modality) -> None:
        first = min(self.config.first_layer, self.num_layers)
        num_deep = sum(self.is_deep(i, modality) for i in range(first, self.num_layers))
        free, deep = self.num_layers - first - num_deep, num_deep * self.deep_cap
        left = self.target(modality) * self.num_layers - first - deep
        if not -1e-6 <= left <= free + 1e-6:
            L = self.num_layers
            raise BudgetError(
                f"prune.dare.{modality.name.lower()}_keep: a mean of {self.target(modality)} over {L} layers cannot be "
                f"met: with first_layer {self.config.first_layer} and cutoff_layer {self.cutoff} it can be "
                f"{(first + deep) / L:.3f} to {(first + deep + free) / L:.3f}"
            )

    def _start(self, modality: Modality) -> Float[Tensor, " L"]:
        """The schedule that rates begin with; fixed rates keep it."""
        c, layers = self.config, self.num_layers
        given = c.vision_schedule if modality is Modality.VISION else c.text_schedule
        target, first, fixed = self.target(modality), min(c.first_layer, layers), c.rates == "fixed"
        if target == 1:
            return torch.ones(layers, dtype=torch.float64)
        if given == "auto":
            given = "two_level" if fixed and modality is Modality.VISION else "flat"
        if given == "two_level":
            shares = two_level(target, layers, self.cutoff, first_layer=c.first_layer, deep_keep=self.deep_cap)
        elif given == "flat":
            shares = [1.0] * first + [target] * (layers - first)
        elif given == "cosine":
            left = max(target * layers - first, 1e-6)  # what cannot be met is said where it must be
            shares = [1.0] * first + list(cosine(min(left / max(layers - first, 1), 1.0), layers - first))
        elif isinstance(given, str):
            shares = _borrowed(given, layers, modality)
        elif len(given) == layers:
            shares = list(given)
        else:
            raise ConfigError(
                f"prune.dare.{modality.name.lower()}_schedule has {len(given)} shares for {layers} layers; give one "
                "for each"
            )
        return torch.tensor(shares, dtype=torch.float64)

    @torch.no_grad()
    def observe(self, tokens: Tokens, masks: Mapping[int, Bool[Tensor, "B N"]]) -> None:
        """Follows what training data is like: counts per hop, and shares that really ran where a coin or a threshold
        decides.

        Args:
            tokens: of one training call.
            masks: by layer: which positions ran.
        """
        hop = tokens.hop.clamp(max=self.config.max_hops - 1)
        for m in ROUTED:
            of = tokens.valid & (tokens.modality == m)
            here = torch.stack([(of & (hop == h)).sum() for h in range(self.config.max_hops)]).float()
            if here.sum() > 0:
                self.hop_counts[m].lerp_(here / here.sum(), 1 - _EMA)
            certain = torch.stack([(of & tokens.protected & (hop == h)).sum() for h in range(len(here))]).float()
            if policy(self.config) != "append":  # later hops share out all that has entered
                here, certain = here.cumsum(0), certain.cumsum(0)
            self.certain[m].lerp_(torch.where(here > 0, certain / here.clamp(min=1), 0), 1 - _EMA)
            given = of & ~tokens.generated
            for layer, mask in masks.items():
                if self.is_deep(layer, m) and given.any():
                    share = (mask & given).sum() / given.sum()
                    self.deep_share[layer].lerp_(share.clamp(max=self.deep_cap), 1 - _EMA)
                if self.config.rates == "bernoulli":
                    for h in range(self.config.max_hops):
                        total = (given & (hop == h)).sum()
                        if total > 0:
                            share = (mask & given & (hop == h)).sum() / total
                            self.realised[m, h, layer].lerp_(share, 1 - _EMA)


def _borrowed(given: str, layers: int, modality: Modality) -> list[float]:
    """What a trained or calibrated method keeps of a prompt, by layer."""
    path = Path(given[1:])
    other = borrow(read_yaml(path).get("prune") or {} if path.is_file() else given)
    shares = [other.rate(i, layers, 0, modality) if other.acts(i, layers) else None for i in range(layers)]
    return [1.0 if share is None else share for share in shares]
