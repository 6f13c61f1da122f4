"""Every file in prune/ keeps the pruner's contract; a new file is covered by being there."""

from typing import Any

import pytest
import torch
from torch import nn

from mmroute import checks, hub
from mmroute.prune.base import Keep, Pruner, Site
from mmroute.prune.fastv import FastV
from mmroute.tokens import Modality, Tokens

OTHER_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("random", {"vision_keep": 0.0, "text_keep": 0.5, "start_layer": 2, "once": True}),
    ("fastv", {"vision_keep": 0.0, "start_layer": 1}),
    ("pyramiddrop", {"stage_keep": 0.3, "stages": [0.0, 0.5]}),
    ("knorm", {"text_keep": 0.5, "start_layer": 1}),
    ("keydiff", {"text_keep": 0.5, "start_layer": 2}),
    ("oracle", {"vision_keep": 0.1, "start_layer": 3}),
    ("divprune", {"vision_keep": 0.0}),
    ("dart", {"vision_keep": 0.0, "start_layer": 1, "text_pivots": 0}),
    ("reroute", {"method": "pyramiddrop", "stages": [0.0, 0.5]}),
    ("snapkv", {"window": 1, "pool": "max", "text_keep": 0.0}),
    ("sparsevlm", {"version": "v2", "keeps": [0.0], "after": [0.5]}),
    ("streaming", {"sinks": 0, "text_keep": 0.3}),
    *[("schedule", {"scorer": s, "scope": c}) for s in ("row", "knorm", "random", "oracle") for c in ("skip", "drop")],
]


@pytest.mark.parametrize("name", hub.names("prune"))
def test_pruner_keeps_its_contract(name: str) -> None:
    checks.check_pruner(hub.load("prune", name))


@pytest.mark.parametrize(("name", "options"), OTHER_OPTIONS)
def test_pruner_keeps_its_contract_with_other_options(name: str, options: dict[str, Any]) -> None:
    checks.check_pruner(hub.load("prune", name, **options))


class Base(Pruner):
    """A pruner without faults, for the faulty ones below to spoil."""

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        return 0.5 if modality is Modality.VISION else None

    def scores(self, x: torch.Tensor, tokens: Tokens, site: Site) -> torch.Tensor:
        return x.float().sum(-1)


class RateAboveOne(Base):
    def rate(self, *args: Any) -> float | None:
        return 1.5


class RateIsATensor(Base):
    def rate(self, *args: Any) -> Any:
        return torch.tensor(0.5)


class Draws(Base):
    def scores(self, x: torch.Tensor, tokens: Tokens, site: Site) -> torch.Tensor:
        return torch.rand(tokens.shape)


class ForgetsProtection(Base):
    def keep(self, x: torch.Tensor, tokens: Tokens, site: Site) -> Keep:
        keep = super().keep(x, tokens, site)
        keep.mask = keep.mask & ~tokens.protected
        return keep


class KeepsPadding(Base):
    def keep(self, x: torch.Tensor, tokens: Tokens, site: Site) -> Keep:
        keep = super().keep(x, tokens, site)
        keep.mask = keep.mask | ~tokens.valid
        return keep


class Miscounts(Base):
    def keep(self, x: torch.Tensor, tokens: Tokens, site: Site) -> Keep:
        keep = super().keep(x, tokens, site)
        keep.ran[0][0] += 1
        return keep


class RanksByPaddedColumn(Base):
    def scores(self, x: torch.Tensor, tokens: Tokens, site: Site) -> torch.Tensor:
        return torch.sin(tokens.position.float())


class NotFinite(Base):
    def scores(self, x: torch.Tensor, tokens: Tokens, site: Site) -> torch.Tensor:
        return x.float().sum(-1) / 0


class NormalisesOverTheBatch(Base):
    def scores(self, x: torch.Tensor, tokens: Tokens, site: Site) -> torch.Tensor:
        return -(x.float().sum(-1) - x.float().sum(-1)[0, -1]).abs()


class Counter(Base):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.calls = 0

    def scores(self, x: torch.Tensor, tokens: Tokens, site: Site) -> torch.Tensor:
        self.calls += 1
        return x.float()[..., self.calls % x.shape[-1]]


class UntrainedRouter(Base):
    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.router = nn.Linear(checks.D, 1)

    def scores(self, x: torch.Tensor, tokens: Tokens, site: Site) -> torch.Tensor:
        return self.router(x.float()).squeeze(-1).detach()


class TouchesBackbone(UntrainedRouter):
    def keep(self, x: torch.Tensor, tokens: Tokens, site: Site) -> Keep:
        keep = super().keep(x, tokens, site)
        soft = self.router(x.float()).squeeze(-1).sigmoid()
        keep.z = keep.mask.float() + soft - soft.detach()
        return keep


FAULTY = [
    (RateAboveOne, "None or a number in"),
    (RateIsATensor, "None or a number in"),
    (Draws, "keep different positions|global generator"),
    (ForgetsProtection, "leaves out a protected position"),
    (KeepsPadding, "keeps padding"),
    (Miscounts, "`ran` says"),
    (RanksByPaddedColumn, "alone keeps other positions"),
    (NotFinite, "not finite"),
    (NormalisesOverTheBatch, "alone keeps other positions"),
    (Counter, "two equal calls"),
    (UntrainedRouter, "no straight-through mask"),
    (TouchesBackbone, "reaches the backbone"),
]


def test_a_pruner_without_faults_passes() -> None:
    checks.check_pruner(Base)
    checks.check_pruner(FastV)


@pytest.mark.parametrize(("faulty", "message"), FAULTY)
def test_a_broken_promise_is_named(faulty: type[Pruner], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        checks.check_pruner(faulty)


def test_a_learned_pruner_that_shields_the_backbone_passes() -> None:
    class Shielded(UntrainedRouter):
        def keep(self, x: torch.Tensor, tokens: Tokens, site: Site) -> Keep:
            keep = super().keep(x, tokens, site)
            soft = self.router(x.detach().float()).squeeze(-1).sigmoid()
            keep.z = keep.mask.float() + soft - soft.detach()
            return keep

    checks.check_pruner(Shielded)
