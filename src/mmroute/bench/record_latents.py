"""Answers of a task's items together with the latents that each took.

Legend: D hidden, T steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmroute.bench.items import messages
from mmroute.engine.attach import Routed
from mmroute.tasks.base import Sample, Task
from mmroute.think.base import LatentThinker, Thought

__all__ = ["Item", "latents_of", "recorded"]


@dataclass
class Item:
    """One question as it was answered untouched."""

    sample: Sample
    chat: list[dict[str, Any]]
    latents: Float[Tensor, "T D"]
    answer: str
    right: bool


def latents_of(items: Sequence[Item]) -> list[Float[Tensor, "T D"]]:
    """Latents of each item that took any."""
    return [item.latents for item in items if len(item.latents)]


def recorded(routed: Routed, think: LatentThinker, task: Task, samples: Sequence[Sample]) -> list[Item]:
    """Asks a batch and keeps what each latent step fed back."""
    chats = [messages(routed, task, sample, think) for sample in samples]
    seen: list[Tensor] = []

    def record(step: int, thought: Thought) -> Thought:
        seen.append(thought.embeds[:, -1])
        return thought

    answers = routed.answer_many(chats, think=think, edit=record)
    out = []
    for b, (sample, chat, answer) in enumerate(zip(samples, chats, answers, strict=True)):
        own = [z[b] for z in seen[: answer.latents]]
        latents = torch.stack(own) if own else torch.empty(0, routed.controller.shape.hidden)
        out.append(Item(sample, chat, latents, answer.text, bool(task.score(sample, answer.text).correct)))
    return out
