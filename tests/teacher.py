"""A three-hop conversation as one teacher-forced batch, and the same hop by hop on a cache.

Legend: B batch, N positions of the whole conversation, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import families
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmroute import backbones
from mmroute.cache import RaggedCache
from mmroute.engine.attach import Routed

__all__ = ["Part", "Talk", "closing_session", "conversation"]


@dataclass
class Part:
    """What enters between two decisions: a given chunk, or tokens the model writes one by one."""

    hop: int
    batch: dict[str, Tensor]
    written: bool


@dataclass
class Talk:
    parts: list[Part]
    whole: dict[str, Tensor]
    """One batch, with explicit positions."""
    hop: Int[Tensor, "B N"]
    generated: Bool[Tensor, "B N"]


def conversation(name: str, model: Any, batch: int, pads: list[int] | None) -> Talk:
    """Prompt with an image; a thought and an image; an image and a thought."""
    parts = [
        Part(0, families.make_inputs(name, model, batch, pads), False),
        Part(1, _text(batch, 5, seed=7), True),
        Part(1, families.make_hop(name, model, batch, seed=8), False),
        Part(2, families.make_hop(name, model, batch, seed=9), False),
        Part(2, _text(batch, 3, seed=10), True),
    ]
    whole = families.join(name, *(part.batch for part in parts))
    family = backbones.of(model)
    whole["position_ids"] = family.positions(
        model, whole["input_ids"], whole["attention_mask"], whole.get("image_grid_thw")
    )
    widths = [part.batch["input_ids"].shape[1] for part in parts]
    hop = [torch.full((batch, n), part.hop) for part, n in zip(parts, widths, strict=True)]
    generated = [torch.full((batch, n), part.written) for part, n in zip(parts, widths, strict=True)]
    return Talk(parts, whole, torch.cat(hop, dim=1), torch.cat(generated, dim=1))


def _text(batch: int, length: int, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(100, 480, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def closing_session(
    routed: Routed, talk: Talk, cache: RaggedCache | None = None
) -> tuple[Float[Tensor, "B N V"], RaggedCache]:
    """Hop by hop on one cache, each hop closed when it ends; logits of every position."""
    cache = routed.new_cache() if cache is None else cache
    out, at, hop = [], 0, 0
    for part in talk.parts:
        if part.hop != hop:
            cache.close_hop(routed.controller.pruner)
            hop = part.hop
            cache.start_hop(hop)
        width = part.batch["input_ids"].shape[1]
        for start, end in _cuts(at, width, part.written):
            given = {k: v for k, v in part.batch.items() if k not in ("input_ids", "attention_mask")}
            if "mm_token_type_ids" in given:
                given["mm_token_type_ids"] = talk.whole["mm_token_type_ids"][:, start:end]
            call = routed.model(
                input_ids=talk.whole["input_ids"][:, start:end],
                attention_mask=talk.whole["attention_mask"][:, :end],
                position_ids=talk.whole["position_ids"][..., start:end],
                past_key_values=cache,
                **given,
            )
            out.append(call.logits)
        at += width
    return torch.cat(out, dim=1), cache


def _cuts(at: int, width: int, single: bool) -> list[tuple[int, int]]:
    return [(at + i, at + i + 1) for i in range(width)] if single else [(at, at + width)]
