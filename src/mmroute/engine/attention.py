"""Row-wise causal attention from row lengths, on top of whatever backend the model was loaded with.

Inside a row the cached slots are in ascending position and everything new comes after everything cached, so lengths say
it all and no mask is built from positions. Each accepted backend gets its own registered twin, `mmroute_<backend>`,
in both of Transformers' registries: an attention name without a mask function would run with no mask at all.

| rows | sdpa in half precision on CUDA | sdpa elsewhere, eager | flash_attention_2, _3 |
|---|---|---|---|
| none: not routed | the backend itself | the same | the same |
| equal, nothing cached, or one position each | one call, no mask | the same (CPU: `triangle.py`), masked | one call |
| one position each, unequal keys | one call, lengths as a mask | the same | the same |
| packed | one call by lengths (`varlen.py`) | row by row, masked if keys are cached | one call by lengths |
| chunks behind cached keys | one call by lengths | one masked call | one call |
| the dense executor's gates | one masked call (`gated.py`) | the same | the same: flash takes no such mask |

Legend: B batch, Q new positions (in `named_rows` the named ones of them), G averages, S key slots, H query heads,
K key-value heads, E head dim.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmroute.engine import gated, triangle, varlen
from mmroute.errors import UnsupportedCall
from mmroute.rows import Rows, Ticket

__all__ = ["BACKENDS", "last_row", "named_rows", "register"]

BACKENDS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
"""Backends that read causality from `None`, or whose mask is additive; others ran and were silently wrong."""


def register(base: str) -> str:
    """The name under which `base` with rows is registered.

    Raises:
        UnsupportedCall: a backend that would run unmasked or mis-masked.
    """
    if base not in BACKENDS:
        raise UnsupportedCall(
            f"attention backend {base!r} would run without the routed mask; allowed: {', '.join(BACKENDS)}; "
            "load the model with attn_implementation='sdpa'"
        )
    name = f"mmroute_{base}"
    if name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        AttentionInterface.register(name, functools.partial(_attend, base))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _function(base: str, module: nn.Module) -> Callable[..., Any]:
    if base == "eager":  # every family keeps its own, beside its attention class
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def _attend(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    rows: Rows | Ticket | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered function: (B, H, Q, E) queries, (B, K, S, E) keys -> (B, Q, H, E)."""
    if isinstance(rows, Ticket):
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return torch.ops.mmroute.rows_attention(query, key, value, rows.number, scale), None
    if rows is not None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        if rows.probe:
            rows.row = last_row(query, key, rows, scale)
        if rows.named is not None:
            rows.named_rows = named_rows(query, key, rows, scale)
        if rows.gate is not None:
            if kwargs.get("dropout"):
                raise UnsupportedCall("gates have no attention dropout; set attention_dropout=0 in the model's config")
            return gated.attend(query, key, value, rows.gate, scale), None
    flash = base.startswith("flash")
    seen = _Behind(module, config=_Behind(module.config, _attn_implementation=base)) if flash else module
    call = functools.partial(_function(base, module), seen, scaling=scaling, **kwargs)
    if rows is None:
        return call(query, key, value, attention_mask)
    if base == "sdpa" and varlen.serves(query, key, rows, kwargs):
        return varlen.attend(query, key, value, rows, scaling), None
    # It reads a mask as left padding of the queries too, and rows of a cache are filled from the left.
    if flash and (rows.packed or (query.shape[2] > 1 and len(set(rows.k)) > 1)):
        return _flash_by_lengths(call, varlen.pack(query, key, value, rows), query.shape), None

    def rectangle(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], fresh: bool) -> tuple[Tensor, Tensor | None]:
        """Rows that bring as many positions each."""
        if base == "sdpa" and triangle.serves(q, fresh, kwargs):
            return triangle.attend(q, k, v, scaling), None
        return call(q, k, v, _mask(base, q, k, lengths, fresh))

    if not rows.packed:
        out, weights = rectangle(query, key, value, rows.k, rows.fresh)
        return out, None if rows.again else weights
    shared = key.shape[0] == 1 and len(rows.q) > 1  # no cache: the keys are packed as the queries are
    # Split, not sliced: the backward pass of a slice fills a gradient of the whole tensor, once for each row.
    cut = functools.partial(torch.split, split_size_or_sections=rows.q, dim=2)
    keys, values = (cut(key), cut(value)) if shared else (key.split(1), value.split(1))
    parts = [
        rectangle(q, k[:, :, :length], v[:, :, :length], [length], width == length)[0]
        for q, k, v, width, length in zip(cut(query), keys, values, rows.q, rows.k, strict=True)
        if width
    ]
    return torch.cat(parts, dim=1), None  # packed rows have no common map


class _Behind:
    """An object with some attributes changed, for the reader: flash loads its kernels by the backend's name that the
    module's configuration holds, and would look for ours on the Hub."""

    def __init__(self, object_: Any, **changed: Any) -> None:
        self.__dict__.update(changed, _object=object_)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._object, name)


def _flash_by_lengths(call: Callable[..., Any], p: varlen.Packed, shape: torch.Size) -> Tensor:
    """One call of a flash backend for rows of unequal length: (B, Q, H, E), or (1, T, H, E) when packed."""
    q, k, v = (x.transpose(0, 1)[None] for x in (p.query, p.key, p.value))
    lengths = {"cu_seq_lens_q": p.ends_q, "cu_seq_lens_k": p.ends_k}
    out = call(q, k, v, None, **lengths, max_length_q=p.most_q, max_length_k=p.most_k)[0]
    return out.reshape(shape[0], shape[2], shape[1], shape[3])


