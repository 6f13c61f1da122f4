"""What a model says behind given words: one pass over a prompt, then calls on copies of its cache, with gradients.

The words are entered in calls of their own, as when they are written: an image token among them is no image.

Legend: B conversations, N columns of the prompt, T words, D hidden.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from mmroute import backbones
from mmroute.backbones.images import prepare

__all__ = ["Read", "padded"]


def padded(rows: Sequence[Sequence[int]], device: Any = None) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Rows of ids padded on the right to the longest, and which of them are real."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
    real = torch.zeros(len(rows), longest, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long, device=device)
        real[i, : len(row)] = True
    return ids, real


class Read:
    """Prompts that a stock model has read."""

    def __init__(self, model: Any, chats: Sequence[list[dict[str, Any]]]) -> None:
        """One pass over the prompts.

        Args:
            model: with its processor, not attached.
            chats: conversations.
        """
        given = dict(prepare(model, model.processor, list(chats)))
        family, self.mask = backbones.of(model), given["attention_mask"]
        self.model, self._base, self._head = model, family.base_model(model), family.head
        positions = family.positions(model, given["input_ids"], self.mask, given.get("image_grid_thw"))
        self._axes = positions.shape[0] if positions.ndim == 3 else 1
        top = positions.amax(0) if positions.ndim == 3 else positions
        self._after = top.masked_fill(self.mask == 0, -1).amax(1, keepdim=True) + 1
        self._cache = DynamicCache(config=family.text_model(model).config)
        out = self._base(**given, position_ids=positions, past_key_values=self._cache, use_cache=True)
        self.last: Float[Tensor, "B 1 D"] = out.last_hidden_state[:, -1:]

    def behind(self, ids: Int[Tensor, "B T"], real: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """States at words behind the prompts; other words may be put there afterwards, as if these had not been.

        Args:
            ids: words, padded on the right.
            real: which they are.
        """
        cache = DynamicCache(config=backbones.of(self.model).text_model(self.model).config)
        for layer, held in enumerate(self._cache.layers):
            cache.update(held.keys, held.values, layer)
        positions = self._after + torch.arange(ids.shape[1], device=ids.device)
        out = self._base(
            input_ids=ids,
            attention_mask=torch.cat([self.mask, real.long()], 1),
            position_ids=positions.expand(3, -1, -1) if self._axes == 3 else positions,
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state

    def logits(self, states: Float[Tensor, "B T D"]) -> Tensor:
        """(B, T, V) of states."""
        return self._head(self.model, states).float()
