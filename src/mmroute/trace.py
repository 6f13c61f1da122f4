"""What happened: per forward call and layer what ran, what was cached, what ran again. Plain data, JSON both ways.

All counts are per batch row; nothing here is a tensor. Costs are computed from a Trace in closed form (`cost.py`).
"""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from mmroute.errors import ConfigError

__all__ = ["SCHEMA", "Call", "HopClose", "LayerCall", "Shape", "Trace"]

SCHEMA = "trace/1"


@dataclass(frozen=True)
class Shape:
    """The sizes of a text model that costs depend on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    itemsize: int
    """Bytes of one cached number."""
    gated_mlp: bool = True


@dataclass
class LayerCall:
    """One layer in one forward call."""

    ran: list[list[int]]
    """[row][modality]: positions that ran the layer."""
    cached: list[int]
    """[row]: keys of this layer that were cached before the call."""
    stored: list[int]
    """[row]: keys cached after it; 0 without a cache."""
    again: list[int] = field(default_factory=list)
    """[row]: positions of the second pass; empty where there is none."""
    again_cached: list[int] = field(default_factory=list)
    """[row]: keys of the second cache before the second pass."""
    extra_flops: int = 0
    """FLOPs a method spent on choosing: router rows, probe rows, extra q and k."""
    kept: list[list[int]] | None = None
    """[row]: logical columns that ran; only with a full trace."""


@dataclass
class Call:
    """One forward call through the text model."""

    kind: Literal["prefill", "decode"]
    hop: list[int]
    """[row]: hop of the call's last position."""
    new: list[list[int]]
    """[row][modality]: valid positions that entered."""
    layers: list[LayerCall]
    start: int = 0
    """Logical column of the first new position."""

    def row(self, b: int) -> "Call":
        """One row of the call alone; what methods spent on the batch is shared by the positions each row brought."""
        share, whole = sum(self.new[b]), max(sum(map(sum, self.new)), 1)
        layers = [
            LayerCall(
                ran=[layer.ran[b]],
                cached=[layer.cached[b]],
                stored=[layer.stored[b]],
                again=layer.again[b : b + 1],
                again_cached=layer.again_cached[b : b + 1],
                extra_flops=layer.extra_flops * share // whole,
                kept=None if layer.kept is None else [layer.kept[b]],
            )
            for layer in self.layers
        ]
        return Call(self.kind, [self.hop[b]], [self.new[b]], layers, self.start)


@dataclass
class HopClose:
    """One compression at the end of a hop."""

    hop: list[int]
    """[row]: the hop that was closed; -1 for a row that was not."""
    before: list[list[int]]
    """[layer][row]: slots before."""
    after: list[list[int]]
    """[layer][row]: slots after."""
    at_call: int = 0
    """Number of calls in the trace when it happened."""

    def row(self, b: int) -> "HopClose":
        """One row of it alone."""
        before, after = ([[layer[b]] if layer else [] for layer in side] for side in (self.before, self.after))
        return HopClose([self.hop[b]], before, after, self.at_call)


@dataclass
class Trace:
    """Everything one session did."""

    shape: Shape
    calls: list[Call] = field(default_factory=list)
    closes: list[HopClose] = field(default_factory=list)
    replayed: list[dict[str, Any]] = field(default_factory=list)
    """Image positions copied beside a latent: {"hop", "row", "columns"}."""
    full: bool = False
    """Whether `kept` is recorded."""

    @property
    def token_forwards(self) -> int:
        """Positions that entered the model, over all calls and rows: what a step of any kind costs at least."""
        return sum(sum(row) for call in self.calls for row in call.new)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), separators=(",", ":"))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Trace":
        """Raises ConfigError for another schema: convert the file with the version that wrote it."""
        if data.get("schema") != SCHEMA:
            raise ConfigError(f"trace: schema {data.get('schema')!r} given, this version reads {SCHEMA!r}")
        calls = [Call(**{**call, "layers": [LayerCall(**layer) for layer in call["layers"]]}) for call in data["calls"]]
        return cls(
            shape=Shape(**data["shape"]),
            calls=calls,
            closes=[HopClose(**close) for close in data["closes"]],
            replayed=data["replayed"],
            full=data["full"],
        )

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        return cls.from_dict(json.loads(text))
