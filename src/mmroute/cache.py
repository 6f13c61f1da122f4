"""The routed KV cache: every layer and row has its own length, and the whole reports the logical one.

Invariants: those of its layers (`ragged.py`); `seen` counts logical columns, padding included, and advances only after
a whole forward.

Legend: B batch, N positions of one call, K key-value heads, E head dim, D hidden, T layers that the
vision tower adds to.

Source: none; the papers describe no cache.
Deviates: DARE asks for no cache entry at pruned layers; how lengths, order and positions are kept is ours.
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from mmroute.errors import ConfigError, UnsupportedCall
from mmroute.prune.base import Pruner, Slots
from mmroute.ragged import RaggedLayer
from mmroute.tokens import NUM_MODALITIES, Tokens
from mmroute.trace import HopClose, Shape, Trace

__all__ = ["Chunk", "RaggedCache", "Watched"]

_META = ("modality", "hop", "protected", "generated", "valid")


@dataclass
class Chunk:
    """What the next forward call brings, for calls whose ids do not say (embeddings, latents, replay).

    Consumed by that call. Tensors are (B, N).
    """

    modality: Tensor | None = None
    hop: Tensor | None = None
    """Default: the cache's current hop of each row."""
    valid: Tensor | None = None
    protected: Tensor | None = None
    generated: Tensor | None = None
    relevance: Tensor | None = None
    deep: Tensor | None = None
    """(T, B, N, D): of embeddings that stand for image tokens, what the vision tower adds behind the first T layers;
    0 at others. For families whose tower does (Qwen3-VL)."""
    watch: bool = False
    """Leave what the call saw in `RaggedCache.watched`."""


class Watched(NamedTuple):
    """What a call saw that latent reasoning goes on from."""

    entered: Tensor
    """(B, N, D): the embeddings that entered the first layer, images in place."""
    row: Tensor
    """(B, seen) fp32: attention of each row's last position on every logical column, mean over layers and heads;
    0 where a layer does not hold a column."""
    deep: Tensor | None = None
    """(T, B, N, D): what the vision tower added behind the first T layers; None where it adds nothing."""


