"""Which items a recipe is measured on, and how they are asked: prompts are prepared once for all recipes that share
them.

Legend: B batch, N positions of a prompt, P vision positions of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from torch import Tensor

from mmroute import cost, hub
from mmroute.backbones.images import prepare
from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError, InputError
from mmroute.tasks.base import Sample, Task, relevant_tokens
from mmroute.think.base import Thinker

__all__ = ["Asked", "Plan", "Prompts", "draw", "is_beyond_words", "load_task", "messages", "observations", "relevance"]

SEED_STRIDE = 10_000
"""Items between the first ones of two seeds: runs of up to this many items share none."""


@dataclass(frozen=True)
class Plan:
    """What is measured besides the recipe."""

    task: str
    """`name` or `name:preset`."""
    n: int
    seed: int = 0
    """Which items: different seeds, different items."""
    split: str = "test"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Options of the task, such as `hop_images: observed`."""
    min_hops: int = 0
    """Items whose chain has fewer hops are passed over."""
    context: str = "accumulate"
    """Which pictures a hop still sees: `accumulate`, all of them."""
    batch: int = 16
    rounds: int = 9
    warmup: int = 2
    forced_tokens: int = 64
    """Generated tokens of a timed run, whatever the answer's own length."""
    timed_items: int = 8
    """Prompts that timing goes through in turn."""


def load_task(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """A task by `name` or `name:preset`.

    Raises:
        ConfigError: no such task, preset or setting.
    """
    task, _, preset = name.partition(":")
    return hub.load("tasks", task, **({"preset": preset} if preset else {}), **(settings or {}))


def draw(task: Task, plan: Plan) -> list[Sample]:
    """The items of a plan, the same for every recipe.

    Raises:
        ConfigError: no items asked for, or more than seeds are apart; a context that no session has.
        InputError: the split has fewer.
    """
    if not 1 <= plan.n <= SEED_STRIDE or plan.seed < 0 or plan.batch < 1:
        raise ConfigError(
            f"n in 1 .. {SEED_STRIDE}, seed >= 0 and batch >= 1 are needed, given {plan.n}, {plan.seed}, {plan.batch}"
        )
    if plan.context != "accumulate":
        raise ConfigError(
            f"context is 'accumulate', given {plan.context!r}: a session keeps what it has seen; only exported "
            "conversations (`mmroute data export`) know markov2"
        )
    most = SEED_STRIDE if plan.min_hops else plan.n
    drawn = task.samples(plan.split, most, offset=plan.seed * SEED_STRIDE)
    samples = list(islice((s for s in drawn if len(s.hops) >= plan.min_hops), plan.n))
    if len(samples) < plan.n:
        long = f" of {plan.min_hops} hops or more" if plan.min_hops else ""
        raise InputError(
            f"{plan.task}: split {plan.split!r} has {len(samples)} items{long} from seed {plan.seed} on, {plan.n} were "
            "asked for; lower --n or --seed"
        )
    return samples


def messages(routed: Routed, task: Task, sample: Sample, think: Thinker) -> list[dict[str, Any]]:
    """The item as a chat: in the short words of the small models, or in plain English with the thinker's instruction.

    A vocabulary that cannot write the plain question is one of the small models' closed ones. Where options are judged
    by their likelihood, the question stands alone.
    """
    if task.protocol == "likelihood":
        return task.messages(sample, "question")
    if is_beyond_words(routed, sample.question):
        return task.messages(sample, think.style)
    out = task.messages(sample, "sentence")
    out[-1]["content"].append({"type": "text", "text": f"\n{think.cues[0]}"})
    return out


def is_beyond_words(routed: Routed, text: str) -> bool:
    """Whether the model's vocabulary cannot write a text."""
    tokenizer = routed.processor.tokenizer
    unknown = tokenizer.unk_token_id
    return unknown is not None and unknown in tokenizer(text, add_special_tokens=False)["input_ids"]


def observations(sample: Sample) -> list[Any]:
    """The pictures that enter behind the item's steps, in order."""
    if sample.meta.get("hop_images") == "generated":  # for the model to draw, not to be shown
        return []
    return [sample.images[hop.image] for hop in sample.hops if hop.image >= 0]


def relevance(routed: Routed, samples: Sequence[Sample], batch: Mapping[str, Tensor]) -> list[list[float]] | None:
    """Per vision position of each prompt 2 needed by a hop, 1 part of the board, 0 background; None if nobody asks."""
    pruner = routed.controller.pruner
    if pruner is None or "relevance" not in pruner.needs:
        return None
    grids = routed.family.image_grid(routed.model, batch)
    known = [relevant_tokens(s, (1, *grid), 1) for s, grid in zip(samples, grids, strict=True)]
    return [[float(2 * n or b) for n, b in zip(k.needed, k.board, strict=True)] for k in known]


@dataclass(frozen=True)
class Asked:
    """One batch of items as prompts."""

    samples: list[Sample]
    chats: list[list[dict[str, Any]]]
    batch: dict[str, Tensor]
    flops_tower: int | None


class Prompts:
    """The items of one plan in batches."""

    def __init__(self, samples: Sequence[Sample], size: int, keep_bytes: int = 0) -> None:
        """
        Args:
            samples: items, in their order.
            size: items of a batch; changes no answer.
            keep_bytes: prepared batches are kept for the next recipe up to this many bytes in all.
        """
        self.samples, self.size = list(samples), size
        self._room = keep_bytes
        self._kept: dict[tuple[str, str, int], Asked] = {}

    def batches(self, routed: Routed, task: Task, think: Thinker) -> Iterator[Asked]:
        """Prompts as this way to think asks, batch by batch."""
        for start in range(0, len(self.samples), self.size):
            key = (think.style, think.cues[0], start)
            found = self._kept.get(key)
            if found is None:
                part = self.samples[start : start + self.size]
                chats = [messages(routed, task, sample, think) for sample in part]
                batch = prepare(routed.model, routed.processor, chats)
                found = Asked(part, chats, batch, _tower_flops(routed, batch))
                weight = sum(tensor.nbytes for tensor in batch.values())
                if weight <= self._room:
                    self._room -= weight
                    self._kept[key] = found
            yield found


def _tower_flops(routed: Routed, batch: Mapping[str, Tensor]) -> int | None:
    vision = getattr(routed.model.config, "vision_config", None)  # Chameleon has none: its images are words
    if vision is None:
        return None
    if "image_grid_thw" in batch:
        return cost.estimate_tower_flops(vision, [(t, h, w) for t, h, w in batch["image_grid_thw"].tolist()])
    return cost.estimate_tower_flops(vision, [(1, h, w) for h, w in routed.family.image_grid(routed.model, batch)])