def _mask(base: str, query: Tensor, key: Tensor, lengths: list[int], fresh: bool) -> Tensor | None:
    """Lower-right causal mask over each row's first `lengths` keys; None where the backend needs none."""
    Q, S = query.shape[2], key.shape[2]
    equal = lengths.count(lengths[0]) == len(lengths)
    # Footgun: SDPA's own causal flag is top-left aligned, so it serves only when nothing was cached.
    if equal and (Q == 1 or (base != "eager" and (fresh or base.startswith("flash")))):
        return None
    length = torch.tensor(lengths[:1] if equal else lengths, device=query.device)
    last = length[:, None] - Q + torch.arange(Q, device=query.device)
    visible = (torch.arange(S, device=query.device) <= last[..., None])[:, None]
    if base == "eager":  # adds its mask: a bool one would be added as 0 and 1
        return torch.zeros_like(visible, dtype=query.dtype).masked_fill_(~visible, torch.finfo(query.dtype).min)
    if base.startswith("flash"):
        return (torch.arange(S, device=query.device) < length[:, None]).to(torch.int32)
    return visible


def last_row(query: Tensor, key: Tensor, rows: Rows, scaling: float) -> Tensor:
    """Attention of each row's last position, mean over heads, without a map and without repeating keys.

    Returns:
        (B, max k) fp32, aligned with the row's keys; zeros behind them, and for a row that brought nothing.
    """
    B, S = len(rows.q), max(rows.k)
    if rows.gate is not None:
        return _last_row_gated(query, key, rows, scaling)
    if rows.packed:
        ends = torch.tensor(rows.q, device=query.device).cumsum(0) - 1
        last = query[0].index_select(1, (ends - rows.drafts).clamp(min=0)).transpose(0, 1)
        key = _keys_by_row(key, rows)
    else:
        last = query[:, :, -1 - rows.drafts]
    K = key.shape[1]
    grouped = last.float().reshape(B, K, -1, last.shape[-1])
    scores = torch.einsum("bgre,bgse->bgrs", grouped, key[:, :, :S].float()) * scaling
    length = torch.tensor(rows.k, device=query.device) - rows.drafts
    behind = torch.arange(S, device=query.device) >= length[:, None]
    row = scores.masked_fill(behind[:, None, None], float("-inf")).softmax(-1).flatten(1, 2).mean(1)
    empty = torch.tensor([q == 0 for q in rows.q], device=query.device)
    return row.masked_fill(behind | empty[:, None], 0.0)


def named_rows(query: Tensor, key: Tensor, rows: Rows, scaling: float) -> Tensor:
    """Attention of the positions in `rows.named`, a block of queries at a time; see `Rows.named_rows`."""
    assert rows.named is not None
    places, weights = rows.named
    B, S = len(rows.q), max(rows.k)
    H, K, E = query.shape[1], key.shape[1], query.shape[3]
    new = torch.tensor(rows.q, device=query.device)
    if rows.packed:
        starts = new.cumsum(0) - new
        key = _keys_by_row(key, rows)
        at = (starts[:, None] + places).clamp(max=query.shape[2] - 1)
        asked = query[0][:, at].transpose(0, 1)
    else:
        asked = query.gather(2, places[:, None, :, None].expand(-1, H, -1, E))
    sees = torch.tensor(rows.k, device=query.device)[:, None] - new[:, None] + places
    grouped, slot = asked.float().reshape(B, K, H // K, -1, E), torch.arange(S, device=query.device)
    keys, out = key[:, :, :S].float(), query.new_zeros(B, H, weights.shape[1], S, dtype=torch.float32)
    for start in range(0, places.shape[1], 64):
        block = slice(start, start + 64)
        scores = torch.einsum("bgrqe,bgse->bgrqs", grouped[:, :, :, block], keys) * scaling
        behind = slot > sees[:, block, None]
        share = scores.masked_fill(behind[:, None, None], float("-inf")).softmax(-1).flatten(1, 2)
        out += torch.einsum("bwq,bhqs->bhws", weights[:, :, block].float(), share)
    return out


def _keys_by_row(key: Tensor, rows: Rows) -> Tensor:
    """(B, K, >= max k, E): the keys of packed rows, one row each; those of a cache are so already."""
    if key.shape[0] == len(rows.q):
        return key
    new = torch.tensor(rows.q, device=key.device)
    slot = torch.arange(max(rows.k), device=key.device)
    slots = ((new.cumsum(0) - new)[:, None] + slot).clamp(max=key.shape[2] - 1)
    return key[0][:, slots].transpose(0, 1)


def _last_row_gated(query: Tensor, key: Tensor, rows: Rows, scaling: float) -> Tensor:
    """`last_row` where every column runs and gates say what counts: (B, N) fp32."""
    assert rows.gate is not None and rows.last is not None
    B, K = key.shape[:2]
    last = query.transpose(1, 2)[torch.arange(B, device=query.device), rows.last]
    grouped = last.float().reshape(B, K, -1, query.shape[-1])
    scores = torch.einsum("bgre,bgse->bgrs", grouped, key.float()) * scaling
    seen = rows.gate.open()[torch.arange(B, device=query.device), rows.last]
    return scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).flatten(1, 2).mean(1)