class RaggedCache(Cache):
    """What `generate()` and sessions hold; made by the attached model."""

    layer_class: type[RaggedLayer] = RaggedLayer

    def __init__(self, num_layers: int, shape: Shape, max_depth: int = 0) -> None:
        super().__init__(layers=[self.layer_class() for _ in range(num_layers)])
        self.trace = Trace(shape)
        self.seen = 0
        """Logical columns entered so far, padding included."""
        self.hop = 0
        """Current hop of the session; `Chunk.hop` overrides it per position."""
        self.in_hop: Tensor | None = None
        """(B,) valid positions that the hop of each row's last column has so far; rank of the next ones."""
        self.last_hop: Tensor | None = None
        """(B,) that hop."""
        self.next: Chunk | None = None
        self.watched: Watched | None = None
        """Of the last call that asked for it."""
        self.drafts_from: int | None = None
        """Logical column behind which several positions in one call are drafts of assisted decoding: they all run."""
        self.reserved = 0
        self._compacted_at = 0
        self._meta: Tensor | None = None
        self._chunks: list[Tokens] = []
        self.depth = [type(self)(num_layers, shape) for _ in range(max_depth)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    @property
    def batch_size(self) -> int:
        return next((len(layer.n) for layer in self.layers if layer.n is not None), -1)

    def reserve(self, columns: int) -> None:
        """Logical columns the session will reach; buffers then grow once."""
        self.reserved = max(self.reserved, columns)

    def lengths(self) -> list[list[int]]:
        """[layer][row]: valid slots."""
        return [list(layer.lengths) for layer in self.layers]

    def live_bytes(self) -> int:
        """Bytes of the valid keys and values, second-pass caches included."""
        own = 0
        for layer in self.layers:
            if layer.keys is not None:
                _, K, _, E = layer.keys.shape
                own += sum(layer.lengths) * 2 * K * E * layer.keys.element_size()
        return own + sum(cache.live_bytes() for cache in self.depth)

    def allocated_bytes(self) -> int:
        """Bytes of the buffers behind them, free slots included; metadata is apart."""
        tensors = [t for layer in self.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors) + sum(c.allocated_bytes() for c in self.depth)

    def slots(self, layer: int) -> Slots:
        """What one layer holds; empty rectangles where it holds nothing."""
        stored = self.layers[layer]
        most = max(stored.lengths)
        pos = stored.pos[:, :most].long()
        valid = pos >= 0
        modality, hop, protected, generated, _ = (self.meta[name].gather(1, pos.clamp(min=0)).long() for name in _META)
        score = None if stored.score is None else stored.score[:, :most].float()
        entered = self.meta["valid"].bool()
        seen = torch.stack([(entered & (self.meta["modality"] == m)).sum(1) for m in range(NUM_MODALITIES)], dim=1)
        return Slots(
            score, modality, hop, protected.bool() & valid, generated.bool() & valid, pos, valid, seen.to(pos.device)
        )

    def start_hop(self, hop: int) -> None:
        """The next positions belong to another hop."""
        if hop < 0:
            raise ConfigError(f"a hop is counted from 0, given {hop}")
        self.hop, self.in_hop, self.last_hop = hop, None, None

    def close_hop(self, pruner: Pruner, closing: list[int] | None = None) -> None:
        """Compresses what a finished hop left in every layer; evicted slots never return. One device read in all.

        Args:
            pruner: its `close` says which slots stay; protected ones always do.
            closing: [row]: the hop that has ended, -1 for none; default the current hop in every row.
        """
        B = self.batch_size
        if B < 0:
            raise UnsupportedCall("the cache is empty; close a hop after the calls that wrote it")
        ended = closing if closing is not None else [self.hop] * B
        if len(ended) != B:
            raise ConfigError(f"closing has {len(ended)} rows, the cache {B}; give one hop per row, -1 for none")
        stays: dict[int, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if layer.n is not None and any(layer.n):
                slots = self.slots(i)
                rows = torch.tensor(ended, device=slots.position.device)
                mask = pruner.close(slots, rows, i) | slots.protected | (rows < 0)[:, None]
                stays[i] = mask & slots.valid
        self._compact(stays, ended)

    def forget_rows(self, rows: list[bool], column: int, ended: list[int]) -> None:
        """Takes what stands at or behind a logical column out of some rows, as if it had never entered them.

        Args:
            rows: [row]: whether it forgets; the columns stay, as padding.
            column: where.
            ended: [row]: as `close_hop` notes it in the trace.
        """
        gone: Tensor | None = None
        for cache in (self, *self.depth):
            stays: dict[int, Tensor] = {}
            for i, layer in enumerate(cache.layers):
                if layer.n is not None and any(layer.n):
                    pos = layer.pos[:, : max(layer.n)]
                    gone = torch.tensor(rows, device=pos.device)
                    stays[i] = (pos >= 0) & ~((pos >= column) & gone[:, None])
            cache._compact(stays, ended)
        meta = self.meta
        if meta and gone is not None:
            meta["valid"][gone.to(meta["valid"].device), column:] = 0  # a view: what was forgotten counts no more
        if self.in_hop is not None and gone is not None:
            self.in_hop = self.in_hop.masked_fill(gone.to(self.in_hop.device), 0)

    def trim(self, pruner: Pruner) -> None:
        """Cuts layers that hold more of a row than the pruner's `cap` down to it. One device read if there are any."""
        assert pruner.cap is not None
        over = [i for i, layer in enumerate(self.layers) if layer.n and max(layer.n) > pruner.cap]
        stays = {}
        for i in over:
            slots = self.slots(i)
            few = (slots.valid.sum(1) <= pruner.cap)[:, None]
            stays[i] = (pruner.trim(slots, i) | few) & slots.valid
        if stays:
            self._compact(stays, [-1] * self.batch_size)

    def _compact(self, stays: dict[int, Tensor], ended: list[int]) -> None:
        before = self.lengths()
        if stays:
            device = next(iter(stays.values())).device
            counts = torch.stack([mask.sum(1).to(device) for mask in stays.values()]).tolist()
            for (i, mask), kept in zip(stays.items(), counts, strict=True):
                if kept != self.layers[i].lengths:
                    self.layers[i].keep(mask, kept)
                    self._compacted_at = self.seen
        held = None
        if self.trace.full:
            filled = [layer.pos for layer in self.layers]
            held = [[] if pos is None else [row[row >= 0].tolist() for row in pos] for pos in filled]
        self.trace.closes.append(HopClose(ended, before, self.lengths(), len(self.trace.calls), held))

    def remember(self, tokens: Tokens) -> None:
        """Appends what the columns of one call are; laid together only when somebody asks."""
        self._chunks.append(tokens)

    @property
    def meta(self) -> dict[str, Tensor]:
        """(B, seen) int8 each: modality, hop, protected, generated, valid of every logical column."""
        if self._chunks:
            parts = [torch.stack([getattr(tokens, name) for name in _META]) for tokens in self._chunks]
            parts = [part.clamp(max=127).to(torch.int8) for part in parts]
            whole = torch.cat(parts if self._meta is None else [self._meta, *parts], dim=2)
            self._meta, self._chunks = whole, []
        return {} if self._meta is None else dict(zip(_META, self._meta, strict=True))

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -n logical columns.

        Raises:
            UnsupportedCall: n > 0, or columns from before a compression would have to come back.
        """
        if tokens_to_remove > 0:
            raise UnsupportedCall(f"crop takes minus the number of columns to remove, given {tokens_to_remove}")
        if tokens_to_remove == 0:
            return
        column = self.seen + tokens_to_remove
        if column < 0:
            raise UnsupportedCall(f"crop by {tokens_to_remove}: the cache holds {self.seen} columns")
        if column < self._compacted_at:
            raise UnsupportedCall(
                f"crop to column {column}: a hop was compressed at column {self._compacted_at} and what it evicted "
                "cannot come back; fork() the cache before closing the hop"
            )
        meta = self.meta
        if meta:
            self._meta = self._meta[:, :, :column]  # type: ignore[index]
        if self.last_hop is not None:
            self.in_hop = ((self.meta["hop"] == self.last_hop[:, None]) & self.meta["valid"].bool()).sum(1)
        for cache in (self, *self.depth):
            cache.seen = column
            cache.forget_from(column)

    def forget_from(self, column: int) -> None:
        """Takes out of every layer what stands at or behind a logical column, exact also where layers stored fewer."""
        filled = [layer for layer in self.layers if layer.pos is not None]
        if filled:
            lengths = torch.stack([layer.before(column).to(filled[0].pos.device) for layer in filled]).tolist()
            for layer, n in zip(filled, lengths, strict=True):
                layer.shorten(n)

    def fork(self) -> "RaggedCache":
        """An independent copy: two continuations of one prompt."""
        return copy.deepcopy(self)

    def reset(self) -> None:
        self.__init__(len(self.layers), self.trace.shape, len(self.depth))  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx, beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._rows(indices, indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.batch_size > 0:
            index = torch.arange(self.batch_size).repeat_interleave(repeats)
            self._rows(index, index.tolist())

    def _rows(self, index: Tensor, rows: list[int]) -> None:
        for layer in self.layers:
            if layer.n is not None:
                device = index.device if layer.keys is None else layer.keys.device
                layer._rows(index.to(device), [layer.n[i] for i in rows])
        if self.meta:
            self._meta = self._meta.index_select(1, index.to(self._meta.device))  # type: ignore[union-attr]
        for name in ("in_hop", "last_hop"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.index_select(0, index.to(value.device)))
        for cache in self.depth:
            cache._rows(index, rows)
