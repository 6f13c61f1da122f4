"""One batch of conversations on one routed cache: what enters, where it stands, and who is still there.

Rows of a batch that have finished leave it: their cache is dropped and they cost nothing more.

Legend: B batch, N positions, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmroute.cache import Chunk, RaggedCache
from mmroute.decoding import stop_id
from mmroute.engine.attach import Routed
from mmroute.errors import UnsupportedCall
from mmroute.ledger import Ledger
from mmroute.rollout import Edit, Grid, Rollout, start
from mmroute.segment import picture_segment, place_relevance
from mmroute.think.base import LatentThinker, Thinker
from mmroute.tokens import Modality
from mmroute.trace import Trace

__all__ = ["Session"]


class Session:
    """One batch of conversations on one routed cache.

    Positions are always explicit: a model's own notion of where it stands is model state, and two sessions on one
    model would mix theirs up.
    """

    def __init__(self, routed: Routed, reserve: int = 0) -> None:
        self.routed = routed
        self.cache: RaggedCache = routed.new_cache()
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.next_position: Tensor | None = None
        self.rows: list[int] = []
        """Conversations still in the batch, by their first index."""
        self.ledger = Ledger()
        """What each conversation took part in."""
        self._grids: list[list[Tensor]] = []
        self._reserve = reserve
        self._images: list[list[Grid]] = []
        self._positions: Tensor | None = None
        self._hidden: Tensor | None = None
        self.latents: dict[int, int] = {}
        """Latent steps by conversation."""
        self.axes = 1
        """Numbers that make a position: 3 where it has a time, a row and a column."""
        self.draws = False
        """Whether logits are those of image tokens too, which the model's own forward may hide."""

    @property
    def grids(self) -> Tensor | None:
        """(images, 3): the patch grid of every image so far, row by row, where the family has grids."""
        flat = [grid for row in self._grids for grid in row]
        return torch.stack(flat) if flat else None

    def append(
        self,
        batch: dict[str, Tensor],
        relevance: Tensor | None = None,
        hops: list[int] | None = None,
        think: Thinker | None = None,
    ) -> Tensor:
        """Enters a prompt, or an observation with new images, as one segment.

        Args:
            batch: `input_ids` (B, N), `attention_mask` (B, N) of this segment, and its image tensors. Rows may hold
                different numbers of images; a shorter row is padded on its left.
            relevance: (B, N) ground truth for pruners that ask for it.
            hops: [row]: the hop the segment belongs to; None is 0, the prompt's.
            think: whose latent steps follow.

        Returns:
            (B, V) logits of each row's last position.

        Raises:
            UnsupportedCall: latent steps have been taken; places behind them cannot be told from ids.
        """
        if self.latents:
            raise UnsupportedCall("an observation behind latent steps is not supported; take them after the last one")
        return self.enter(batch, relevance, hops, think=think)[:, -1]

    def enter(
        self,
        batch: dict[str, Tensor],
        relevance: Tensor | None,
        hops: list[int] | None,
        every: bool = False,
        think: Thinker | None = None,
    ) -> Tensor:
        """What `append` does, for whoever must say more, or wants to hear more.

        Args:
            batch: as in `append`.
            relevance: as in `append`.
            hops: as in `append`; None also where `cache.next` says it position by position.
            every: return the logits of every position, not of the last one alone.
            think: as in `append`.

        Returns:
            (B, N, V) logits of the segment's positions, or (B, 1, V) of its last one.
        """
        routed, family = self.routed, self.routed.family
        ids, mask = batch["input_ids"], batch["attention_mask"]
        start = 0 if self.ids is None else self.ids.shape[1]
        if self.ids is None:
            self.rows = list(range(ids.shape[0]))
            self.cache.reserve(ids.shape[1] + self._reserve)
        else:
            ids = torch.cat([self.ids, ids], 1)
            mask = torch.cat([self.mask, mask], 1)  # type: ignore[list-item]
        if batch.get("image_grid_thw") is not None:
            fresh = self._by_row(batch)
            self._grids = [old + new for old, new in zip(self._grids or [[] for _ in fresh], fresh, strict=True)]
        self.ledger.entered(self.rows, start, batch["attention_mask"].tolist())
        positions = family.positions(routed.model, ids, mask, self.grids)
        self.ids, self.mask = ids, mask
        self.axes = positions.shape[0] if positions.ndim == 3 else 1
        top = positions.amax(0) if positions.ndim == 3 else positions
        self.next_position = top.masked_fill(mask == 0, -1).amax(1) + 1
        images = {k: batch[k] for k in family.image_kwargs(batch)}
        if hops is not None:
            chunk = self.cache.next or Chunk()
            chunk.hop = torch.tensor(hops, device=ids.device)[:, None].expand(-1, ids.shape[1] - start)
            self.cache.next = chunk
        if think is not None:
            chunk = self.cache.next or Chunk()
            chunk.watch = think.needs_row
            self.cache.next = chunk
            self._positions = positions if positions.ndim == 3 else positions[None]
            self._images = self.images_by_row(batch) if images else [[] for _ in self.rows]
        given = {"relevance": relevance, **images, "logits_to_keep": 0 if every else 1}
        logits = self._forward(ids[:, start:], positions[..., start:], given, think is not None)
        if hops is not None:
            self.ledger.last.hop = list(hops)
        return logits

    def observe(
        self, pictures: Sequence[Any], hops: list[int], relevance: Sequence[Sequence[float]] | None = None
    ) -> Tensor:
        """Enters a picture, between its delimiters, in every row that has one to see.

        Args:
            pictures: [row]: path, bytes or Pillow image, or None where nothing is to be seen.
            hops: [row]: the hop that each row is in.
            relevance: [row]: ground truth for pruners that ask for it, one number per vision position of its picture.

        Returns:
            (B, V) logits; of no meaning in rows without a picture.
        """
        batch = picture_segment(self.routed, pictures)
        return self.append(batch, place_relevance(relevance, batch, self.routed), hops)

    def insert(self, embeds: Tensor, mask: Tensor, hops: list[int], relevance: Tensor | None = None) -> Tensor:
        """Enters image features as one segment of given vision positions, where positions are plain numbers.

        Args:
            embeds: (B, N, D); a row with fewer is padded on its left.
            mask: (B, N), 1 where there is a feature.
            hops: [row]: the hop they belong to.
            relevance: (B, N) ground truth for pruners that ask for it.

        Returns:
            (B, V) logits; of no meaning in rows without features.
        """
        assert self.ids is not None and self.mask is not None and self.next_position is not None
        start, N = self.ids.shape[1], embeds.shape[1]
        self.ledger.entered(self.rows, start, mask.tolist())
        positions = self.next_position[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
        self.next_position = self.next_position + mask.sum(1)
        placeholder = torch.full_like(mask, self.routed.model.config.image_token_id)
        self.ids, self.mask = torch.cat([self.ids, placeholder], 1), torch.cat([self.mask, mask], 1)
        self.cache.next = Chunk(
            modality=mask * int(Modality.VISION),
            valid=mask.bool(),
            hop=torch.tensor(hops, device=mask.device)[:, None].expand(-1, N),
            relevance=relevance,
        )
        logits = self._forward(None, positions, {"inputs_embeds": embeds, "logits_to_keep": 1})[:, -1]
        self.ledger.last.hop = list(hops)
        return logits

    def forget(self, rows: list[bool], column: int, hops: list[int]) -> None:
        """Some rows go on as if nothing had entered them at or behind a logical column.

        Args:
            rows: [row]: whether it forgets.
            column: where.
            hops: [row]: the hop that it is in.
        """
        assert self.mask is not None
        self.cache.forget_rows(rows, column, [h if f else -1 for h, f in zip(hops, rows, strict=True)])
        self.ledger.close(self.cache.trace.closes[-1], self.rows)
        self.mask = self.mask.clone()
        self.mask[rows, column:] = 0

    def write(self, ids: Tensor, mask: Tensor, hops: list[int]) -> Tensor:
        """Enters words that stand for what the model would write: all run, none is ranked before its hop is closed.

        Args:
            ids: (B, N), a row with fewer words padded on its left.
            mask: (B, N), 1 where there is a word.
            hops: [row]: the hop the words belong to.

        Returns:
            (B, N, V) logits behind every word.
        """
        assert self.ids is not None
        self.cache.next = Chunk(generated=mask.bool(), valid=mask.bool())
        return self.enter({"input_ids": ids, "attention_mask": mask}, None, hops, every=True)

    def step(self, ids: Tensor, hops: list[int] | None = None) -> Tensor:
        """Enters one generated token per row.

        Args:
            ids: (B,).
            hops: [row]: the hop each token belongs to.

        Returns:
            (B, V) logits.
        """
        assert self.ids is not None and self.mask is not None and self.next_position is not None
        self.ids = torch.cat([self.ids, ids[:, None]], 1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        positions = self.next_position[:, None]
        if self.axes == 3:
            positions = positions.expand(3, -1, -1)
        self.next_position = self.next_position + 1
        if hops is not None:
            self.cache.next = Chunk(hop=torch.tensor(hops, device=ids.device)[:, None])
        logits = self._forward(ids[:, None], positions, {"logits_to_keep": 1})[:, -1]
        if hops is not None:
            self.ledger.last.hop = list(hops)
        return logits

    def think(self, think: LatentThinker, seeds: Sequence[int], edit: Edit | None = None) -> Tensor:
        """Takes the latent steps behind a prompt that was entered for them.

        Args:
            think: as given to `append`.
            seeds: [row]: a number for each conversation.
            edit: changes what a step enters.

        Returns:
            (B, V) logits after each row's last step.
        """
        assert self.mask is not None and self._positions is not None and self._hidden is not None
        routed, before = self.routed, self.mask.shape[1]
        mind = start(
            self.cache,
            think,
            hidden=self._hidden,
            modality=self.cache.meta["modality"].long(),
            valid=self.mask.bool(),
            positions=self._positions,
            grids=self._images,
            seeds=torch.tensor(seeds, device=self.mask.device),
        )
        rollout, first = Rollout(routed, think, self.cache, mind, self.mask, edit), len(self.cache.trace.calls)
        rollout.run(stop_id=stop_id(routed, think))
        self.mask, self.next_position = rollout.mask, mind.next_position
        assert self.ids is not None
        self.ids = torch.cat([self.ids, self.ids.new_zeros(len(self.ids), rollout.columns)], 1)
        for call in self.cache.trace.calls[first:]:
            call.kind = "decode"  # one sequential step, however many positions it brings
            self.ledger.call(call, self.rows)
        self.ledger.entered(self.rows, before, rollout.mask[:, before:].tolist())
        self.latents |= dict(zip(self.rows, rollout.steps, strict=True))
        self._note_replays(rollout)
        return routed.family.head(routed.model, mind.hidden)

    def _note_replays(self, rollout: Rollout) -> None:
        columns = rollout.mind.columns.tolist()
        for step, thought in enumerate(rollout.thoughts, start=1):
            sources = thought.source.tolist()
            for b, conversation in enumerate(self.rows):
                at = [columns[b][i] for i in sources[b] if i >= 0]
                if step <= rollout.steps[b] and at:
                    self.ledger.replay(conversation, step, at)

    def _forward(self, ids: Tensor | None, positions: Tensor, extra: dict[str, Any], latent: bool = False) -> Tensor:
        given = {k: v for k, v in extra.items() if v is not None}
        given |= {
            "input_ids": ids,
            "attention_mask": self.mask,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        if latent or self.draws:  # the head's input is wanted too, or more of what it says
            keep = given.pop("logits_to_keep")
            h = self.routed.controller.base(**given).last_hidden_state
            h = h[:, -keep:] if keep else h
            if latent:
                self._hidden = h[:, -1]
            head = self.routed.family.head
            logits = head(self.routed.model, h, images=True) if self.draws else head(self.routed.model, h)
        else:
            logits = self.routed.model(**given).logits
        self.ledger.call(self.cache.trace.calls[-1], self.rows)
        return logits

    def images_by_row(self, batch: dict[str, Tensor]) -> list[list[Grid]]:
        """[row][image]: rows and columns of the grid of image tokens; rows may hold different numbers of images.

        Args:
            batch: a segment with its image tensors.
        """
        grids = self.routed.family.image_grid(self.routed.model, batch)
        out: list[list[Grid]] = []
        for vision in (self.routed.controller.table[batch["input_ids"]] == Modality.VISION).sum(1).tolist():
            out.append([])
            while vision > 0:
                rows, columns = grids.pop(0)
                vision -= rows * columns
                out[-1].append((rows, columns))
        return out

    def _by_row(self, batch: dict[str, Tensor]) -> list[list[Tensor]]:
        """The same as the patch grids of the processor."""
        grids = iter(batch["image_grid_thw"])
        return [[next(grids) for _ in row] for row in self.images_by_row(batch)]

    def close_hop(self, ended: list[int]) -> None:
        """Compresses what a finished hop left behind, if the pruner does such a thing.

        Args:
            ended: [row]: the hop that row has just finished; -1 where none ended.
        """
        pruner = self.routed.controller.pruner
        if pruner is not None and pruner.closes:
            self.cache.close_hop(pruner, ended)
            self.ledger.close(self.cache.trace.closes[-1], self.rows)

    def keep_rows(self, stays: list[int]) -> None:
        """Only these rows of the batch, by their present index, go on."""
        assert self.ids is not None and self.mask is not None and self.next_position is not None
        index = torch.tensor(stays, device=self.ids.device)
        self.cache.batch_select_indices(index)
        self._grids = [self._grids[i] for i in stays] if self._grids else []
        self.ids, self.mask = self.ids[index], self.mask[index]
        self.next_position = self.next_position[index]
        self.rows = [self.rows[i] for i in stays]

    def repeat_rows(self, times: int) -> None:
        """Every row as often, one beside the other, for beams and options; traces count what all of a conversation's
        did."""
        assert self.ids is not None and self.mask is not None and self.next_position is not None
        index = torch.arange(len(self.ids), device=self.ids.device).repeat_interleave(times)
        self.rows = [row for row in self.rows for _ in range(times)]
        self._grids = [grids for grids in self._grids for _ in range(times)]
        self.reorder_rows(index)

    def reorder_rows(self, index: Tensor) -> None:
        """The batch's rows by their present index; some may go and others be doubled."""
        assert self.ids is not None and self.mask is not None and self.next_position is not None
        self.cache.batch_select_indices(index)
        self.ids, self.mask = self.ids[index], self.mask[index]
        self.next_position = self.next_position[index]

    def trace_of(self, conversation: int) -> Trace:
        """The trace of one conversation alone: its columns count its own positions, padding left out."""
        return self.ledger.trace_of(conversation, self.routed.controller.shape, self.routed.full_trace)
