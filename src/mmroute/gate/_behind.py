"""Positions put behind what a draft has read, to rate by and to be forgotten.

Legend: B rows, N columns of the cache, n positions put behind them, D hidden.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmroute import backbones

__all__ = ["behind"]


def behind(
    model: Any,
    cache: Any,
    mask: Int[Tensor, "B N"],
    after: Int[Tensor, " B"],
    axes: int,
    *,
    ids: Int[Tensor, "B n"] | None = None,
    embeds: Float[Tensor, "B n D"] | None = None,
    real: Int[Tensor, "B n"] | None = None,
    is_routed: bool = False,
) -> Float[Tensor, "B n D"]:
    """States of positions that are entered behind a cache; it holds n columns more afterwards.

    Args:
        model: whose cache it is.
        cache: what the model has read.
        mask: 1 where a column of it is real.
        after: the place behind each row's last one.
        axes: numbers that make a place.
        ids: what is entered, or
        embeds: the same as embeddings.
        real: 1 where it is no padding; None is everywhere.
        is_routed: the model is attached; what is entered runs every layer, is never ranked and stores no score.
    """
    given: dict[str, Any] = {"input_ids": ids} if embeds is None else {"inputs_embeds": embeds}
    B, n = (embeds if ids is None else ids).shape[:2]  # type: ignore[union-attr]
    positions = after[:, None] + torch.arange(n, device=mask.device)
    if is_routed:
        given |= {"modality": torch.zeros(B, n, dtype=torch.long, device=mask.device), "route": False}  # text
    out = backbones.of(model).base_model(model)(
        **given,
        attention_mask=torch.cat([mask, mask.new_ones(B, n) if real is None else real], 1),
        position_ids=positions.expand(3, -1, -1) if axes == 3 else positions,
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state
