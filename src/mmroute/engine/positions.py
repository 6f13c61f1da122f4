"""What the positions of one call are: who is padding, which hop each belongs to, who is protected from pruning.

A hop may go on over several calls: the cache remembers how far its last one has come, and describing a call moves that
on.

Legend: B batch, N positions of this call.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from mmroute.cache import Chunk, RaggedCache
from mmroute.errors import UnsupportedCall
from mmroute.tokens import MAX_HOPS, Tokens

__all__ = ["describe", "describe_next", "merged", "place_in_hop"]


def merged(first: Chunk, second: Chunk) -> Chunk:
    """What the driver said, completed by what the ids say."""
    fields = ("modality", "hop", "valid", "protected", "generated", "relevance")
    chunk = Chunk(*(getattr(first, f) if getattr(first, f) is not None else getattr(second, f) for f in fields))
    chunk.watch, chunk.deep = first.watch, first.deep
    return chunk


def describe(
    chunk: Chunk,
    mask: Tensor | None,
    cache: RaggedCache | None,
    start: int,
    single: bool,
    prefix_tokens: int,
    device: torch.device,
) -> Tokens:
    """What a call brings.

    Args:
        chunk: what is known of it; `modality` (B, N) is.
        mask: (B, M) padding mask of the session so far, M >= N, 1 at what is real; None is all real.
        cache: of the session; its `in_hop` and `last_hop` go on with this call.
        start: logical column of the first position.
        single: a decode step: one valid position per row, written by the model.
        prefix_tokens: positions at the start of each hop that are protected.
        device: of what comes back.

    Raises:
        UnsupportedCall: the mask has fewer columns than the call.
    """
    assert chunk.modality is not None
    modality = chunk.modality.to(device)
    B, N = modality.shape
    if chunk.valid is not None:
        valid = chunk.valid.bool().to(device)
    elif mask is None or single:
        valid = torch.ones(B, N, dtype=torch.bool, device=device)
    else:
        valid = mask[:, -N:].bool().to(device)
        if valid.shape[1] != N:
            raise UnsupportedCall(f"attention_mask has {mask.shape[1]} columns, the call brings {N} positions")
    hop_now = cache.hop if cache is not None else 0
    hop = torch.full_like(modality, hop_now) if chunk.hop is None else chunk.hop.long().to(device)
    generated = torch.full_like(valid, single) if chunk.generated is None else chunk.generated.bool().to(device)
    many = chunk.hop is not None and not single
    protected = valid & (place_in_hop(valid, hop, cache, many) <= prefix_tokens)
    if not single:
        protected |= _last_given(valid & ~generated, hop if many else None)
    if chunk.protected is not None:
        protected |= chunk.protected.bool().to(device) & valid
    position = torch.arange(start, start + N, device=device).expand(B, N)
    return Tokens(modality, hop, valid, protected, generated, position)


def describe_next(chunk: Chunk, cache: RaggedCache, prefix_tokens: int, device: torch.device) -> Tokens:
    """The same for one written position per row that goes on with the hop of the one before it: `describe`, but short.

    Args:
        chunk: `modality` (B, 1); names no hop.
        cache: that has entered something before.
        prefix_tokens: as in `describe`.
        device: of what comes back.
    """
    assert chunk.modality is not None and cache.in_hop is not None and cache.last_hop is not None
    B = chunk.modality.shape[0]
    cache.in_hop = cache.in_hop + 1
    protected = (cache.in_hop <= prefix_tokens)[:, None]
    if chunk.protected is not None:
        protected |= chunk.protected.bool().to(device)
    here = torch.ones(B, 1, dtype=torch.bool, device=device)
    position = torch.full((B, 1), cache.seen, device=device)
    return Tokens(chunk.modality.to(device), cache.last_hop[:, None], here, protected, here, position)


def place_in_hop(valid: Tensor, hop: Tensor, cache: RaggedCache | None, many: bool) -> Tensor:
    """(B, N) int64: the place of each valid position in its hop, from 1, earlier calls included.

    Args:
        valid: (B, N) bool.
        hop: (B, N).
        cache: whose `in_hop` and `last_hop` it reads and moves on.
        many: whether rows may hold several hops.
    """
    if many:
        place = _counted(valid, hop)[0]
    else:
        place = valid.long().cumsum(1) if valid.shape[1] > 1 else valid.long()
    if cache is not None:
        if cache.in_hop is not None and cache.last_hop is not None:
            place = place + cache.in_hop[:, None] * (hop == cache.last_hop[:, None])
        cache.in_hop, cache.last_hop = place[:, -1], hop[:, -1]
    return place


def _last_given(given: Tensor, hop: Tensor | None) -> Tensor:
    """(B, N) bool: the last given position of each row, or with `hop` (B, N) of each of its hops."""
    if hop is None:
        nth = given.long().cumsum(1)
        return given & (nth == nth[:, -1:])
    nth, total = _counted(given, hop)
    return given & (nth == total)


def _counted(of: Tensor, hop: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) each: how many of `of` (B, N) its hop has up to and with a position, and how many in this call."""
    here = hop.clamp(max=MAX_HOPS - 1)[..., None]
    nth = (one_hot(here.squeeze(2), MAX_HOPS) * of[..., None]).cumsum(1)
    total = nth[:, -1:].expand_as(nth)
    return nth.gather(2, here).squeeze(2), total.gather(2, here).squeeze(2)
