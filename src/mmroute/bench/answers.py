"""What a recipe makes of items: answers rolled out with their traces, and scores.

With pictures after hops, each enters behind the step it shows, and stays: KV over hops is that of the whole session.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmroute.bench import items
from mmroute.bench.forced import exact_chains, force_chains
from mmroute.bench.likelihood import choose
from mmroute.engine.attach import Routed
from mmroute.errors import InputError
from mmroute.reason import Answer
from mmroute.recipe import Recipe, equip
from mmroute.tasks.base import Sample, Score, Task
from mmroute.think.base import Thinker

__all__ = ["Outcome", "Progress", "answer_items", "answer_prompts"]

Progress = Callable[[str, int, int], None]
"""Told the recipe's name, items done and items in all."""


@dataclass(frozen=True)
class Outcome:
    """What a recipe did with the items, in their order."""

    recipe: Recipe
    samples: list[Sample]
    answers: list[Answer]
    scores: list[Score]
    flops_tower: float | None
    exact: list[int] | None = None
    """0 or 1 per item: the right chain was written, word for word; None where none is known."""
    forced: list[int] | None = None
    """0 or 1 per item: the answer is right behind the right chain, where that was asked."""

    @property
    def correct(self) -> list[int]:
        return [int(score.correct or 0) for score in self.scores]


def answer_items(
    model: Any, recipe: Recipe, task: Task, samples: Sequence[Sample], batch: int, progress: Progress | None = None
) -> Outcome:
    """Every item's answer and score, in batches; a batch changes no answer."""
    with equip(model, recipe) as (routed, think):
        return answer_prompts(routed, think, recipe, task, items.Prompts(samples, batch), progress)


def answer_prompts(
    routed: Routed,
    think: Thinker,
    recipe: Recipe,
    task: Task,
    prompts: items.Prompts,
    progress: Progress | None = None,
    *,
    force: bool = False,
) -> Outcome:
    """`answer_items` on a model that is equipped already, with prompts that several recipes share.

    Args:
        force: also ask for the answer behind the right chain, which costs about as much again.
    """
    answers: list[Answer] = []
    scores: list[Score] = []
    tower: int | None = 0
    for asked in prompts.batches(routed, task, think):
        if task.protocol == "likelihood":
            chosen, judged = choose(routed, think, asked)
        else:
            chosen, judged = _written(routed, think, task, asked)
        answers += chosen
        scores += judged
        tower = None if tower is None or asked.flops_tower is None else tower + asked.flops_tower
        if progress is not None:
            progress(recipe.name, len(answers), len(prompts.samples))
    samples = prompts.samples
    if any(score.correct is None for score in scores):
        raise InputError(f"{task.name}: an item has no gold answer, so accuracy is undefined; use another split")
    exact = exact_chains(routed, think, task, samples, [answer.ids for answer in answers])
    forced = force_chains(routed, think, task, prompts) if force else None
    return Outcome(
        recipe,
        samples,
        answers,
        scores,
        flops_tower=None if tower is None else tower / len(samples),
        exact=exact,
        forced=None if forced is None else forced.answers,
    )


def _written(routed: Routed, think: Thinker, task: Task, asked: items.Asked) -> tuple[list[Answer], list[Score]]:
    """What the model writes, and what it is worth."""
    pictures = [items.observations(sample) for sample in asked.samples]
    answers = routed.answer_many(
        asked.chats,
        think=think,
        relevance=items.relevance(routed, asked.samples, asked.batch),
        observations=pictures if any(pictures) else None,
        prepared=asked.batch,
    )
    return answers, [task.score(sample, answer.text) for sample, answer in zip(asked.samples, answers, strict=True)]
