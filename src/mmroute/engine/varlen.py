"""Rows of unequal length in one kernel call: flash attention's variable-length form.

Its causal mask is aligned to the lower right in every row, which is what a chunk behind cached keys needs: no mask is
built, and no key is repeated for grouped heads. Where it cannot run, rows run one by one (`attention.py`).

Legend: B batch, T new positions of all rows, S keys of all rows, H query heads, K key-value heads, E head dim.

Source: none; the papers describe no executor.
Deviates: torch's own kernel is used for inference in half precision on CUDA only, and only after it has given the
    right answer once: its arguments have changed with every release of torch so far.
"""

import functools
import inspect
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmroute.rows import Rows

__all__ = ["Packed", "attend", "kernel", "pack", "reference", "serves"]

log = logging.getLogger(__name__)

Kernel = Callable[..., Tensor]


@dataclass
class Packed:
    """Rows laid end to end, as variable-length kernels take them."""

    query: Tensor
    """(T, H, E)."""
    key: Tensor
    """(S, K, E)."""
    value: Tensor
    ends_q: Tensor
    """(B + 1,) int32: where each row's queries end, after a leading 0."""
    ends_k: Tensor
    most_q: int
    most_k: int


def pack(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Packed:
    """Queries (B, H, Q, E), or (1, H, T, E) when packed, and keys (B, K, C, E), or (1, K, T, E) without a cache."""
    shared = rows.packed and key.shape[0] == 1 and len(rows.q) > 1
    return Packed(
        query=query.transpose(1, 2).flatten(0, 1),
        key=key[0].transpose(0, 1) if shared else _joined(key, rows.k),
        value=value[0].transpose(0, 1) if shared else _joined(value, rows.k),
        ends_q=_ends(rows.q, query.device),
        ends_k=_ends(rows.k, query.device),
        most_q=max(rows.q),
        most_k=max(rows.k),
    )


def _joined(stored: Tensor, lengths: list[int]) -> Tensor:
    parts = [stored[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _ends(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def serves(query: Tensor, key: Tensor, rows: Rows, options: dict[str, Any]) -> bool:
    """Whether torch's own kernel takes this call.

    It does for packed rows and for chunks behind cached keys, both of which would otherwise need a loop or a mask; in
    half precision, on a CUDA device that allows flash kernels, where no gradient is asked and nothing is dropped out.
    """
    needed = rows.packed or (query.shape[2] > 1 and not rows.fresh)
    if not (needed and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)):
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        return False
    if options.get("dropout") or not torch.backends.cuda.flash_sdp_enabled():
        return False
    _, H, _, E = query.shape
    return E % 8 == 0 and E <= 256 and _proven(query.device, query.dtype, H, key.shape[1], E)


def attend(query: Tensor, key: Tensor, value: Tensor, rows: Rows, scaling: float | None) -> Tensor:
    """Attention of all rows in one call of torch's kernel: (B, Q, H, E), or (1, T, H, E) when packed."""
    run = kernel()
    assert run is not None
    out = run(pack(query, key, value, rows), scaling)
    return out.unflatten(0, (query.shape[0], query.shape[2]))


@functools.cache
def kernel() -> Kernel | None:
    """Torch's variable-length attention with a causal mask, whatever this release calls its arguments; None without."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if "scale" not in known or not {"window_size", "is_causal"} & set(known):
        return None
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}

    def run(p: Packed, scaling: float | None) -> Tensor:
        out = varlen_attn(
            p.query, p.key, p.value, p.ends_q, p.ends_k, p.most_q, p.most_k, scale=scaling, **causal, **grouped
        )
        assert isinstance(out, Tensor)
        return out

    return run


def reference(p: Packed, scaling: float | None) -> Tensor:
    """What a kernel must compute, row by row with a mask in float32: (T, H, E)."""
    parts, ends_q, ends_k = [], p.ends_q.tolist(), p.ends_k.tolist()
    for b in range(len(ends_q) - 1):
        q, k, v = (
            x[start:end].transpose(0, 1).float()
            for x, start, end in (
                (p.query, ends_q[b], ends_q[b + 1]),
                (p.key, ends_k[b], ends_k[b + 1]),
                (p.value, ends_k[b], ends_k[b + 1]),
            )
        )
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
        sees = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril(k.shape[1] - q.shape[1])
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        weights = ((q @ k.transpose(1, 2)) * scale).masked_fill(~sees, float("-inf")).softmax(-1)
        parts.append((weights @ v).transpose(0, 1))
    return torch.cat(parts).to(p.query.dtype)


@functools.cache
def _proven(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the kernel gives the reference's answer for such heads on this device; asked once."""
    run = kernel()
    if run is None:
        log.info("this torch has no variable-length attention; rows of unequal length run one by one")
        return False
    rows = Rows([5, 1, 3, 0], [5, 7, 6, 2], packed=True)
    generator = torch.Generator().manual_seed(0)

    def made(rows_: int, heads_: int, length: int) -> Tensor:
        return torch.randn(rows_, heads_, length, head_dim, generator=generator).to(device, dtype)

    query = made(1, heads, sum(rows.q))
    key, value = made(4, kv_heads, 7), made(4, kv_heads, 7)
    packed = pack(query, key, value, rows)
    try:
        out = run(packed, None)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        log.warning("torch's variable-length attention does not run here (%s); rows run one by one", error)
        return False
    # Sums of a handful of values of about 1 in half precision: a wrong mask is off by tenths, rounding by hundredths.
    if not torch.allclose(out.float(), reference(packed, None).float(), rtol=0, atol=5e-2):
        log.warning("torch's variable-length attention gives a wrong answer here; rows run one by one")
        return False
    return True
