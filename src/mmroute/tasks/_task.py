"""The contract of every task, generated or public: samples in, chat messages and scores out."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from mmroute.errors import ConfigError
from mmroute.tasks._schema import Card, Origin, Sample, Score

__all__ = ["Task", "group_accuracy", "group_mean", "messages_so_far"]


class Task(ABC):
    """A source of samples with its prompt and its scorer."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    """Raised when a rule, a text or the scorer changes; reported as `maze-v1`."""
    card: ClassVar[Card]

    @abstractmethod
    def samples(self, split: str, n: int | None = None, offset: int = 0) -> Iterator[Sample]:
        """Samples `offset` .. `offset + n - 1` of a split; None is the whole split."""

    @abstractmethod
    def messages(self, sample: Sample, style: str | None = None) -> list[dict[str, Any]]:
        """Chat messages whose content is a list of image and text blocks."""

    def score(self, sample: Sample, completion: str, scorer: str | None = None) -> Score:
        """What the completion is worth; it alone is read, never the prompt.

        Args:
            sample: one of ours.
            completion: what the model generated.
            scorer: a rule of `_parse.SCORERS`; by default `strict`: the last anchored answer phrase, else a lone label,
                and what cannot be read is wrong.

        Raises:
            ConfigError: no rule of that name.
        """
        from mmroute.tasks import _parse  # its tables are of no use to whoever only draws pictures

        verdict = _parse.judge(scorer or "strict", _parse.Reply(completion, sample.answer, sample.choices))
        correct = None if verdict.correct is None else float(verdict.correct)
        return Score(correct, verdict.prediction, verdict.prediction is not None, scorer or "strict")

    @property
    def protocol(self) -> str:
        """How items are answered: `generate`, or `likelihood`, by the most likely option."""
        return "generate"

    def metrics(self, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
        """The figures that are usual for the task, beyond plain accuracy; a generated world has none."""
        return {}

    def origin(self, split: str) -> Origin | None:
        """Which data a split is; None where it is generated, so that name, version and preset say all."""
        return None


def messages_so_far(
    task: Task, sample: Sample, hop: int, context: Literal["accumulate", "markov2"], style: str | None = None
) -> list[dict[str, Any]]:
    """The conversation after `hop` hops: the question, then the thoughts so far in one assistant turn.

    Args:
        task: what the sample came from.
        sample: with hop images or without.
        hop: number of hops that are done; 0 is the bare question.
        context: `accumulate` keeps every thought image; `markov2` the question's and the latest only.
        style: as in `Task.messages`.

    Raises:
        ConfigError: more hops than the sample has.
    """
    if not 0 <= hop <= len(sample.hops):
        raise ConfigError(f"{sample.id} has {len(sample.hops)} hops, given hop={hop}")
    out = task.messages(sample, style)
    blocks: list[dict[str, Any]] = []
    for i, done in enumerate(sample.hops[:hop], start=1):
        blocks.append({"type": "text", "text": done.text})
        if done.image >= 0 and (context == "accumulate" or i == hop):
            blocks.append({"type": "image", "image": sample.images[done.image]})
    return [*out, {"role": "assistant", "content": blocks}] if blocks else out


def group_accuracy(groups: Sequence[str], correct: Sequence[float], size: int = 1) -> float:
    """Share of groups of which every item is right; an item without a group is a group of its own.

    Args:
        groups: [item]: its group.
        correct: [item]: 1 or 0.
        size: items of a whole group; one that a choice of items has cut is left out.

    Returns:
        In [0, 1]; nan where no group is whole.

    Example:
        >>> group_accuracy(["a", "a", "b"], [1, 1, 1]), group_accuracy(["a", "a", "b"], [1, 0, 1], size=2)
        (1.0, 0.0)
    """
    members: dict[str, list[float]] = {}
    for i, (group, value) in enumerate(zip(groups, correct, strict=True)):
        members.setdefault(group or f"#{i}", []).append(value)
    whole = [all(v == 1 for v in values) for values in members.values() if len(values) >= size]
    return float(np.mean(whole)) if whole else float("nan")


def group_mean(groups: Sequence[str], correct: Sequence[float]) -> float:
    """Mean over groups of the mean inside each: HR-Bench's cycles, MMStar's categories.

    Example:
        >>> group_mean(["a", "a", "b"], [1, 0, 1])
        0.75
    """
    members: dict[str, list[float]] = {}
    for group, value in zip(groups, correct, strict=True):
        members.setdefault(group, []).append(value)
    return float(np.mean([np.mean(m) for m in members.values()])) if members else float("nan")
