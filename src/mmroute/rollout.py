"""Latent steps of one batch on a routed cache: what answering and training share.

Each step is one segment: copies of image tokens in front, the latent last. Only new positions enter the model; what is
before them is in the cache.

Legend: B batch, N columns of the prompt, D hidden, V most image tokens of a row, A axes of a place.

Source: Vedas (arXiv 2604.10500), the sequence U(t); its release enters the whole prefix anew at each step.
Deviates: every latent step is a hop of its own, whatever `latents_per_hop`, so that a segment is a hop everywhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmroute.cache import Chunk, RaggedCache
from mmroute.engine.attach import Routed
from mmroute.select import first_true
from mmroute.think.base import LatentThinker, Mind, Thought
from mmroute.tokens import Modality

__all__ = ["Edit", "Grid", "Rollout", "start"]

Grid = tuple[int, int]
"""Rows and columns of one image's tokens."""
Edit = Callable[[int, Thought], Thought]
"""Changes what a step enters, by its number from 0: for cut gradients and for interventions."""


def start(
    cache: RaggedCache,
    think: LatentThinker,
    *,
    hidden: Float[Tensor, "B D"],
    modality: Int[Tensor, "B N"],
    valid: Bool[Tensor, "B N"],
    positions: Int[Tensor, "A B N"],
    grids: Sequence[Sequence[Grid]],
    seeds: Int[Tensor, " B"],
) -> Mind:
    """What a batch knows after its prompt.

    Args:
        cache: the prompt is in it; where the thinker `needs_row`, entered by a call with `Chunk.watch`.
        think: who will think.
        hidden: behind the last norm, at each row's last position.
        modality: of the prompt's columns.
        valid: False at padding.
        positions: of the prompt's columns.
        grids: [row][image].
        seeds: a number for each row.
    """
    device = hidden.device
    top = positions.amax(0).masked_fill(~valid, -1).amax(1)
    is_vision = (modality == Modality.VISION) & valid
    counts = is_vision.sum(1).tolist() if think.needs_row else [0] * len(hidden)
    V = max(counts)
    columns = first_true(is_vision, V)
    beyond = torch.arange(V, device=device) >= torch.tensor(counts, device=device)[:, None]
    vision, row, deep = hidden.new_zeros(len(hidden), 0, hidden.shape[1]), None, None
    if think.needs_row:
        assert cache.watched is not None, "the prompt was entered unwatched"
        entered = cache.watched.entered
        vision = entered.gather(1, columns[..., None].expand(-1, -1, entered.shape[-1]))
        vision = vision.masked_fill(beyond[..., None], 0)
        row = cache.watched.row.gather(1, columns)
        if cache.watched.deep is not None:
            deep = cache.watched.deep
            deep = deep.gather(2, columns[..., None].expand(len(deep), -1, -1, deep.shape[-1]))
    return Mind(
        hidden=hidden,
        next_position=top + 1,
        vision=vision,
        places=positions.gather(2, columns.expand(len(positions), -1, -1)),
        cells=_cells(grids, counts, V).to(device),
        counts=counts,
        columns=columns.masked_fill(beyond, -1),
        row=row,
        visited=torch.zeros_like(columns, dtype=torch.bool),
        left=list(counts),
        seeds=seeds,
        deep=deep,
    )


def _cells(grids: Sequence[Sequence[Grid]], counts: Sequence[int], V: int) -> Int[Tensor, "B V 3"]:
    out = torch.zeros(len(counts), V, 3, dtype=torch.long)
    for b, images in enumerate(grids):
        known = [(i, r, c) for i, (rows, columns) in enumerate(images) for r in range(rows) for c in range(columns)]
        if counts[b]:
            out[b, : counts[b]] = torch.tensor(known)[: counts[b]]
    return out


class Rollout:
    """The latent steps of one batch; `run` takes all of them, `mind` is where they led."""

    def __init__(
        self,
        routed: Routed,
        think: LatentThinker,
        cache: RaggedCache,
        mind: Mind,
        mask: Int[Tensor, "B N"],
        edit: Edit | None = None,
    ) -> None:
        self.routed, self.think, self.cache, self.mind, self.mask, self.edit = routed, think, cache, mind, mask, edit
        self.steps = [0] * len(mind.hidden)
        """[row]: latent steps taken."""
        self.fed: list[Float[Tensor, "B D"]] = []
        """By step: the state that was fed back."""
        self.thoughts: list[Thought] = []
        """By step: what was entered."""
        self.shares: list[Float[Tensor, "B K"]] = []
        """By step: the attention on what is copied."""

    def run(self, counts: Sequence[int] | None = None, stop_id: int | None = None) -> Mind:
        """Takes the latent steps.

        Args:
            counts: [row]: how many; None is the thinker's number for every row.
            stop_id: rows end where the head would write this word after a step.
        """
        goals = [self.think.num_latents] * len(self.steps) if counts is None else list(counts)
        while any(done < goal for done, goal in zip(self.steps, goals, strict=True)):
            active = [done < goal for done, goal in zip(self.steps, goals, strict=True)]
            self._step(active, more=max(goals) - self.mind.step > 1)
            if stop_id is not None:
                ends = (self.routed.family.head(self.routed.model, self.mind.hidden).argmax(-1) == stop_id).tolist()
                goals = [done if end else goal for done, goal, end in zip(self.steps, goals, ends, strict=True)]
        return self.mind

    def _step(self, active: list[bool], more: bool) -> None:
        mind, cache = self.mind, self.cache
        thought = self.think.step(mind)
        at = thought.source.clamp(min=0)
        self.shares.append(torch.zeros_like(thought.weight) if mind.row is None else mind.row.gather(1, at))
        if self.edit is not None:
            thought = self.edit(mind.step, thought)
        self.fed.append(mind.hidden)
        goes = torch.tensor(active, device=mind.hidden.device)
        if not all(active):
            thought = replace(thought, valid=thought.valid & goes[:, None])
        self.thoughts.append(thought)
        cache.start_hop(mind.step + 1)
        cache.next = Chunk(
            modality=thought.modality,
            valid=thought.valid,
            generated=torch.zeros_like(thought.valid),
            watch=more and self.think.needs_row,
            deep=thought.deep,
        )
        self.mask = torch.cat([self.mask, thought.valid.to(self.mask.dtype)], 1)
        h = self.routed.controller.base(
            inputs_embeds=thought.embeds,
            attention_mask=self.mask,
            position_ids=thought.places if len(thought.places) > 1 else thought.places[0],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        mind.hidden = h if all(active) else h.where(goes[:, None], mind.hidden)
        mind.next_position = thought.next_position.where(goes, mind.next_position)
        if cache.watched is not None and mind.row is not None:
            mind.row = cache.watched.row.gather(1, mind.columns.clamp(min=0))
        mind.step += 1
        self.steps = [n + go for n, go in zip(self.steps, active, strict=True)]

    @property
    def columns(self) -> int:
        """Columns that the steps took."""
        return sum(thought.valid.shape[1] for thought in self.thoughts)
