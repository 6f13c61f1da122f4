"""A plan's items as lessons for a recipe that thinks in latents: what diagnostics of training look at.

Items, words and latents are those of `mmroute train vedas`; a recipe with a `train` section says how steps are cut.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmroute.backbones.load import load
from mmroute.bench.items import Plan, draw, load_task
from mmroute.config import parse
from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe, equip
from mmroute.tasks.base import Generated, Sample, Spec
from mmroute.think.base import Thinker
from mmroute.train.curriculum import TrainConfig
from mmroute.train.lessons import Lesson, Teacher
from mmroute.train.passes import Passes

__all__ = ["Study", "need_latents", "opened", "specs_of"]


@dataclass
class Study:
    """An attached model, and a plan's items for it."""

    routed: Routed
    think: Thinker
    config: TrainConfig
    passes: Passes
    teacher: Teacher
    task: Generated
    samples: list[Sample]
    specs: list[Spec]
    batch: int

    def lessons(self) -> Iterator[tuple[list[Sample], Lesson]]:
        """The items in batches, under the latent cue."""
        for at in range(0, len(self.specs), self.batch):
            drawn = [(self.task, spec) for spec in self.specs[at : at + self.batch]]
            yield self.samples[at : at + self.batch], self.teacher.lesson(drawn, "latent")


def need_latents(recipe: Recipe) -> None:
    """Raises a ConfigError where a recipe takes no latent steps."""
    think = recipe.build("think")
    if think.style != "latent" or not think.num_latents:
        raise ConfigError(f"recipe {recipe.name} takes no latent steps; use one whose `think` does")


def specs_of(plan: Plan) -> tuple[Generated, list[Sample], list[Spec]]:
    """A plan's task, its items and what they were made from.

    Raises:
        ConfigError: the task is no generated world.
    """
    task = load_task(plan.task, plan.settings)
    if not isinstance(task, Generated):
        raise ConfigError(f"{plan.task} is no generated world; those know what each step says and looks at")
    samples = draw(task, plan)
    return task, samples, [Spec.from_dict(sample.meta["spec"]) for sample in samples]


@contextmanager
def opened(model: Any, recipe: Recipe, plan: Plan) -> Iterator[Study]:
    """A model attached as a recipe says, with a plan's items; detached when the block ends.

    Args:
        model: a loaded stock model with its processor, or a name.
        recipe: thinks in latents.
        plan: a generated world, items, seed and batch.

    Raises:
        ConfigError: the recipe takes no latent steps, or the task is no generated world.
    """
    need_latents(recipe)
    task, samples, specs = specs_of(plan)
    given = {"tasks": {plan.task: 1.0}, "stages": [{"name": "looked at", "steps": 1}], **(recipe.train or {})}
    config = parse(TrainConfig, given, "train")
    loaded = load(model) if isinstance(model, str | Path) else model
    stored = next(loaded.parameters()).dtype
    loaded.float()  # as training computes
    try:
        with equip(loaded, recipe) as (routed, think):
            teacher = Teacher(routed, think, config)
            passes = Passes(routed, think, config)
            yield Study(routed, think, config, passes, teacher, task, samples, specs, plan.batch)
    finally:
        loaded.to(stored)
