"""The grid of the equality tests: five families x attention backends x batches, on models made once a session."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import families
import pytest
import routing
from torch import Tensor

import mmroute
from mmroute import backbones

__all__ = ["LAYERS", "Case", "grid"]

LAYERS = 5
PADS = {"one": (0,), "three": (0, 0, 0), "padded": (0, 3, 2)}


@cache
def _model(name: str, attn: str, copy: int) -> Any:
    return families.make(name, attn, LAYERS)  # equal seeds, equal weights


@dataclass(frozen=True)
class Case:
    """One cell of the grid: a stock model, its twin that is attached and detached, and a batch."""

    name: str
    attn: str
    rows: str

    @property
    def pads(self) -> tuple[int, ...]:
        return PADS[self.rows]

    @property
    def model(self) -> Any:
        """The stock model; never attached."""
        return _model(self.name, self.attn, 0)

    @property
    def family(self) -> backbones.Family:
        return backbones.of(self.model)

    @property
    def prompt(self) -> dict[str, Tensor]:
        return families.make_inputs(self.name, self.model, len(self.pads), list(self.pads))

    def story(self, observations: int = 1, tail: int = 4) -> routing.Story:
        return routing.tell(self.name, self.model, self.family, self.pads, observations, tail)

    @contextmanager
    def attached(self, prune: Any = None, deepen: Any = None, **options: Any) -> Iterator[Any]:
        """An attached model with the stock one's weights; detached whatever happens."""
        model = _model(self.name, self.attn, 1)
        if hasattr(model.model, "rope_deltas"):
            model.model.rope_deltas = self.model.model.rope_deltas = None
        with mmroute.attach(model, prune=prune, deepen=deepen, **options) as routed:
            yield routed


def grid(
    names: Sequence[str] = families.NAMES,
    attn: Sequence[str] = ("sdpa", "eager"),
    rows: Sequence[str] = ("one", "three", "padded"),
) -> pytest.MarkDecorator:
    """Parametrises a test over `case`."""
    cells = [Case(n, a, r) for n in names for a in attn for r in rows]
    # What a cell shares with its neighbours is run once by default, all of it by `make test-all`: some families have
    # another's text model; rows of equal length go as one row does; and eager differs by the mask it is given, of which
    # padding needs the most.
    rare = [
        c.attn != attn[0] or c.rows != rows[-1]
        if c.name in families.TWINS
        else c.name != "qwen2_5_vl" and (c.rows == "three" != rows[-1] or (c.attn != attn[0] and c.rows != rows[-1]))
        for c in cells
    ]
    marked = [pytest.param(c, marks=[pytest.mark.slow] * slow) for c, slow in zip(cells, rare, strict=True)]
    return pytest.mark.parametrize("case", marked, ids=[f"{c.name}-{c.attn}-{c.rows}" for c in cells])
