"""One routed decoder layer: keep -> gather -> the stock layer -> scatter -> second pass.

A `Step` is the state of ONE forward call. It travels as a keyword through the stock text model to its layers, so the
engine is re-entrant and leaves nothing behind on the model.

Legend: B batch, N positions of this call, M kept positions, D hidden, E head dim.

Source: DARE and Vedas describe routed layers; neither describes an executor.
Deviates: everything here: see docs/method.md.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mmroute.cache import RaggedCache
from mmroute.engine.choice import Choice
from mmroute.engine.train import GrowingCache, grown, key_gate, update_gate
from mmroute.errors import UnsupportedCall
from mmroute.prune.base import Keep, Pruner
from mmroute.ragged import RaggedLayer
from mmroute.rows import Pick, Rows, pick
from mmroute.tokens import Modality
from mmroute.trace import LayerCall

__all__ = ["Step", "routed_forward"]


def routed_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The bound `forward` of an attached decoder layer."""
    step = kwargs.pop("mmroute_step", None)
    if step is None:
        return self._stock_forward(hidden_states, *args, **kwargs)
    if args:
        raise UnsupportedCall("an attached layer takes everything but its hidden states as keywords")
    return step.run(self, hidden_states, **kwargs)


@dataclass
class Step(Choice):
    """One forward call, layer by layer."""

    _stream: Tensor | None = None
    """What the last layer that ran returned."""

    @cached_property
    def plain(self) -> bool:
        """Whether this is a decode step at which the pruner has no say."""
        decides = self.pruner is not None and type(self.pruner).decode is not Pruner.decode
        plain = self.single and not decides and not self.full and not self.watch
        return plain and type(self.cache) is RaggedCache

    @cached_property
    def room(self) -> int:
        """Columns that the session has reserved behind this call."""
        return 0 if self.cache is None else max(0, self.cache.reserved - self.cache.seen - self.tokens.shape[1])

    # ------------------------------------------------------------------ the layer

    def run(
        self,
        layer: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Runs one layer on what it keeps; (B, N, D) in and out."""
        index = layer.self_attn.layer_idx
        h = hidden_states
        rotary = position_embeddings if position_embeddings[0].device == h.device else _to(position_embeddings, h)
        if self.plain:
            return self._decode(layer, index, h, rotary, kwargs)
        if index == 0 and (self.watch or (self.pruner is not None and "embeddings" in self.pruner.needs)):
            self._embedded = h
        keep = self._choose(layer, index, h, rotary)
        if keep is not None and keep.write is not None:
            at, value = keep.write
            h = h.scatter(1, at[..., None].expand(-1, -1, h.shape[-1]), value.to(h.dtype))
        stock = partial(self._stock, layer, index, kwargs)
        if keep is not None and keep.z is not None and self.dense:
            return self._dense(layer, index, h, keep, rotary, stock)
        ran = keep.ran if keep is not None else self.call.new
        counts = keep.counts if keep is not None else self.counts
        stored = None if self.cache is None else self.cache.layers[index]
        before = stored.lengths if stored is not None and stored.n is not None else [0] * len(counts)
        record = self.records[index] = LayerCall(ran=ran, cached=before, stored=before)
        record.extra_flops = self._overhead(index, keep)
        if self.full:
            record.kept, record.scores = self._columns(keep), self._scores(index)
        if sum(counts) == 0:  # nobody wants this layer: no compute, no KV
            if stored is not None and stored.n is None:
                stored.n = [0] * len(counts)
            return (h,) if self.family.tuple_out else h
        chosen = self._pick(keep, counts, before)
        rows = self._plan(stored, chosen, keep, counts)
        rows.probe, rows.drafts = self._probes(index + 1), self.drafts
        rows.named = self._queries(layer, index, h, rotary, chosen)
        out = stock(chosen.take(h), _take(chosen, rotary), rows, self.cache)
        y, rest = (out[0], out[1:]) if self.family.tuple_out else (out, ())
        gate = None if keep is None else update_gate(keep)
        if gate is not None:
            x = chosen.take(h)
            y = x + chosen.take(gate[..., None]).to(y.dtype) * (y - x)
        entered, h = h, chosen.put(h, y.to(h.device), in_place=self._owns(h) and not self._evicts(index))
        record.stored = list(rows.k) if stored is not None else [0] * len(counts)
        if rows.row is not None:
            self._rows[index] = rows.row, self._slot_columns(stored, chosen, rows)
            # One query per row over its keys.
            record.extra_flops += 2 * self.shape.heads * self.shape.head_dim * sum(rows.k)
        if rows.named is not None and rows.named_rows is not None:
            self._named[index] = rows.named_rows, self._slot_columns(stored, chosen, rows)
            (_, Q), G = rows.named[0].shape, rows.named[1].shape[1]
            record.extra_flops += 2 * self.shape.heads * Q * (self.shape.head_dim + G) * sum(rows.k)
        if self._evicts(index):
            self._evict(index, layer, entered, stored, record, rotary)
        if self.deepener is not None and self.deepener.acts(index, self.num_layers) and not self.single:
            h = self._second(index, h, chosen, rotary, stock, record)
        self._stream = h
        return (h, *rest) if self.family.tuple_out else h

    @cached_property
    def _alone(self) -> bool:
        """Whether nobody is told of what enters and leaves the layers, so that nobody may keep it.

        Transformers' own `output_hidden_states` listens through such hooks.
        """
        hooked = (layer._forward_hooks or layer._forward_pre_hooks for layer in self.text.layers)
        everywhere = torch.nn.modules.module
        return not (everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks or any(hooked))

    def _owns(self, h: Tensor) -> bool:
        """Whether a stream is the one that the layer before made in this call, and no longer of use to anybody."""
        return h is self._stream and self._alone and not torch.is_grad_enabled()

    def _decode(self, layer: Any, index: int, h: Tensor, rotary: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> Any:
        """A decode step at which every row runs: nothing to choose, to gather or to scatter."""
        assert self.cache is not None
        stored = self.cache.layers[index]
        before = stored.lengths or [0] * len(self.counts)
        rows = stored.plan(len(self.counts), self.counts, False, self.tokens.position, None, self.room)
        self.records[index] = LayerCall(self.call.new, before, rows.k)
        if self.compiled is not None:
            forward = self.compiled.bind(layer, index, stored, rows)
            return forward(h, attention_mask=None, position_ids=None, position_embeddings=rotary, **kwargs)
        return layer._stock_forward(
            h,
            attention_mask=None,
            position_ids=None,
            position_embeddings=rotary,
            past_key_values=self.cache,
            rows=rows,
            **kwargs,
        )

    def _stock(
        self,
        layer: Any,
        index: int,
        kwargs: dict[str, Any],
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        rows: Rows,
        cache: RaggedCache | None,
    ) -> Any:
        kwargs = {**kwargs, "attention_mask": None, "position_ids": None, "position_embeddings": rotary}
        if self.compiled is not None:
            return self.compiled.bind(layer, index, None if cache is None else cache.layers[index], rows)(x, **kwargs)
        call: Callable[..., Any] = partial(layer._stock_forward, rows=rows, **kwargs)
        if isinstance(cache, GrowingCache):
            pure = partial(grown, call, copy.copy(cache.layers[index]))  # what is stored now, also when run again
            out = layer._gradient_checkpointing_func(pure, x) if index in self.checkpoints else pure(x)
            cache.layers[index].adopt(out[1])
            return out[0]
        call = partial(call, past_key_values=cache)
        # Checkpointing wraps the stock call only: attention runs twice, routing once.
        return layer._gradient_checkpointing_func(call, x) if index in self.checkpoints else call(x)

    # ------------------------------------------------------------------ running

    def _pick(self, keep: Keep | None, counts: list[int], before: list[int]) -> Pick:
        if keep is None or min(counts) == self.tokens.shape[1]:
            return Pick(self.tokens.shape, counts, None)
        rectangle = len(set(counts)) == 1 and (self.cache is None or len(set(before)) == 1)
        key = ("pick", id(keep.mask), rectangle)
        if key not in self.memo:  # layers that keep the same set share its index
            self.memo[key] = keep.mask, pick(keep.mask, counts, rectangle)  # holding the mask keeps its id its own
        return self.memo[key][1]

    def _plan(self, stored: RaggedLayer | None, chosen: Pick, keep: Keep | None, counts: list[int]) -> Rows:
        if stored is None:
            return Rows(counts, counts, chosen.packed)
        score = None
        if keep is not None and keep.logits is not None:
            score = chosen.columns(keep.logits.detach())
        position = chosen.columns(self.tokens.position)
        return stored.plan(self.tokens.shape[0], counts, chosen.packed, position, score, self.room)

    def _dense(self, layer: Any, index: int, h: Tensor, keep: Keep, rotary: tuple[Tensor, Tensor], stock: Any) -> Any:
        nothing = [0] * len(self.counts)
        record = self.records[index] = LayerCall(ran=keep.ran, cached=nothing, stored=nothing)
        record.extra_flops = self._overhead(index, keep)
        rows = Rows(self.counts, self.counts, False, gate=key_gate(keep, self.tokens))
        rows.probe = self._probes(index + 1)
        if rows.probe:
            rows.last = (self.tokens.valid * torch.arange(h.shape[1], device=h.device)).amax(1)
        out = stock(h, rotary, rows, None)
        y = out[0] if self.family.tuple_out else out
        gate = update_gate(keep).masked_fill(~self.tokens.valid, 0)  # type: ignore[union-attr]
        h = h + gate[..., None].to(h.dtype) * (y - h)
        if rows.row is not None:
            self._rows[index] = rows.row, self.tokens.position.masked_fill(~self.tokens.valid, -1)
        if self.full:
            record.kept, record.scores = self._columns(keep), self._scores(index)
        if self.deepener is not None and self.deepener.acts(index, self.num_layers):
            h = self._second(index, h, self._pick(keep, keep.counts, nothing), rotary, stock, record)
        return (h, *out[1:]) if self.family.tuple_out else h

    # ------------------------------------------------------------------ kv_only

    def _evict(
        self,
        index: int,
        layer: Any,
        x: Tensor,
        stored: RaggedLayer | None,
        record: LayerCall,
        rotary: tuple[Tensor, Tensor],
    ) -> None:
        """A `kv_only` layer ran whole on `x`; now it forgets what the pruner does not keep. Older slots stay."""
        assert stored is not None and stored.pos is not None and self.pruner is not None
        keep = self.pruner.keep(x, self.tokens, self._site(layer, index, x, rotary))
        self.aux[index] = keep
        record.extra_flops += self._overhead(index, keep)
        at = stored.pos[:, : max(stored.lengths)].long() - self.call.start
        stays = keep.mask.gather(1, at.clamp(min=0)) | (at < 0)
        stays &= stored.pos[:, : stays.shape[1]] >= 0
        counts = [c + k for c, k in zip(record.cached, keep.counts, strict=True)]
        stored.keep(stays, counts)
        record.stored = counts
        if self.full:
            record.held, record.scores = self._columns(keep), self._scores(index)

    # ------------------------------------------------------------------ second pass

    def _second(
        self, index: int, h: Tensor, chosen: Pick, rotary: tuple[Tensor, Tensor], stock: Any, record: LayerCall
    ) -> Tensor:
        assert self.deepener is not None
        ran = chosen.mask(h.device) if chosen.index is not None else self.tokens.valid
        ran = ran & ~self.tokens.generated  # a decode step has no second pass, so neither has what stands for one
        sizes, latents = self._segments(index)
        for depth in range(1, self.deepener.max_depth + 1):
            again = self.deepener.again(h, self.tokens, ran, sizes, latents, index, depth)
            if again is None or not any(again.counts):
                break
            ran = again.mask
            cache = None if self.cache is None else self.cache.depth[depth - 1]
            stored = None if cache is None else cache.layers[index]
            before = list(stored.lengths) if stored is not None and stored.n is not None else [0] * len(again.counts)
            rectangle = len(set(again.counts)) == 1 and len(set(before)) == 1
            redo = pick(again.mask, again.counts, rectangle)
            if stored is None:
                rows = Rows(again.counts, again.counts, redo.packed)
            else:
                position = redo.columns(self.tokens.position)
                rows = stored.plan(len(before), again.counts, redo.packed, position, None, 0)
            rows.again = True
            x = redo.take(h)
            out = stock(x, _take(redo, rotary), rows, cache)
            y = out[0] if self.family.tuple_out else out
            update = y - x if again.gain is None else redo.take(again.gain.to(h.dtype)) * (y - x)
            h = redo.put(h, x + update)
            record.again = [a + b for a, b in zip(record.again or [0] * len(before), again.counts, strict=True)]
            if self.full:
                passes = zip(record.redone or [[] for _ in before], self._columns(again), strict=True)
                record.redone = [sorted(old + new) for old, new in passes]
            record.again_cached = [a + b for a, b in zip(record.again_cached or [0] * len(before), before, strict=True)]
        return h

    def _segments(self, index: int) -> tuple[list[list[int]], list[list[int]]]:
        """[row][hop of this call]: positions that ran this layer, and how many of them are latents."""
        record = self.records[index]
        hops = sorted({g.hop for g in self.groups[0]})
        if len(hops) == 1 and not any(g.generated for g in self.groups[0]):
            return [[sum(row)] for row in record.ran], [[row[Modality.LATENT]] for row in record.ran]
        sizes, latents = ([[0] * len(hops) for _ in record.ran] for _ in range(2))
        dropped = self.pruner is not None and self.pruner.action == "drop"
        for g in (g for g in self._groups(index + dropped) if not g.generated):
            if not dropped and self._chooses(index):
                counts = self.pruner.counts(g, index, self.num_layers)  # type: ignore[union-attr]
            else:
                counts = [p + w for p, w in zip(g.protected, g.width, strict=True)]
            for b, n in enumerate(counts):
                sizes[b][hops.index(g.hop)] += n
                latents[b][hops.index(g.hop)] += n * (g.modality == Modality.LATENT)
        return sizes, latents


def _take(chosen: Pick, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if chosen.index is None:
        return rotary
    return chosen.take(rotary[0]), chosen.take(rotary[1])


def _to(rotary: tuple[Tensor, Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
    return rotary[0].to(h.device), rotary[1].to(h.device)
