"""The contract of a pruner: which positions run a layer and enter its KV cache.

A pruner is a pure function of hidden states and of what the engine hands it in `site`; it knows no cache, no hops loop
and no Transformers. One that ranks fills `rate` and `scores`; one whose choice is a set, or that gates and learns,
overrides `keep`.

Legend: B batch, N positions of this call, M kept positions, D hidden, H query heads, K key-value heads, E head dim,
C slots of one layer's cache, Q queries whose attention is read, G averages of them.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmroute.config import options, parse
from mmroute.errors import ConfigError
from mmroute.select import Group, top
from mmroute.tokens import MAX_HOPS, Modality, Tokens
from mmroute.trace import Shape

__all__ = ["NEEDS", "Keep", "Look", "Pruner", "Site", "Slots", "keep_count"]

NEEDS = frozenset(
    {"embeddings", "normed", "final_normed", "keys", "qk", "row", "rows", "relevance", "scores_kept", "tower"}
)
"""What a pruner may ask the engine for; each costs something, so it is named and counted."""


def keep_count(num_positions: int, keep: float, num_protected: int) -> int:
    """How many positions of one (hop, modality) group run a layer.

    Args:
        num_positions: valid positions of the group, protected ones included.
        keep: share of them that runs, in [0, 1].
        num_protected: positions that run whatever the share; counted inside it.

    Returns:
        ceil(keep * num_positions), never below `num_protected`.

    Raises:
        ConfigError: keep is outside [0, 1].

    Example:
        >>> keep_count(100, 0.07, 0), keep_count(10, 0.0, 2)
        (7, 2)
    """
    if not 0 <= keep <= 1:
        raise ConfigError(f"keep is a share in [0, 1], given {keep}; write 0.4 for 40 %")
    # Footgun: 0.07 * 100 is 7.000000000000001, and ceil would keep one position too many.
    return max(math.ceil(keep * num_positions - 1e-6), num_protected)


@dataclass
class Keep:
    """One layer's choice."""

    mask: Bool[Tensor, "B N"]
    """True where the position runs; a subset of the valid ones that holds all protected ones."""
    ran: list[list[int]]
    """[row][modality]: how many that is. Python integers: the engine never reads them off the device."""
    logits: Float[Tensor, "B N"] | None = None
    """Stored beside the keys when the pruner `needs` scores_kept; larger stays."""
    z: Float[Tensor, "B N"] | None = None
    """Training: straight-through mask, 0 or 1 in value, with a gradient for kept and dropped positions."""
    alive: Float[Tensor, "B hops N"] | None = None
    """Training, beside `z`: [hop, position] is this layer's key in the cache while that hop runs? 0 or 1 in value, with
    the gradient of the hop closes; None is `z` in every hop."""
    gain: Float[Tensor, "B N"] | None = None
    """Multiplies the kept update, x + gain (f(x) - x), in training and inference alike; None is 1."""
    write: tuple[Tensor, Tensor] | None = None
    """(index (B, m), value (B, m, D)): replaces hidden states before the layer runs, for methods that merge."""
    losses: dict[str, Tensor] = field(default_factory=dict)
    """Scalars for the trainer, by name."""
    ranked: Float[Tensor, "B N"] | None = None
    """What the choice was ranked by, for traces; None is `logits`."""
    extra_flops: int = 0
    """What making this choice cost beyond `overhead`: what depends on how many competed (all pairs, clusters)."""

    @property
    def counts(self) -> list[int]:
        """[row]: positions that run."""
        return [sum(row) for row in self.ran]


@dataclass(frozen=True)
class Look:
    """What the vision tower looks at, by column of this call; zeros where there is no vision."""

    score: Float[Tensor, "B N"]
    """Attention of the tower's class position, or received from the whole picture."""
    keys: Float[Tensor, "B N E"]
    """The tower's keys, mean over heads; E is its own."""
    flops: int
    """What reading them cost."""


@dataclass(frozen=True)
class Slots:
    """What one layer's cache holds, slot by slot; ascending in position."""

    score: Float[Tensor, "B C"] | None
    """The `Keep.logits` each slot was stored with, for pruners whose `needs` has scores_kept."""
    modality: Int[Tensor, "B C"]
    hop: Int[Tensor, "B C"]
    protected: Bool[Tensor, "B C"]
    generated: Bool[Tensor, "B C"]
    """Written by the model: what a hop close may compress. What was given has been chosen on entry."""
    position: Int[Tensor, "B C"]
    """Logical column."""
    valid: Bool[Tensor, "B C"]
    """False at free slots."""
    seen: Int[Tensor, "B 3"]
    """Valid positions of each modality that have entered the session, in this layer or not."""


