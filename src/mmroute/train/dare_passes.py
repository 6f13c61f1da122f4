"""The ways in which written chains go through a routed model: all hops at once, hop by hop as inference runs, unrouted.

Legend: B batch, N columns, D hidden, M words to write, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmroute.cache import Chunk
from mmroute.engine.attach import Routed
from mmroute.prune.base import Pruner
from mmroute.train.chains import Chains
from mmroute.train.examples import IGNORED

__all__ = ["Passes"]


class Passes:
    """Forward passes of one attached model."""

    def __init__(self, routed: Routed, pruner: Pruner) -> None:
        self.routed, self.pruner = routed, pruner

    def at_once(self, batch: Chains) -> Float[Tensor, "B N D"]:
        """All hops at once; the gates stand for hop closes."""
        return self.routed.controller.base(
            **self._given(batch),
            attention_mask=batch.mask,
            position_ids=batch.positions,
            hop_ids=batch.hop,
            generated=batch.generated,
            use_cache=False,
        ).last_hidden_state

    def hop_by_hop(self, batch: Chains, differentiable: bool) -> Float[Tensor, "B N D"]:
        """As inference runs: each hop enters the cache, and is closed before the next but one reads it."""
        cache = self.routed.new_cache(differentiable=differentiable)
        out, before = [], 0
        for start, end, h in batch.spans:
            if h >= 2 and h != before and self.pruner.closes:
                cache.close_hop(self.pruner, [h - 1] * len(batch.ids))
            before = h
            here = slice(start, end)
            cache.next = Chunk(
                modality=batch.modality[:, here],
                hop=batch.hop[:, here],
                valid=batch.mask[:, here],
                protected=self._delimiters(batch)[:, here],
                generated=batch.generated[:, here],
            )
            given: dict[str, Any] = {"input_ids": batch.ids[:, here]}
            if "inputs_embeds" in batch.inputs:
                given = {"inputs_embeds": batch.inputs["inputs_embeds"][:, here]}
            elif h == 0:
                given |= {k: v[:, here] if k == "mm_token_type_ids" else v for k, v in batch.inputs.items()}
            call = self.routed.controller.base(
                **given,
                attention_mask=batch.mask[:, :end],
                position_ids=batch.positions[..., here],
                past_key_values=cache,
            )
            out.append(call.last_hidden_state)
        return torch.cat(out, dim=1)

    @torch.no_grad()
    def unrouted(self, batch: Chains) -> Float[Tensor, "B N D"]:
        """The stock model on all hops: every position runs every layer, and nothing is forgotten."""
        given = batch.inputs if "inputs_embeds" in batch.inputs else {"input_ids": batch.ids, **batch.inputs}
        with self.routed.off():
            return self.routed.controller.base(
                **given, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
            ).last_hidden_state

    def logits(self, h: Float[Tensor, "B N D"], batch: Chains) -> Float[Tensor, "M V"]:
        """What is said of each word to write, in fp32: read where the word before it stands."""
        column = torch.arange(h.shape[1], device=h.device)
        last = torch.where(batch.mask.bool(), column, -1).cummax(1).values
        before = torch.cat([last.new_zeros(len(last), 1), last[:, :-1]], dim=1)  # gaps lie between hops
        at = h.gather(1, before[..., None].expand(-1, -1, h.shape[-1]))[batch.labels != IGNORED]
        return self.routed.model.get_output_embeddings()(at).float()

    def _given(self, batch: Chains) -> dict[str, Tensor]:
        if "inputs_embeds" not in batch.inputs:
            return {"input_ids": batch.ids, **batch.inputs}
        return {**batch.inputs, "modality": batch.modality, "protected": self._delimiters(batch)}

    def _delimiters(self, batch: Chains) -> Bool[Tensor, "B N"]:
        return self.routed.controller.delimiters[batch.ids]
