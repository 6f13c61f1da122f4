"""One layer of the routed KV cache: buffers that grow in blocks, a length per row, the position of every slot.

Invariants: slots [0, n_b) of a row are valid and ascending in position; free slots hold zeros (a masked NaN would still
poison softmax times V).

Legend: B batch, K key-value heads, C slots of one layer, E head dim, M new positions.

Source: none; the papers describe no cache.
Deviates: DARE asks for no cache entry at pruned layers; how lengths, order and positions are kept is ours.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from mmroute.errors import UnsupportedCall
from mmroute.rows import Rows

__all__ = ["RaggedLayer"]

BLOCK = 64
_FEW = 64
"""Positions a row up to which writing them by index is faster than a copy for each row (CPU, 4 to 64 rows)."""


class _Plan(NamedTuple):
    rows: Rows
    start: list[int]
    position: Tensor
    score: Tensor | None
    room: int


class RaggedLayer(DynamicLayer):
    """One layer: block-grown buffers, a length per row, the position of every slot."""

    is_croppable = False
    # Tensors from the first update on, None before; typed loosely so that no line has to say so again.
    keys: Any
    values: Any
    pos: Any
    score: Any
    is_initialized: bool

    def __init__(self) -> None:
        super().__init__()
        self.n: list[int] | None = None
        self.pos = None
        self.score = None
        self._plan: _Plan | None = None

    @property
    def lengths(self) -> list[int]:
        """[row]: valid slots."""
        return self.n or []

    def plan(
        self, batch: int, counts: list[int], packed: bool, position: Tensor, score: Tensor | None, room: int
    ) -> Rows:
        """Says what the next `update` writes, and returns the rows attention needs.

        Args:
            counts: [row]: new positions.
            position: their logical columns, (B, M) or (sum M,) when packed.
            score: stored beside them, same shape, or None.
            room: slots to allocate beyond the need when the buffer grows.
        """
        if self.n is None:
            self.n = [0] * batch
        if len(self.n) != batch:
            raise UnsupportedCall(f"this cache holds {len(self.n)} rows, the call brings {batch}; use its own batch")
        rows = Rows(counts, [n + c for n, c in zip(self.n, counts, strict=True)], packed)
        self._plan = _Plan(rows, self.n, position, score, room)
        return rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the planned positions in place and returns views of the used part, (B, K, max n, E)."""
        if self._plan is None:
            raise UnsupportedCall(
                "a routed cache was written by a stock call; run the attached model, or use a DynamicCache with "
                "routed.off()"
            )
        plan, self._plan = self._plan, None
        rows, start = plan.rows, plan.start
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        B, most = len(rows.q), max(rows.k)
        if self.keys is None or most > self.keys.shape[2] or plan.score is not None:
            self._grow(key_states, rows.k, plan.room, plan.score is not None)
        keys, values, pos = self.keys, self.values, self.pos
        if not rows.packed and start.count(start[0]) == B:
            first, width = start[0], rows.q[0]
            keys.narrow(2, first, width).copy_(key_states)
            values.narrow(2, first, width).copy_(value_states)
            pos.narrow(1, first, width).copy_(plan.position)
            if self.score is not None:
                self.score[:, first : first + width] = float("inf") if plan.score is None else plan.score
        elif key_states.requires_grad or sum(rows.q) <= _FEW * B:
            self._write_by_index(key_states, value_states, plan)
        else:
            self._write_by_row(key_states, value_states, plan)
        self.n = rows.k
        return keys.narrow(2, 0, most), values.narrow(2, 0, most)

    def _write_by_index(self, key_states: Tensor, value_states: Tensor, plan: _Plan) -> None:
        """Rows of unequal lengths, all at once: one node of a graph, and fast where each brings little."""
        counts, start = torch.tensor(plan.rows.q), torch.tensor(plan.start)
        row = torch.repeat_interleave(counts)
        slot = torch.arange(len(row)) - (counts.cumsum(0) - counts - start)[row]
        row, slot = row.to(self.pos.device), slot.to(self.pos.device)
        self.keys[row, :, slot] = key_states.transpose(1, 2).flatten(0, 1)
        self.values[row, :, slot] = value_states.transpose(1, 2).flatten(0, 1)
        self.pos[row, slot] = plan.position.flatten().to(self.pos.dtype)
        if self.score is not None:
            self.score[row, slot] = torch.inf if plan.score is None else plan.score.flatten().to(self.score.dtype)

    def _write_by_row(self, key_states: Tensor, value_states: Tensor, plan: _Plan) -> None:
        """The same, a plain copy a row: fast where each brings much."""
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (key_states, value_states))
        position, score = plan.position.flatten(), None if plan.score is None else plan.score.flatten()
        at = 0
        for b, width in enumerate(plan.rows.q):
            here, to = slice(at, at + width), slice(plan.start[b], plan.rows.k[b])
            self.keys[b, :, to], self.values[b, :, to] = keys[here].transpose(0, 1), values[here].transpose(0, 1)
            self.pos[b, to] = position[here]
            if self.score is not None:
                self.score[b, to] = torch.inf if score is None else score[here]
            at += width

    def _grow(self, like: Tensor, lengths: list[int], room: int, scored: bool) -> None:
        batch, need = len(lengths), max(lengths)
        have = 0 if self.keys is None else self.keys.shape[2]
        if need > have:
            more = room if have == 0 or room else (have // 8 if like.is_cuda else BLOCK)
            size = -(-(need + more) // BLOCK) * BLOCK
            _, K, _, E = like.shape

            def grown(old: Tensor | None) -> Tensor:
                if old is None:
                    new = like.new_empty(batch, K, size, E)
                    new[:, :, min(lengths) :] = 0  # the slots before it are about to be written
                else:
                    new = like.new_zeros(batch, K, size, E)
                    new[:, :, :have] = old
                return new

            self.keys, self.values = grown(self.keys), grown(self.values)
            pos = torch.full((batch, size), -1, dtype=torch.int32, device=like.device)
            if self.pos is not None:
                pos[:, :have] = self.pos
            self.pos = pos
        if scored or self.score is not None:
            score = self.score
            if score is None or score.shape[1] < self.pos.shape[1]:
                # What was stored without a score ranks first: it was kept without being asked.
                self.score = torch.full(self.pos.shape, float("inf"), dtype=torch.float16, device=like.device)
                if score is not None:
                    self.score[:, : score.shape[1]] = score

    def keep(self, mask: Tensor, counts: list[int]) -> None:
        """Physical compaction: of each row only the slots of `mask` (B, >= max n) stay, in order.

        Args:
            counts: [row]: its True entries.
        """
        most = max(counts)
        index = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        beyond = torch.arange(most, device=mask.device) >= torch.tensor(counts, device=mask.device)[:, None]
        size = max(-(-most // BLOCK) * BLOCK, BLOCK)
        slots = index[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])

        def moved(old: Tensor) -> Tensor:
            new = old.new_zeros(old.shape[0], old.shape[1], size, old.shape[3])
            new[:, :, :most] = old.gather(2, slots).masked_fill(beyond[:, None, :, None], 0)
            return new

        self.keys, self.values = moved(self.keys), moved(self.values)
        pos = torch.full((self.pos.shape[0], size), -1, dtype=self.pos.dtype, device=self.pos.device)
        pos[:, :most] = self.pos.gather(1, index).masked_fill(beyond, -1)
        self.pos = pos
        if self.score is not None:
            score = torch.full(pos.shape, float("inf"), dtype=self.score.dtype, device=self.score.device)
            score[:, :most] = self.score.gather(1, index).masked_fill(beyond, float("inf"))
            self.score = score
        self.n = list(counts)

    def before(self, column: int) -> Tensor:
        """(B,) slots that stand before a logical column."""
        return ((self.pos >= 0) & (self.pos < column)).sum(1)

    def shorten(self, lengths: list[int]) -> None:
        """Forgets the slots of each row behind its new length."""
        first, last = min(lengths), max(self.lengths)
        if first < last:  # slots stand in order of position, so those to forget are the last ones
            slot = torch.arange(first, last, device=self.pos.device)
            gone = slot >= torch.tensor(lengths, device=self.pos.device)[:, None]
            self.keys[:, :, first:last].masked_fill_(gone[:, None, :, None], 0)
            self.values[:, :, first:last].masked_fill_(gone[:, None, :, None], 0)
            self.pos[:, first:last].masked_fill_(gone, -1)
        self.n, self._plan = list(lengths), None

    def get_seq_length(self) -> int:
        return max(self.n) if self.n else 0

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]

    def _rows(self, index: Tensor, lengths: list[int]) -> None:
        self.n = lengths
        if self.keys is not None:
            self.keys, self.values = self.keys.index_select(0, index), self.values.index_select(0, index)
            self.pos = self.pos.index_select(0, index)
            self.score = None if self.score is None else self.score.index_select(0, index)
