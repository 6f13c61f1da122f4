"""One routed decoder layer: keep -> gather -> the stock layer -> scatter -> second pass.

A `Step` is the state of ONE forward call. It travels as a keyword through the stock text model to its layers, so the
engine is re-entrant and leaves nothing behind on the model.

Legend: B batch, N positions of this call, M kept positions, D hidden, E head dim.

Source: DARE and Vedas describe routed layers; neither describes an executor.
Deviates: everything here: see docs/method.md.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from mmroute.backbones.base import Family
from mmroute.cache import RaggedCache, RaggedLayer
from mmroute.deepen.base import Deepener
from mmroute.engine.rows import Pick, Rows, pick
from mmroute.engine.select import Group, first_true, group_positions, narrow
from mmroute.engine.train import GrowingCache, dense_bias, grown, update_gate
from mmroute.errors import UnsupportedCall
from mmroute.probe import by_column
from mmroute.prune.base import Keep, Pruner, Site
from mmroute.tokens import NUM_MODALITIES, Modality, Tokens
from mmroute.trace import Call, LayerCall, Shape

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
class Step:
    """One forward call. Everything that is not a tensor is known in Python before the first layer runs."""

    family: Family
    text: Any
    shape: Shape
    tokens: Tokens
    cache: RaggedCache | None
    pruner: Pruner | None
    deepener: Deepener | None
    call: Call
    counts: list[int]
    """[row]: valid positions."""
    groups: dict[int, list[Group]] = field(default_factory=dict)
    """By layer: who may still compete there. Layer l writes l + 1 under `drop`, so a recomputed layer sees the same."""
    relevance: Tensor | None = None
    checkpoints: frozenset[int] = frozenset()
    """Layers whose stock call is recomputed in the backward pass."""
    dense: bool = False
    """The dense training executor: every position runs, gates decide what counts."""
    full: bool = False
    """Record which positions ran, not only how many."""
    single: bool = False
    """A decode step: one valid position per row."""
    drafts: int = 0
    """Positions at the end of each row that assisted decoding guessed."""
    before: tuple[Tensor | None, Tensor | None] = (None, None)
    """The cache's `in_hop` and `last_hop` before the call, to be put back if it fails."""
    aux: dict[int, Keep] = field(default_factory=dict)
    memo: dict[Any, Any] = field(default_factory=dict)
    records: dict[int, LayerCall] = field(default_factory=dict)
    _rows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By layer: the probed attention row and the logical columns of its slots."""
    _named: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The same for the positions that the pruner named."""
    _embedded: Tensor | None = None
    _asked: dict[int, int] = field(default_factory=dict)
    """By layer: FLOPs of the queries and keys that the pruner had computed."""

    @property
    def num_layers(self) -> int:
        return self.shape.layers

    @cached_property
    def plain(self) -> bool:
        """Whether this is a decode step at which the pruner has no say."""
        decides = self.pruner is not None and type(self.pruner).decode is not Pruner.decode
        return self.single and not decides and not self.full and type(self.cache) is RaggedCache

    @cached_property
    def room(self) -> int:
        """Columns that the session has reserved behind this call."""
        return 0 if self.cache is None else max(0, self.cache.reserved - self.cache.seen - self.tokens.shape[1])

    @property
    def padded(self) -> bool:
        return any(n != self.tokens.shape[1] for n in self.counts)

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
        if index == 0 and self.pruner is not None and "embeddings" in self.pruner.needs:
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
            record.kept = self._columns(keep)
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
        entered, h = h, chosen.put(h, y.to(h.device))
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
        return (h, *rest) if self.family.tuple_out else h

    def _decode(self, layer: Any, index: int, h: Tensor, rotary: tuple[Tensor, Tensor], kwargs: dict[str, Any]) -> Any:
        """A decode step at which every row runs: nothing to choose, to gather or to scatter."""
        assert self.cache is not None
        stored = self.cache.layers[index]
        before = stored.lengths or [0] * len(self.counts)
        rows = stored.plan(len(self.counts), self.counts, False, self.tokens.position, None, self.room)
        self.records[index] = LayerCall(self.call.new, before, rows.k)
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
        call: Callable[..., Any] = partial(
            layer._stock_forward,
            attention_mask=None,
            position_ids=None,
            position_embeddings=rotary,
            rows=rows,
            **kwargs,
        )
        if isinstance(cache, GrowingCache):
            pure = partial(grown, call, copy.copy(cache.layers[index]))  # what is stored now, also when run again
            out = layer._gradient_checkpointing_func(pure, x) if index in self.checkpoints else pure(x)
            cache.layers[index].adopt(out[1])
            return out[0]
        call = partial(call, past_key_values=cache)
        # Checkpointing wraps the stock call only: attention runs twice, routing once.
        return layer._gradient_checkpointing_func(call, x) if index in self.checkpoints else call(x)

    # ------------------------------------------------------------------ choosing

    def _chooses(self, index: int) -> bool:
        """Whether the pruner has anything to decide before this layer runs."""
        if self.pruner is None or self.single or self.pruner.action == "kv_only":
            return False
        if not self.pruner.acts(index, self.num_layers):
            return False
        if "scores_kept" in self.pruner.needs:  # every slot needs its score, also where nobody is left out
            return True
        return any(
            self.pruner.counts(g, index, self.num_layers) != [p + w for p, w in zip(g.protected, g.width, strict=True)]
            for g in self._groups(index)
        )

    def _groups(self, index: int) -> list[Group]:
        if index not in self.groups:  # under `drop` the layer before wrote it, unless it dropped nothing
            nearest = max(i for i in self.groups if i <= index)
            return self.groups[nearest] if self.pruner is not None and self.pruner.action == "drop" else self.groups[0]
        return self.groups[index]

    def _choose(self, layer: Any, index: int, h: Tensor, rotary: tuple[Tensor, Tensor]) -> Keep | None:
        """None: every valid position runs."""
        if self.single:
            if self.pruner is None or type(self.pruner).decode is Pruner.decode:
                return None
            keep = self.pruner.decode(h, self.tokens, self._site(layer, index, h, rotary))
            if keep is not None:
                self.aux[index] = keep
            return keep
        if self._chooses(index):
            keep = self.pruner.keep(h, self.tokens, self._site(layer, index, h, rotary))  # type: ignore[union-attr]
            self.aux[index] = keep
            if self.pruner.action == "drop":  # type: ignore[union-attr]
                self._survive(index, keep)
            return keep
        if self.pruner is not None and self.pruner.action == "drop" and self._groups(index) is not self.groups[0]:
            return self._survivors(index, h.device)
        return self._valid() if self.padded else None

    def _valid(self) -> Keep:
        return Keep(self.tokens.valid, self.call.new)

    def _survive(self, index: int, keep: Keep) -> None:
        """Under `drop` those who ran are the only candidates of the next layer."""
        nxt = []
        for g in self._groups(index):
            rivals = [o for o in self._groups(index) if o is not g and o.modality == g.modality]
            if any(any(o.width) for o in rivals):
                counts = self.pruner.counts(g, index, self.num_layers)  # type: ignore[union-attr]
            else:  # what the pruner says it took, also if it counts in its own way
                counts = [r[g.modality] - sum(o.protected[b] for o in rivals) for b, r in enumerate(keep.ran)]
            free = [c - p for c, p in zip(counts, g.protected, strict=True)]
            nxt.append(narrow(g, keep.mask.float(), free))
        self.groups[index + 1] = nxt

    def _survivors(self, index: int, device: torch.device) -> Keep:
        """What a `drop` layer runs when it decides nothing new; the mask is made once per set."""
        groups = self._groups(index)
        key = ("survivors", id(groups))
        if key not in self.memo:
            B, N = self.tokens.shape
            mask = torch.zeros(B, N + 1, dtype=torch.bool, device=device)
            mask[:, :N] = (self.tokens.protected | self.tokens.generated) & self.tokens.valid
            ran = [[0] * NUM_MODALITIES for _ in range(B)]
            for g in groups:
                columns = g.free
                if columns.shape[1] and min(g.width) < columns.shape[1]:
                    width = torch.tensor(g.width, device=device)[:, None]
                    columns = columns.masked_fill(torch.arange(columns.shape[1], device=device) >= width, N)
                mask.scatter_(1, columns, True)
                for b in range(B):
                    ran[b][g.modality] += g.protected[b] + g.width[b]
            # In dense training the gate of the layer that dropped them goes on gating.
            z = self.aux[max(self.aux)].z if self.dense else None
            self.memo[key] = groups, Keep(mask[:, :N], ran, z=z)  # holds `groups`, so its id stays its own
        return self.memo[key][1]

    def _site(self, layer: Any, index: int, h: Tensor, rotary: tuple[Tensor, Tensor]) -> Site:
        needs = self.pruner.needs  # type: ignore[union-attr]
        sources: dict[str, Callable[..., Any]] = {
            "embeddings": lambda: self._embedded,
            "normed": lambda x: self.family.normed(layer, x),
            "final_normed": lambda x: self.text.norm(x),
            "qk": lambda x: self._qk(layer, index, x, rotary),
            "keys": self._keys,
            "row": lambda: self._row(index - 1),
            "rows": lambda: self._averages(index if self.pruner.action == "kv_only" else index - 1),  # type: ignore[union-attr]
            "relevance": self._relevance,
        }
        return Site(
            layer=index,
            num_layers=self.num_layers,
            training=self.text.training,
            groups=self._groups(index) if self.groups else [],
            memo=self.memo,
            shape=self.shape,
            _sources={name: source for name, source in sources.items() if name in needs},
        )

    def _overhead(self, index: int, keep: Keep | None) -> int:
        if keep is None or index not in self.aux:
            return 0
        new = sum(self.counts)
        extra = self.pruner.overhead(index, self.shape, new)  # type: ignore[union-attr]
        return extra + keep.extra_flops + self._asked.pop(index, 0)

    # ------------------------------------------------------------------ what a pruner may look at

    def _probes(self, reader: int) -> bool:
        """Whether layer `reader` will read the attention row of the layer before it."""
        if self.pruner is None or "row" not in self.pruner.needs or reader >= self.num_layers or self.single:
            return False
        return self._chooses(reader) if self.pruner.action != "kv_only" else self._evicts(reader)

    def _qk(self, layer: Any, index: int, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        s = self.shape
        self._asked[index] = 2 * s.hidden * s.head_dim * (s.heads + s.kv_heads) * x.shape[0] * x.shape[1]
        return self.family.qk(layer, x, *rotary)

    def _queries(
        self, layer: Any, index: int, h: Tensor, rotary: tuple[Tensor, Tensor], chosen: Pick
    ) -> tuple[Tensor, Tensor] | None:
        """The named queries of this layer, by place among what each row brings, and their weights."""
        if self.pruner is None or "rows" not in self.pruner.needs or self.single:
            return None
        forgets = self.pruner.action == "kv_only"
        if not (self._evicts(index) if forgets else index + 1 < self.num_layers and self._chooses(index + 1)):
            return None
        named = self.pruner.queries(self.tokens, self._site(layer, index, h, rotary))
        if named is None or chosen.index is None:
            return named
        columns, weights = named
        place = chosen.mask(h.device).long().cumsum(1) - 1
        return place.gather(1, columns).clamp(min=0), weights

    def _averages(self, index: int) -> Tensor:
        if index not in self._named:
            raise UnsupportedCall(f"no attention of layer {index} was named: `queries` must name some there")
        rows, columns = self._named[index]
        B, H, G, S = rows.shape
        flat, at = rows.reshape(B * H * G, S), columns.repeat_interleave(H * G, dim=0)
        return by_column(flat, at, self.call.start, self.tokens.shape[1]).view(B, H, G, -1)

    def _slot_columns(self, stored: RaggedLayer | None, chosen: Pick, rows: Rows) -> Tensor:
        if stored is not None:
            return stored.pos[:, : max(rows.k)]
        most = max(rows.k)
        position, mask = self.tokens.position, chosen.mask(self.tokens.position.device)
        columns = position.gather(1, first_true(mask, most))
        beyond = torch.arange(most, device=columns.device) >= torch.tensor(rows.k, device=columns.device)[:, None]
        return columns.masked_fill(beyond, -1)

    def _row(self, index: int) -> Tensor:
        if index not in self._rows:
            raise UnsupportedCall(
                f"no attention row before layer {index + 1}: a pruner that needs one cannot choose at layer 0; "
                "set its first layer to 1 or more"
            )
        row, columns = self._rows[index]
        return by_column(row, columns, self.call.start, self.tokens.shape[1])

    def _relevance(self) -> Tensor:
        if self.relevance is None:
            raise UnsupportedCall(
                "this pruner knows which positions matter only where the caller says so: pass relevance=(B, N), "
                "or use it on generated tasks through `mmroute eval`"
            )
        return self.relevance.float()

    def _keys(self, index: int) -> Tensor:
        """(B, N, K, E): cached keys by column of this call; zeros where nothing was stored."""
        if self.cache is None or self.cache.layers[index].pos is None:
            raise UnsupportedCall(f"the keys of layer {index} are not cached; call with use_cache=True")
        stored = self.cache.layers[index]
        most = max(stored.lengths)
        B, N = self.tokens.shape
        at = stored.pos[:, :most].long() - self.call.start
        at = at.masked_fill((at < 0) | (at >= N), N)
        keys = stored.keys[:, :, :most].transpose(1, 2)
        out = keys.new_zeros(B, N + 1, *keys.shape[2:])
        return out.scatter(1, at[..., None, None].expand_as(keys), keys)[:, :N]

    def _columns(self, keep: Keep | None) -> list[list[int]]:
        mask = self.tokens.valid if keep is None else keep.mask
        return [c[m].tolist() for c, m in zip(self.tokens.position, mask, strict=True)]

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
        rows = Rows(self.counts, self.counts, False, bias=dense_bias(keep, self.tokens, h.dtype))
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
            record.kept = self._columns(keep)
        if self.deepener is not None and self.deepener.acts(index, self.num_layers):
            h = self._second(index, h, self._pick(keep, keep.counts, nothing), rotary, stock, record)
        return (h, *out[1:]) if self.family.tuple_out else h

    # ------------------------------------------------------------------ kv_only

    def _evicts(self, index: int) -> bool:
        if self.pruner is None or self.pruner.action != "kv_only" or self.single or self.cache is None:
            return False
        return self.pruner.acts(index, self.num_layers) and any(
            self.pruner.counts(g, index, self.num_layers) != g.size for g in self.groups[0]
        )

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

    # ------------------------------------------------------------------ second pass

    def _second(
        self, index: int, h: Tensor, chosen: Pick, rotary: tuple[Tensor, Tensor], stock: Any, record: LayerCall
    ) -> Tensor:
        assert self.deepener is not None
        ran = chosen.mask(h.device) if chosen.index is not None else self.tokens.valid
        ran = ran & ~self.tokens.generated  # a decode step has no second pass, so neither has what stands for one
        sizes = self._segments(index)
        for depth in range(1, self.deepener.max_depth + 1):
            again = self.deepener.again(h, self.tokens, ran, sizes, index, depth)
            if again is None or not any(again.counts):
                break
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
            record.again_cached = [a + b for a, b in zip(record.again_cached or [0] * len(before), before, strict=True)]
        return h

    def _segments(self, index: int) -> list[list[int]]:
        """[row][hop of this call]: positions that ran this layer."""
        record = self.records[index]
        hops = sorted({g.hop for g in self.groups[0]})
        if len(hops) == 1 and not any(g.generated for g in self.groups[0]):
            return [[sum(row)] for row in record.ran]
        sizes = [[0] * len(hops) for _ in record.ran]
        dropped = self.pruner is not None and self.pruner.action == "drop"
        for g in (g for g in self._groups(index + dropped) if not g.generated):
            if not dropped and self._chooses(index):
                counts = self.pruner.counts(g, index, self.num_layers)  # type: ignore[union-attr]
            else:
                counts = [p + w for p, w in zip(g.protected, g.width, strict=True)]
            for b, n in enumerate(counts):
                sizes[b][hops.index(g.hop)] += n
        return sizes


def _take(chosen: Pick, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if chosen.index is None:
        return rotary
    return chosen.take(rotary[0]), chosen.take(rotary[1])


def _to(rotary: tuple[Tensor, Tensor], h: Tensor) -> tuple[Tensor, Tensor]:
    return rotary[0].to(h.device), rotary[1].to(h.device)


def build_groups(tokens: Tokens, hops: int, first_hop: int) -> tuple[list[Group], list[list[int]]]:
    """Groups of a call and its valid positions per (row, modality)."""
    groups, _ = group_positions(tokens, hops, first_hop)
    new = [[0] * NUM_MODALITIES for _ in range(tokens.shape[0])]
    for g in groups:
        for b, n in enumerate(g.size):
            new[b][Modality(g.modality)] += n
    return groups, new
