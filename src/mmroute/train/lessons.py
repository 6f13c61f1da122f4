"""Questions for a model that learns to think in latents: prompts as tensors, rationales as groups of token ids.

Legend: B batch, N columns of the prompts, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from mmroute.engine.attach import Routed
from mmroute.errors import InputError
from mmroute.rollout import Grid
from mmroute.tasks.base import Generated, Spec
from mmroute.think.base import Thinker
from mmroute.tokens import Modality
from mmroute.train.chains import Writer
from mmroute.train.curriculum import TrainConfig
from mmroute.train.examples import item
from mmroute.train.small_model import MERGE
from mmroute.train.steps import merged, split_text

__all__ = ["Lesson", "Teacher"]

Drawn = Sequence[tuple[Generated, Spec]]


@dataclass(frozen=True)
class Lesson:
    """One batch of questions under one cue; prompts begin in the first column and are padded at their end."""

    ids: Int[Tensor, "B N"]
    mask: Int[Tensor, "B N"]
    modality: Int[Tensor, "B N"]
    positions: Tensor
    """(B, N), or (3, B, N) where places have a time, a row and a column."""
    inputs: dict[str, Tensor]
    """What the base model takes beside ids: image tensors, or the embeddings of everything."""
    grids: list[list[Grid]]
    """[row][image]."""
    groups: list[list[list[int]]]
    """[row][group]: what is written where no latent stands for it; the first ones are replaced first."""
    answers: list[list[int]]
    """[row]: the answer, its cue in front and the end behind."""
    drawn: Drawn

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def images(self) -> list[list[Image.Image]]:
        """[row][image]: the native pictures, for crops."""
        return [[task.draw(spec)] for task, spec in self.drawn]


class Teacher(Writer):
    """Turns specs into lessons for one attached model."""

    def __init__(self, routed: Routed, think: Thinker, config: TrainConfig) -> None:
        """
        Args:
            routed: an attached model with its processor.
            think: whose cue asks plain models to think in latents.
            config: how a rationale is cut into groups.
        """
        super().__init__(routed, think)
        self.config = config
        ends = routed.model.generation_config.eos_token_id
        end = (ends[0] if isinstance(ends, list) else ends) if ends is not None else self.tokenizer.eos_token_id
        self.end: int = end

    def lesson(self, drawn: Drawn, cue: Literal["latent", "cot"]) -> Lesson:
        """Questions with their groups and answers.

        Args:
            drawn: of tasks whose pictures have one size.
            cue: `latent`, or `cot` for the whole written chain.
        """
        prompts, tiles, inputs = self._asked(drawn, cue)
        shape = len(drawn), max(map(len, prompts))
        ids, mask = np.full(shape, self.tokenizer.pad_token_id or 0), np.zeros(shape, dtype=np.int64)
        for b, prompt in enumerate(prompts):
            ids[b, : len(prompt)], mask[b, : len(prompt)] = prompt, 1
        model, family, device = self.routed.model, self.routed.family, self.routed.model.device
        all_ids, all_mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        grids = inputs.get("image_grid_thw")
        if tiles is not None:
            side = tiles.shape[1]
            images = [[(side, side)]] * len(drawn)
            grids = torch.tensor([[1, side * MERGE, side * MERGE]] * len(drawn), device=device)
            inputs = {"inputs_embeds": self._embedded(all_ids, tiles, drawn[0][0])}
        else:
            images = [[grid] for grid in family.image_grid(model, inputs)]
            if "mm_token_type_ids" in inputs:
                inputs["mm_token_type_ids"] = (all_ids == model.config.image_token_id).long()
        modality = self.routed.controller.table[all_ids].masked_fill(~all_mask.bool(), int(Modality.TEXT))
        positions = family.positions(model, all_ids, all_mask, grids)
        both = [self._worked(task, spec, cue) for task, spec in drawn]
        return Lesson(
            all_ids, all_mask, modality, positions, inputs, images, [g for g, _ in both], [a for _, a in both], drawn
        )

    def _asked(self, drawn: Drawn, cue: Literal["latent", "cot"]) -> tuple[list[list[int]], np.ndarray | None, dict]:
        if self._tiled(drawn):
            items = [item(task, spec, cue) for task, spec in drawn]
            prompts = [[self.index[word] for word in each.words.prompt] for each in items]
            return prompts, np.stack([each.tiles for each in items]), {}
        return self._chats([self._chat(task, spec, cue) for task, spec in drawn])

    def _chat(self, task: Generated, spec: Spec, cue: Literal["latent", "cot"]) -> list[dict]:
        sample = task.sample(spec)
        if self._closed(sample.question):
            return task.messages(sample, cue)
        messages = task.messages(sample, "sentence")
        wanted = self.think.cues[0] if cue == "latent" else "Think step by step."
        messages[-1]["content"].append({"type": "text", "text": f"\n{wanted}"})
        return messages

    def _closed(self, question: str) -> bool:
        """Whether the vocabulary is one of the small models' own, which cannot write plain English."""
        unknown = self.tokenizer.unk_token_id
        return unknown is not None and unknown in self.tokenizer(question, add_special_tokens=False)["input_ids"]

    def _worked(self, task: Generated, spec: Spec, cue: Literal["latent", "cot"]) -> tuple[list[list[int]], list[int]]:
        words = task.words(spec, "cot").response
        chain = task.chain(spec)
        if self._closed(task.question(spec)) or self.small:
            steps = self._steps(task, spec) if cue == "latent" else chain
            written = [self._ids(" ".join(step)) for step in steps]
            answer = self._ids(" ".join(words[sum(map(len, chain)) :]))
        else:
            sample = task.sample(spec)
            pieces = split_text([hop.text for hop in sample.hops], self.config.splitter)
            written = [self._ids(f"{piece}\n") for piece in pieces]
            answer = self._ids(sample.answer_text)
        if not written:
            raise InputError(f"{task.name}: an item has no steps that latents could replace; use another task")
        if cue == "latent":
            most = -(-len(written) // self.config.steps_per_group)
            written = merged(written, most if self.config.groups is None else min(most, self.config.groups))
        return written, [*answer, self.end]

    def _steps(self, task: Generated, spec: Spec) -> list[list[str]]:
        if self.config.steps == "sentences":
            return task.sentences(spec)
        if self.config.steps == "chain":
            return task.chain(spec)
        outcomes = task.outcomes(spec)
        return outcomes if self.config.steps == "outcomes" else [[word] for step in outcomes for word in step]