@dataclass
class Site:
    """Where the pruner stands, and what it may look at. Asking for what is not in `needs` is an error."""

    layer: int
    num_layers: int
    training: bool
    groups: list[Group]
    """The (hop, modality) groups of this call with their sizes per row, and who may still compete."""
    memo: dict[Any, Any]
    """Lives for this forward call: a set found at one stage and reused until the next. Nothing that shares memory with
    the hidden states, which the next layer may write into."""
    shape: Shape
    _sources: dict[str, Callable[..., Any]]

    def _ask(self, name: str, *args: Any) -> Any:
        if name not in self._sources:
            raise ConfigError(f"the pruner asked for {name!r}, which is not in its `needs`; add it there")
        return self._sources[name](*args)

    @property
    def embeddings(self) -> Float[Tensor, "B N D"]:
        """What entered layer 0 in this call."""
        return self._ask("embeddings")

    def normed(self, x: Tensor) -> Tensor:
        """`x` after the layer's own input norm (raw `x` where the family has none before attention)."""
        return self._ask("normed", x)

    def final_normed(self, x: Tensor) -> Tensor:
        """`x` after the text model's last norm."""
        return self._ask("final_normed", x)

    def qk(self, x: Tensor) -> tuple[Float[Tensor, "B H N E"], Float[Tensor, "B K N E"]]:
        """This layer's queries and keys of `x`, position-rotated, as its attention would use them."""
        return self._ask("qk", x)

    def keys(self, layer: int) -> Float[Tensor, "B N K E"]:
        """Cached keys of the call's positions at `layer`; zeros where nothing was stored."""
        return self._ask("keys", layer)

    @property
    def row(self) -> Float[Tensor, "B N"]:
        """Attention of each row's last query at the layer before, mean over heads, by column of this call."""
        return self._ask("row")

    @property
    def rows(self) -> Float[Tensor, "B H G N"]:
        """Attention of the positions that `Pruner.queries` named, averaged by its weights, by column of this call.

        Taken at the layer before; for `kv_only`, which chooses after a layer has run, at this one.
        """
        return self._ask("rows")

    @property
    def tower(self) -> Look:
        """Attention and keys of the vision tower's last block but one, for pictures of this call."""
        return self._ask("tower")

    @property
    def relevance(self) -> Float[Tensor, "B N"]:
        """Ground-truth relevance that the caller passed (generated tasks only)."""
        return self._ask("relevance")


class Pruner(nn.Module):
    """Base class; see the module docstring."""

    @options
    class Config:
        pass

    action: ClassVar[Literal["skip", "drop", "kv_only"]] = "skip"
    needs: frozenset[str] = frozenset()
    syncs: ClassVar[bool] = False
    """True if `keep` must read counts off the device (thresholds)."""
    config: Any

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.config = parse(type(self).Config, given, f"prune.{type(self).__module__.rpartition('.')[2]}")

    adjustable: ClassVar[frozenset[str]] = frozenset()
    """Options that may differ from those the weights were saved with: nothing learned depends on them."""

    def fit(self, shape: Shape) -> None:
        """Makes what is learned, once the model's sizes are known; `attach` calls it. Again for the same sizes: no-op.

        Raises:
            ConfigError: the options do not fit a model of these sizes.
        """

    def acts(self, layer: int, num_layers: int) -> bool:
        """Whether this layer chooses at all; a layer that does not runs every position."""
        return True

    @abstractmethod
    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        """Share of the modality's full count that runs the layer; None is all of them."""

    @abstractmethod
    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        """Larger stays; read at free positions only."""

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        """Protected positions and the best free ones of each group, counted by `rate`."""
        scores = self.scores(x, tokens, site)
        take = {i: self.counts(group, site.layer, site.num_layers) for i, group in enumerate(site.groups)}
        mask, ran = top(scores.float(), tokens, site.groups, take)
        return Keep(mask, ran, logits=scores if "scores_kept" in self.needs else None, ranked=scores)

    def queries(self, tokens: Tokens, site: Site) -> tuple[Int[Tensor, "B Q"], Float[Tensor, "B G Q"]] | None:
        """Whose attention at this layer `rows` shall hold, for pruners that need it; None is nobody's.

        Asked before the layer runs, of layers after (`kv_only`: at) which something is left out.

        Args:
            tokens: the positions of this call.
            site: of the layer that is about to run; `row` and `rows` cannot be read here.

        Returns:
            Columns of positions that run the layer, and G sets of weights over them; each set gives one average.
        """
        return None

    def counts(self, group: Group, layer: int, num_layers: int) -> list[int]:
        """[row]: how many of the group run, protected ones included, and never more than may compete."""
        rate = self.rate(layer, num_layers, group.hop, Modality(group.modality))
        if rate is None:
            return [p + w for p, w in zip(group.protected, group.width, strict=True)]
        rows = zip(group.size, group.protected, group.width, strict=True)
        return [min(keep_count(n, rate, p), p + w) for n, p, w in rows]

    def is_identity(self, num_layers: int) -> bool:
        """Whether nothing is ever left out, whatever the call: then the stock path runs untouched."""
        layers = [i for i in range(num_layers) if self.acts(i, num_layers)]
        rates = (self.rate(i, num_layers, hop, m) for i in layers for hop in range(MAX_HOPS) for m in Modality)
        return all(rate is None or rate >= 1 for rate in rates)

    def overhead(self, layer: int, shape: Shape, new: int) -> int:
        """FLOPs of choosing at this layer for `new` positions of a row, beyond what `needs` costs."""
        return 0

    def decode(self, x: Float[Tensor, "B 1 D"], tokens: Tokens, site: Site) -> Keep | None:
        """One generated position: None runs and caches it (the default); a threshold method says otherwise."""
        return None

    def close(self, slots: Slots, closing: Int[Tensor, " B"], layer: int) -> Bool[Tensor, "B C"]:
        """Hop close: which stored slots of this layer stay. Pure; protected slots stay whatever it says.

        Args:
            slots: what the layer's cache holds.
            closing: hop that has just ended in each row; -1 in a row where none did.
        """
        return slots.valid

    cap: int | None = None
    """Most positions that a layer may cache of a row between two calls; None is no bound."""

    def trim(self, slots: Slots, layer: int) -> Bool[Tensor, "B C"]:
        """Which slots stay when a layer holds more than `cap`: at most that many, protected ones included."""
        return slots.valid

    @property
    def closes(self) -> bool:
        """Whether `close` may evict anything."""
        return type(self).close is not Pruner.close
