"""What happened: per forward call and layer what ran, what was cached, what ran again. Plain data, JSON both ways.

All counts are per batch row; nothing here is a tensor. Costs are computed from a Trace in closed form (`cost.py`).
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmroute.errors import ConfigError, InputError

__all__ = ["READABLE", "SCHEMA", "Call", "HopClose", "LayerCall", "Picture", "Shape", "Story", "Trace"]

SCHEMA = "trace/2"
READABLE = ("trace/1", SCHEMA)
"""trace/1 has no story, no scores, and of the index sets only `LayerCall.kept`."""

Columns = list[list[int]]
"""[row]: logical columns, ascending."""


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
    kept: Columns | None = None
    """[row]: logical columns that ran; only with a full trace, like what follows."""
    held: Columns | None = None
    """[row]: of those, whose keys stayed; None where that is all of them (another answer is `kv_only`'s)."""
    redone: Columns | None = None
    """[row]: logical columns of the second pass, once for each further depth; None where there is none."""
    scores: list[list[float | None]] | None = None
    """[row][valid position of the call]: what it was ranked by, larger stays; None where it did not compete."""

    def moved(self, column: Callable[[int], int]) -> "LayerCall":
        """The same with every logical column renamed."""
        kept, held, redone = (
            None if rows is None else [[column(c) for c in row] for row in rows]
            for rows in (self.kept, self.held, self.redone)
        )
        return dataclasses.replace(self, kept=kept, held=held, redone=redone)


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
    modality: list[list[int]] | None = None
    """[row][valid position]: `Modality` value; only with a full trace."""
    ids: list[list[int]] | None = None
    """[row][valid position]: token id; only with a full trace, and where ids entered rather than embeddings."""

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
                kept=_only(layer.kept, b),
                held=_only(layer.held, b),
                redone=_only(layer.redone, b),
                scores=_only(layer.scores, b),
            )
            for layer in self.layers
        ]
        return Call(
            self.kind,
            [self.hop[b]],
            [self.new[b]],
            layers,
            self.start,
            modality=_only(self.modality, b),
            ids=_only(self.ids, b),
        )

    def moved(self, column: Callable[[int], int]) -> "Call":
        """The same with every logical column renamed."""
        layers = [layer.moved(column) for layer in self.layers]
        return dataclasses.replace(self, layers=layers, start=column(self.start))


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
    held: list[Columns] | None = None
    """[layer][row]: logical columns whose keys stayed; only with a full trace."""

    def row(self, b: int) -> "HopClose":
        """One row of it alone."""
        before, after = ([[layer[b]] if layer else [] for layer in side] for side in (self.before, self.after))
        held = None if self.held is None else [[layer[b]] if layer else [] for layer in self.held]
        return HopClose([self.hop[b]], before, after, self.at_call, held)

    def moved(self, column: Callable[[int], int]) -> "HopClose":
        """The same with every logical column renamed."""
        if self.held is None:
            return self
        return dataclasses.replace(self, held=[[[column(c) for c in row] for row in layer] for layer in self.held])


@dataclass
class Picture:
    """An image of the story, as the model saw it."""

    png: str
    """PNG file in base64."""
    grid: tuple[int, int]
    """Rows and columns of its vision positions."""
    start: int
    """Logical column of the first of them; the others follow row by row."""


@dataclass
class Story:
    """What was asked and written: what a reader needs beside the counts."""

    question: str
    text: str
    """The answer."""
    hops: list[str]
    """Its text hop by hop."""
    words: list[str]
    """Text of each logical column; empty where a column holds no word."""
    pictures: list[Picture] = field(default_factory=list)
    title: str = ""
    model: str = ""
    recipe: str = ""
    gold: str = ""
    """The right answer, where it is known."""
    relevant: list[list[int]] = field(default_factory=list)
    """[hop]: vision positions of the first picture that ground truth says must be seen; empty where unknown."""


@dataclass
class Trace:
    """Everything one session did."""

    shape: Shape
    calls: list[Call] = field(default_factory=list)
    closes: list[HopClose] = field(default_factory=list)
    replayed: list[dict[str, Any]] = field(default_factory=list)
    """Image positions copied beside a latent: {"hop", "row", "columns"}."""
    full: bool = False
    """Whether index sets are recorded (`kept` and its like), not only counts."""
    story: Story | None = None
    """Words and pictures, where somebody told them (`mmroute.page.story`)."""

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
        """Reads this version's traces and those of older ones.

        Raises:
            ConfigError: a schema that is neither.
        """
        if data.get("schema") not in READABLE:
            raise ConfigError(
                f"trace: schema {data.get('schema')!r} given, this version reads {' and '.join(READABLE)}; "
                "convert the file with the version that wrote it"
            )
        story = data.get("story")
        calls = [Call(**{**call, "layers": [LayerCall(**layer) for layer in call["layers"]]}) for call in data["calls"]]
        return cls(
            shape=Shape(**data["shape"]),
            calls=calls,
            closes=[HopClose(**close) for close in data["closes"]],
            replayed=data["replayed"],
            full=data["full"],
            story=None if story is None else _story(story),
        )

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        return cls.from_dict(json.loads(text))

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """The trace of a file.

        Raises:
            InputError: no such file, or it holds no trace.
            ConfigError: one of a schema that this version does not read.
        """
        if not path.is_file():
            raise InputError(f"{path}: no such file; `mmroute ask ... --trace {path.name}` writes one")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"{path}: not a trace: {error}") from None


def _story(data: dict[str, Any]) -> Story:
    pictures = [Picture(p["png"], (p["grid"][0], p["grid"][1]), p["start"]) for p in data["pictures"]]
    return Story(**{**data, "pictures": pictures})


def _only(rows: list[Any] | None, b: int) -> list[Any] | None:
    return None if rows is None else [rows[b]]
