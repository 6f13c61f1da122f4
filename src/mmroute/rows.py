"""Rows of one layer call: how many positions each batch row brings and sees, and moving them in and out of the stream.

Rows with equal counts run as a rectangle (B, M, D). Otherwise the positions of all rows run as ONE row (1, sum M, D),
and only attention is done row by row: padding never enters a layer.

Legend: B batch, N positions of this call, M kept positions, D hidden.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmroute.select import first_true

if TYPE_CHECKING:
    from mmroute.engine.gated import Gate

__all__ = ["Pick", "Rows", "Ticket", "pick"]


@dataclass
class Rows:
    """What attention needs to know about a layer call; reaches it as a keyword through the stock modules."""

    q: list[int]
    """[row]: new positions."""
    k: list[int]
    """[row]: keys after they are written, the new ones included."""
    packed: bool
    """All rows laid end to end in one."""
    again: bool = False
    """A second pass: `output_attentions` shows first passes only."""
    probe: bool = False
    """Record the attention row of each row's last position."""
    drafts: int = 0
    """Positions at the end of each row that are drafts: the probe is the position before them, which sees none."""
    gate: "Gate | None" = None
    """What queries see in the dense training executor, in place of everything above."""
    last: Tensor | None = None
    """(B,) column of each row's last position, beside `gate`."""
    row: Tensor | None = None
    """Result of the probe: (B, max k) fp32, mean over heads, zeros behind a row's keys."""
    named: tuple[Tensor, Tensor] | None = None
    """Further positions whose attention is wanted: (B, Q) places among what each row brings, (B, G, Q) weights."""
    named_rows: Tensor | None = None
    """Its result: (B, H, G, max k) fp32, averaged by the weights."""

    @property
    def equal(self) -> bool:
        return len(set(self.q)) == 1 and len(set(self.k)) == 1

    @property
    def fresh(self) -> bool:
        """Whether nothing was cached before."""
        return self.q == self.k


@dataclass(eq=False)
class Ticket:
    """Stands in a compiled layer for its rows and for its cache; see `compiled.py`."""

    number: Tensor
    """() int64, on the CPU."""

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What is new goes on to the attention, which writes it."""
        return keys, values


@dataclass
class Pick:
    """The positions of (B, N) that run, in ascending order row by row."""

    shape: tuple[int, int]
    counts: list[int]
    index: Tensor | None
    """None: all of them; (B, M): a rectangle; (sum M,): flat over B * N, packed."""

    @property
    def packed(self) -> bool:
        return self.index is not None and self.index.ndim == 1

    def take(self, x: Tensor) -> Tensor:
        """(B or 1, N, D) -> (B, M, D), or (1, sum M, D) when packed."""
        if self.index is None:
            return x
        B, N = self.shape
        if self.packed:
            return x.expand(B, -1, -1).reshape(B * N, -1).index_select(0, self.index)[None]
        if B == 1:  # cheaper than gather, and the common case
            return x.index_select(1, self.index[0])
        return x.expand(B, -1, -1).gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))

    def put(self, x: Tensor, y: Tensor, in_place: bool = False) -> Tensor:
        """`x` (B, N, D) with the picked positions replaced by `y`; the rest is bit-identical.

        Args:
            in_place: write into `x`, which is then contiguous and nobody else's.
        """
        if self.index is None:
            return y
        B, N = self.shape
        x = x if in_place else x.clone(memory_format=torch.contiguous_format)
        if self.packed:
            x.view(B * N, -1).index_copy_(0, self.index, y[0])
        elif B == 1:
            x.index_copy_(1, self.index[0], y)
        else:
            x.scatter_(1, self.index[..., None].expand(-1, -1, x.shape[-1]), y)
        return x

    def columns(self, position: Tensor) -> Tensor:
        """Logical columns of what runs: (B, M), or (sum M,) when packed."""
        if self.index is None:
            return position
        return position.reshape(-1)[self.index] if self.packed else position.gather(1, self.index)

    def mask(self, device: torch.device) -> Tensor:
        """(B, N) bool."""
        if self.index is None:
            return torch.ones(self.shape, dtype=torch.bool, device=device)
        flat = torch.zeros(self.shape, dtype=torch.bool, device=device)
        if self.packed:
            return flat.view(-1).index_fill(0, self.index, True).view(self.shape)
        return flat.scatter(1, self.index, True)


def pick(mask: Tensor, counts: list[int], rectangle: bool) -> Pick:
    """Index form of a mask whose counts per row are known; no device sync.

    Args:
        mask: (B, N) bool.
        counts: [row]: its True entries.
        rectangle: whether rows may run as a rectangle (equal counts and equal cached lengths).
    """
    B, N = mask.shape
    if rectangle:
        return Pick((B, N), counts, first_true(mask, counts[0]))
    return Pick((B, N), counts, first_true(mask.reshape(-1), sum(counts)))
