"""The demo's second table: written thoughts against latent ones, with depth and replay, on the same held-out items.

Every sequential step counts: latents, words, and the closing token. Recipes whose weights are not there are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from mmroute import hub, recipe
from mmroute.backbones.load import load
from mmroute.bench.measure import Spread, interleave
from mmroute.bench.stats import wilson
from mmroute.errors import ConfigError
from mmroute.reason import Answer
from mmroute.tasks.base import Sample, Task

__all__ = ["RECIPES", "TASK", "Row", "as_data", "run"]

TASK = "arrows"
WRITTEN = "cot"
RECIPES: Mapping[str, str] = {
    WRITTEN: "written chain",
    "latent": "latent",
    "latent-depth": "latent + depth",
    "vedas": "latent + depth + replay",
    "pause": "placeholders, nothing fed back",
}
"""By recipe: what the table calls it; the first is what the others are compared with."""
ROUNDS = 2


@dataclass(frozen=True)
class Row:
    """One way to think; seconds are those of answering all items, as a ratio to the written chain."""

    recipe: str
    title: str
    n: int
    correct: int
    ci95: tuple[float, float]
    ar_steps: float
    """Mean sequential steps of an answer behind the prompt: latents and words."""
    latents: float
    """Those of them that are latent."""
    token_forwards: float
    """Mean positions that entered the model, the prompt's and copies of image tokens included."""
    time_ratio: Spread

    @property
    def accuracy(self) -> float:
        return self.correct / self.n


def run(
    n: int = 20,
    batch: int = 20,
    model: str = "tiny",
    say: Callable[[str], None] = lambda _: None,
    recipes: Mapping[str, str] = RECIPES,
) -> list[Row]:
    """Answers held-out items in every way whose weights are there, in turn; no rows where none is.

    Args:
        n: items.
        batch: asked at once.
        model: bundled name, folder or hub id.
        say: told what is going on, and what is left out.
        recipes: see `RECIPES`.
    """
    there = {name: title for name, title in recipes.items() if _has_weights(name, say)}
    if len(there) < 2:
        return []
    task: Task = hub.load("tasks", TASK)
    samples = list(task.samples("test", n))
    say(f"thinking in words and in latents: {n} items of {TASK}, {ROUNDS} times in turn")
    answers: dict[str, list[Answer]] = {}
    with ExitStack() as stack:
        cases = {}
        for name in there:  # a copy of the model each, equipped before any clock runs
            routed, think = stack.enter_context(recipe.equip(load(model), recipe.read(name)))
            cases[name] = _case(answers, name, routed, think, task, samples, batch)
        times = interleave(cases, rounds=ROUNDS, warmup=0)
    return [
        _row(name, title, task, samples, answers[name], times.ratio(name, next(iter(there))))
        for name, title in there.items()
    ]


def _has_weights(name: str, say: Callable[[str], None]) -> bool:
    trained = recipe.read(name).trained
    try:
        if trained is not None:
            recipe.trained_folder(trained)
    except ConfigError:
        say(
            f"{name}: left out, no weights are bundled; `mmroute train vedas --recipe {name}` makes them, and "
            f"`mmroute eval --task {TASK} --recipe {name} --set trained=runs/{name}/latent` asks the same questions"
        )
        return False
    return True


def _case(
    answers: dict[str, list[Answer]],
    name: str,
    routed: Any,
    think: Any,
    task: Task,
    samples: Sequence[Sample],
    batch: int,
) -> Callable[[], None]:
    chats = [task.messages(sample, think.style) for sample in samples]

    def case() -> None:
        answers[name] = [
            answer
            for at in range(0, len(chats), batch)
            for answer in routed.answer_many(chats[at : at + batch], think=think)
        ]

    return case


def _row(name: str, title: str, task: Task, samples: Sequence[Sample], answers: Sequence[Answer], ratio: Spread) -> Row:
    correct = sum(task.score(s, a.text).correct == 1 for s, a in zip(samples, answers, strict=True))
    return Row(
        recipe=name,
        title=title,
        n=len(samples),
        correct=correct,
        ci95=wilson(correct, len(samples)),
        ar_steps=fmean(a.ar_steps for a in answers),
        latents=fmean(a.latents for a in answers),
        token_forwards=fmean(a.trace.token_forwards for a in answers),
        time_ratio=ratio,
    )


def as_data(rows: Sequence[Row]) -> dict[str, Any]:
    """What `demo.json` keeps of them."""
    return {
        "latents": {
            "task": TASK,
            "rounds": ROUNDS,
            "rows": [{**asdict(row), "accuracy": row.accuracy} for row in rows],
            "recipes": {row.recipe: asdict(recipe.read(row.recipe)) for row in rows},
        }
    }
