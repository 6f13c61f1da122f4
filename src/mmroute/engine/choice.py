"""What one forward call brings, which of it each layer keeps, and what a pruner may look at to decide.

Legend: B batch, N positions of this call, S key slots, D hidden, H query heads, K key-value heads, E head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmroute.backbones.base import Family
from mmroute.backbones.tower import Look as Seen
from mmroute.cache import RaggedCache, Watched
from mmroute.deepen.base import Again, Deepener
from mmroute.engine.compiled import Compiled
from mmroute.errors import UnsupportedCall
from mmroute.probe import by_column
from mmroute.prune.base import Keep, Look, Pruner, Site
from mmroute.ragged import RaggedLayer
from mmroute.rows import Pick, Rows
from mmroute.select import Group, first_true, group_positions, narrow
from mmroute.tokens import NUM_MODALITIES, Modality, Tokens
from mmroute.trace import Call, LayerCall, Shape

__all__ = ["Choice", "build_groups"]


@dataclass
class Choice:
    """One forward call, and what each layer of it keeps.

    Everything that is not a tensor is known in Python before the first layer runs.
    """

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
    ids: Tensor | None = None
    """(B, N) token ids of the call, where ids entered."""
    single: bool = False
    """A decode step: one valid position per row."""
    drafts: int = 0
    """Positions at the end of each row that assisted decoding guessed."""
    watch: bool = False
    """Record every layer's attention row and the embeddings, for latent reasoning."""
    compiled: Compiled | None = None
    """The stock layers as compiled graphs, where they are to be run so."""
    deep: Tensor | None = None
    """(T, B, N, D): what the vision tower adds behind the first T layers, where somebody watches or says so."""
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
    seen: Seen | None = None
    """What the vision tower looked at in this call, for pruners that need it."""
    _asked: dict[int, int] = field(default_factory=dict)
    """By layer: FLOPs of the queries and keys that the pruner had computed."""

    @property
    def num_layers(self) -> int:
        return self.shape.layers

    @property
    def padded(self) -> bool:
        return any(n != self.tokens.shape[1] for n in self.counts)

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

    def _evicts(self, index: int) -> bool:
        if self.pruner is None or self.pruner.action != "kv_only" or self.single or self.cache is None:
            return False
        return self.pruner.acts(index, self.num_layers) and any(
            self.pruner.counts(g, index, self.num_layers) != g.size for g in self.groups[0]
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
            "tower": self._look,
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

    def watched(self) -> Watched:
        """What a call that is over saw."""
        assert self._embedded is not None
        columns = self.call.start + self.tokens.shape[1]
        row = torch.zeros(self.tokens.shape[0], columns, device=self._embedded.device)
        for found, at in self._rows.values():
            row = row + by_column(found, at, 0, columns).to(row.device)
        return Watched(self._embedded, row / self.num_layers, self.deep)

    def _probes(self, reader: int) -> bool:
        """Whether the attention row of the layer before `reader` is read, there or by who watches."""
        if self.watch:
            return True
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

    def _look(self) -> Look:
        """The tower's rows at the vision columns of this call."""
        if "tower" not in self.memo:
            count = sum(row[Modality.VISION] for row in self.call.new)
            if self.seen is None or len(self.seen.score) != count:
                raise UnsupportedCall(
                    "this pruner ranks by the vision tower, and no picture of this call went through it; pass "
                    "pixel_values, not embeddings"
                )
            vision = ((self.tokens.modality == Modality.VISION) & self.tokens.valid).to(self.seen.score.device)
            score, keys = self.seen.score, self.seen.keys
            self.memo["tower"] = Look(
                score.new_zeros(vision.shape).masked_scatter(vision, score),
                keys.new_zeros(*vision.shape, keys.shape[-1]).masked_scatter(vision[..., None], keys),
                self.seen.flops,
            )
        return self.memo["tower"]

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

    # ------------------------------------------------------------------ what a full trace holds; reads the device

    def _columns(self, chosen: Keep | Again | None) -> list[list[int]]:
        mask = self.tokens.valid if chosen is None else chosen.mask
        return [c[m].tolist() for c, m in zip(self.tokens.position, mask, strict=True)]

    def _scores(self, index: int) -> list[list[float | None]] | None:
        """By row and valid position: what this layer ranked it by; None where it did not compete."""
        keep = self.aux.get(index)
        score = None if keep is None else keep.logits if keep.ranked is None else keep.ranked
        if score is None:
            return None
        competed = torch.zeros_like(self.tokens.valid)
        for group in self._groups(index):
            for b, width in enumerate(group.width):
                competed[b, group.free[b, :width]] = True
        competed &= score.isfinite()
        return [
            [float(f"{s:.4g}") if c else None for s, c in zip(row[v].tolist(), among[v].tolist(), strict=True)]
            for row, among, v in zip(score.detach().float(), competed, self.tokens.valid, strict=True)
        ]


def build_groups(tokens: Tokens, hops: int, first_hop: int) -> tuple[list[Group], list[list[int]]]:
    """Groups of a call and its valid positions per (row, modality)."""
    groups, _ = group_positions(tokens, hops, first_hop)
    new = [[0] * NUM_MODALITIES for _ in range(tokens.shape[0])]
    for g in groups:
        for b, n in enumerate(g.size):
            new[b][Modality(g.modality)] += n
    return groups, new
