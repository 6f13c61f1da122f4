"""The draft's caches where it is rated, read once: after its prompts, or some first tokens of its answers later.

Legend: B batch, n prompts, H key-value heads, N columns, E head dim, R ratings, K levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from mmroute import backbones
from mmroute.backbones.images import prepare
from mmroute.bench.items import messages
from mmroute.decoding import end_ids
from mmroute.engine.attach import attach
from mmroute.gate._behind import behind
from mmroute.gate.prp import Prp
from mmroute.tasks._mixture import Drawn
from mmroute.think.base import Thinker
from mmroute.train.rollouts import roll_out
from mmroute.train.written import padded

__all__ = ["Prompts", "begun", "chats_of"]

_READ_AT_ONCE = 64


def chats_of(model: Any, items: Sequence[Drawn], think: Thinker) -> list[list[dict[str, Any]]]:
    """The questions as this model is asked them."""
    with attach(model) as routed:
        return [messages(routed, item.task, item.sample, think) for item in items]


def begun(model: Any, chats: Sequence[list[dict[str, Any]]], num: int) -> list[list[int]]:
    """The first tokens of a model's greedy answers, the one that ends an answer left out.

    Args:
        model: with its processor, not attached.
        chats: conversations.
        num: how many tokens, at most.
    """
    out: list[list[int]] = []
    with attach(model) as routed:
        ends = end_ids(routed)
        for start in range(0, len(chats), _READ_AT_ONCE):
            rolled, _ = roll_out(routed, chats[start : start + _READ_AT_ONCE], max_new_tokens=num)
            out += [[i for i in each.ids if i not in ends] for each in rolled]
    return out


@dataclass
class Prompts:
    """The draft's caches after n prompts, all padded on the left to one length."""

    keys: list[Float[Tensor, "n H N E"]]
    """By layer."""
    values: list[Float[Tensor, "n H N E"]]
    mask: Tensor
    """(n, N)."""
    after: Tensor
    """(n,): the position behind each."""
    axes: int
    """Numbers that make a position."""

    @classmethod
    def of(cls, gate: Prp, chats: Sequence[list[dict[str, Any]]], batch: int = _READ_AT_ONCE) -> "Prompts":
        """The caches that a gate rates from: behind as many tokens of the answer as it decides after."""
        after = gate.config.decide_after
        return cls.read(gate.model, chats, batch, begun(gate.model, chats, after) if after else None)

    @classmethod
    @torch.no_grad()
    def read(
        cls,
        model: Any,
        chats: Sequence[list[dict[str, Any]]],
        batch: int = _READ_AT_ONCE,
        beginnings: Sequence[list[int]] | None = None,
    ) -> "Prompts":
        """Runs the stock draft over every prompt.

        Args:
            model: the draft with its processor, not attached.
            chats: conversations.
            batch: prompts at once.
            beginnings: tokens that stand behind each prompt.
        """
        family = backbones.of(model)
        base, config = family.base_model(model), family.text_model(model).config
        parts: list[tuple[list[Tensor], list[Tensor], Tensor]] = []
        ends, axes = [], 1
        for start in range(0, len(chats), batch):
            given = dict(prepare(model, model.processor, list(chats[start : start + batch])))
            positions = family.positions(
                model, given["input_ids"], given["attention_mask"], given.get("image_grid_thw")
            )
            cache = DynamicCache(config=config)
            base(**given, position_ids=positions, past_key_values=cache, use_cache=True)
            axes = positions.shape[0] if positions.ndim == 3 else 1
            top = positions.amax(0) if positions.ndim == 3 else positions
            mask = given["attention_mask"]
            after = top.masked_fill(mask == 0, -1).amax(1) + 1
            if beginnings is not None and any(beginnings[start : start + batch]):
                ids, real = padded(beginnings[start : start + batch], mask.device)
                behind(model, cache, mask, after, axes, ids=ids, real=real.long())
                mask, after = torch.cat([mask, real.long()], 1), after + real.sum(1)
            ends.append(after)
            parts.append(([x.keys for x in cache.layers], [x.values for x in cache.layers], mask))
        longest = max(mask.shape[1] for *_, mask in parts)
        pad = lambda x, width: torch.nn.functional.pad(x, (0, 0, longest - width, 0))  # noqa: E731
        layers = range(len(parts[0][0]))
        return cls(
            keys=[torch.cat([pad(k[i], m.shape[1]) for k, _, m in parts]) for i in layers],
            values=[torch.cat([pad(v[i], m.shape[1]) for _, v, m in parts]) for i in layers],
            mask=torch.cat([torch.nn.functional.pad(m, (longest - m.shape[1], 0)) for *_, m in parts]),
            after=torch.cat(ends),
            axes=axes,
        )

    def __len__(self) -> int:
        return len(self.mask)

    def rate(self, gate: Prp, index: Tensor) -> Float[Tensor, "B R K"]:
        """Log-probabilities of the levels of some prompts, with gradients."""
        config = backbones.of(gate.model).text_model(gate.model).config
        cache = DynamicCache(config=config)
        for layer, (k, v) in enumerate(zip(self.keys, self.values, strict=True)):
            cache.update(k[index], v[index], layer)
        return gate.levels(cache, self.mask[index], self.after[index], self.axes)

    @torch.no_grad()
    def probs(self, gate: Prp, batch: int = 256) -> Float[Tensor, "n R K"]:
        """The levels' probabilities of every prompt."""
        parts = torch.arange(len(self), device=self.mask.device).split(batch)
        return torch.cat([self.rate(gate, part).exp() for part in parts])
