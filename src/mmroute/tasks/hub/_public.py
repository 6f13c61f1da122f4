"""What every public benchmark shares: where its rows are found, how a prompt is laid out, what is scored and averaged.

A benchmark's own file says where its data is (`sources`), what a row means (`sample`), how it is asked (`prompts`) and
which averages are usual (`metrics`). Sizes in cards are those published; another number of rows is a warning and never
an error, since data sets drift.

| option | meaning |
|---|---|
| `data_root` | folder with one folder per benchmark: `data/vsr/..`; what is not there is looked for on the Hub |
| `prompt` | which of the benchmark's prompts; the first by default |
| `protocol` | `generate`: the model writes; `likelihood`: the option it finds most likely; the card's by default |
"""

import logging
import re
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

from mmroute.config import options, parse
from mmroute.errors import ConfigError, InputError
from mmroute.tasks import _parse
from mmroute.tasks.base import Card, Choice, Origin, Sample, Score, Task
from mmroute.tasks.hub._fields import answer_index, choices
from mmroute.tasks.hub._readers import HubRows, Row, Source

__all__ = ["LETTER_PROMPT", "WORD_PROMPT", "YES_NO_PROMPT", "Public", "by", "letter_prompt", "mean"]

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
YES_NO_PROMPT = "Answer the question using yes or no."
WORD_PROMPT = "Answer the question using a single word or phrase."
log = logging.getLogger(__name__)

_TAG = re.compile(r"<image(?: (\d))?>")

Prompt = Callable[[Sample], str]
Scorer = Callable[[Sample, str], _parse.Verdict]


def letter_prompt(sample: Sample) -> str:
    """Question, a line per option, and the instruction to answer with a letter."""
    lines = [f"{c.label}. {c.text}" for c in sample.choices if c.text]
    return "\n".join([sample.question, *lines, LETTER_PROMPT])


def mean(scores: Sequence[Score]) -> float:
    """Share of right answers; unscored items do not count."""
    values = [s.correct for s in scores if s.correct is not None]
    return sum(values) / len(values) if values else float("nan")


def by(key: str, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
    """Accuracy per value of a field of `meta`, as `key/value`."""
    parts: dict[str, list[Score]] = defaultdict(list)
    for sample, score in zip(samples, scores, strict=True):
        parts[str(sample.meta[key])].append(score)
    return {f"{key}/{value}": mean(parts[value]) for value in sorted(parts)}


class Public(Task):
    """A benchmark that others published; see the module docstring."""

    @options
    class Config:
        data_root: str = "data"
        """Folder that holds a folder per benchmark."""
        prompt: str = ""
        """Name of the prompt; empty is the first."""
        protocol: Literal["", "generate", "likelihood"] = ""
        """How items are answered; empty is the card's way."""

    card: ClassVar[Card]
    sources: ClassVar[tuple[Source, ...]]
    """Looked for in this order."""
    prompts: ClassVar[dict[str, Prompt]] = {"letter": letter_prompt}
    scorers: ClassVar[dict[str, Scorer]] = {}
    """Rules beyond those of `_parse.SCORERS`; `default` is what is used unless another is named."""
    label_version: ClassVar[str] = ""
    """Which labels the figures rest on, where several are about."""
    categories: ClassVar[tuple[str, ...]] = ("category",)
    """Fields of `meta` by which accuracy is broken down."""

    def __init__(self, **given: Any) -> None:
        self.config = parse(self.Config, given, f"tasks.{self.name}")
        self.prompt = self.config.prompt or next(iter(self.prompts))
        if self.prompt not in self.prompts:
            raise ConfigError(f"tasks.{self.name}.prompt: one of {', '.join(self.prompts)} (given {self.prompt!r})")

    @property
    def protocol(self) -> str:
        return self.config.protocol or self.card.protocol

    # ------------------------------------------------------------------ data

    def samples(self, split: str, n: int | None = None, offset: int = 0) -> Iterator[Sample]:
        if split not in self.card.splits:
            raise ConfigError(f"{self.name} has the splits {', '.join(self.card.splits)} (given {split!r})")
        stop = None if n is None else offset + n
        return islice(self.samples_in(self.folder, split), offset, stop)

    @property
    def folder(self) -> Path:
        """Where this benchmark's files are looked for."""
        return Path(self.config.data_root) / self.name

    def samples_in(self, folder: Path, split: str) -> Iterator[Sample]:
        """All samples of a split whose files lie in this folder; a warning where its rows are not as many as published.

        A row is read ahead, so that whoever takes just as many samples as are published hears of more or fewer.
        """
        size, rows = self.card.splits[split], self.rows(folder, split)
        labels = self._labels(self._source(folder, split))
        after, number = next(rows, None), -1
        while (row := after) is not None:
            after, number = next(rows, None), number + 1
            if after is None and number + 1 < size:
                log.warning("%s %s: %d rows, %d are published", self.name, split, number + 1, size)
            elif after is not None and number + 1 == size:
                log.warning("%s %s: more rows than the %d that are published", self.name, split, size)
            try:
                made = self.expand(row, split, number)
            except InputError as error:
                raise InputError(f"{self.name} {split}, row {number}: {error}") from None
            yield from (replace(s, meta=s.meta | {"labels": labels}) for s in made)
        if number < 0:
            log.warning("%s %s: no rows, %d are published", self.name, split, size)

    def rows(self, root: Path, split: str) -> Iterator[Row]:
        """Rows of the first source that is in the folder; else of the Hub.

        Raises:
            InputError: nothing is there; the message says what to fetch.
        """
        source, wanted = self._source(root, split), self.wants(root, split)
        if source is None:
            raise InputError(f"{self.name} {split}: no data. Put there: {wanted}")
        if source.found(root, split):
            return source.rows(root, split)
        return _or_explain(source.rows(root, split), f"{self.name} {split}: no data in {root}. Put there: {wanted}")

    def origin(self, split: str) -> Origin | None:
        """The file or data set that the split is read from; None where there is none."""
        source = self._source(self.folder, split)
        return None if source is None else replace(source.origin(self.folder, split), labels=self._labels(source))

    def _source(self, root: Path, split: str) -> Source | None:
        """The first that is in the folder, else the Hub."""
        here = (s for s in self.sources if s.found(root, split))
        return next(here, None) or next((s for s in self.sources if isinstance(s, HubRows)), None)

    def _labels(self, source: Source | None) -> str:
        return (source.labels if source is not None else "") or self.label_version

    def wants(self, root: Path, split: str) -> str:
        """What to fetch for a split, and where to put it."""
        return "; or ".join(source.wants(root, split) for source in self.sources if source.holds(split))

    def expand(self, row: Row, split: str, number: int) -> list[Sample]:
        """The samples of one row: one, unless a benchmark asks several questions of a row."""
        return [self.sample(row, split, number)]

    @abstractmethod
    def sample(self, row: Row, split: str, number: int) -> Sample:
        """What a row means, whichever source it is from."""

    def make(
        self,
        split: str,
        number: int,
        *,
        question: str,
        images: Sequence[Any],
        answer: Any = "",
        options: Sequence[str] = (),
        group: str = "",
        key: str = "",
        **meta: Any,
    ) -> Sample:
        """A sample in the common shape.

        Args:
            split: as asked for.
            number: of the row.
            question: without its options.
            images: pictures or paths, in the order of the question.
            answer: of the row, in whatever form; of a question without options the answer itself.
            options: texts of the options; their labels are letters.
            group: ties items that count together.
            key: told apart from other samples of the same row.
            meta: plain JSON; categories by which figures are broken down.
        """
        listed: list[Choice] = choices(options)
        index = answer_index(answer, options) if options and answer not in ("", None) else -1
        label = listed[index].label if index >= 0 else "" if answer is None or options else str(answer)
        return self._sample(split, number, question, images, listed, label, index, group, key, meta)

    def yes_no(
        self, split: str, number: int, *, question: str, images: Sequence[Any], yes: bool, group: str = "", **meta: Any
    ) -> Sample:
        """A sample that is answered by yes or no."""
        label = "yes" if yes else "no"
        both = [Choice("yes"), Choice("no")]
        return self._sample(split, number, question, images, both, label, 0 if yes else 1, group, "", meta)

    def _sample(
        self,
        split: str,
        number: int,
        question: str,
        images: Sequence[Any],
        listed: list[Choice],
        label: str,
        index: int,
        group: str,
        key: str,
        meta: dict[str, Any],
    ) -> Sample:
        return Sample(
            id=f"{self.name}-v{self.version}-{split}-{number:06d}{f'-{key}' if key else ''}",
            task=self.name,
            split=split,
            group=group,
            question=question,
            images=list(images),
            prompt_images=list(range(len(images))),
            hops=[],
            choices=listed,
            answer=label,
            answer_index=index,
            answer_text=f"The answer is {label}." if label else "",
            difficulty={},
            meta={**meta, "source": self.card.ids[0], "license": self.card.license},
        )

    # ------------------------------------------------------------------ prompts and scores

    def messages(self, sample: Sample, style: str | None = None) -> list[dict[str, Any]]:
        """The question as one chat message: pictures first, or where the text has `<image 1>`.

        Args:
            sample: one of ours.
            style: name of a prompt; the ways to think have none of their own here and get the configured one.
                `question` is what is asked, with no options and no instruction.
        """
        if style == "question":
            told = [str(sample.meta.get(key) or "") for key in ("context", "hint")]
            text = "\n".join(part for part in (*told, sample.question) if part)
        else:
            text = self.prompts[style if style in self.prompts else self.prompt](sample)
        images = [{"type": "image", "image": sample.images[i]} for i in sample.prompt_images]
        content: list[dict[str, Any]] = []
        end, used = 0, set[int]()
        for tag in _TAG.finditer(text):
            which = int(tag[1] or 1) - 1
            if which >= len(images):
                continue
            content += [*_text(text[end : tag.start()]), images[which]]
            used.add(which)
            end = tag.end()
        rest = [image for i, image in enumerate(images) if i not in used]
        return [{"role": "user", "content": [*rest, *content, *_text(text[end:])]}]

    def score(self, sample: Sample, completion: str, scorer: str | None = None) -> Score:
        name = scorer or ("default" if "default" in self.scorers else "strict")
        if name in self.scorers:
            verdict = self.scorers[name](sample, completion)
            known_answer = verdict.correct is not None and sample.answer  # some splits hide theirs
            correct = float(verdict.correct or 0) if known_answer else None
            known = next(k for k, rule in self.scorers.items() if rule is self.scorers[name] and k != "default")
            return Score(correct, verdict.prediction, verdict.prediction is not None, known)
        if name not in _parse.SCORERS:
            known = ", ".join(sorted({*_parse.SCORERS, *self.scorers} - {"default"}))
            raise ConfigError(f"{self.name}: no scorer named {name!r}; one of {known}")
        return super().score(sample, completion, name)

    def metrics(self, samples: Sequence[Sample], scores: Sequence[Score]) -> dict[str, float]:
        """The figures that are usual for the benchmark; `accuracy` is always among them."""
        out = {"accuracy": mean(scores), "parsed": sum(s.parsed for s in scores) / max(len(scores), 1)}
        for key in self.categories:
            out |= by(key, samples, scores)
        return out


def _text(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}] if text.strip() else []


def _or_explain(rows: Iterator[Row], message: str) -> Iterator[Row]:
    """The rows; an error before the first of them says what would have helped."""
    try:
        head = next(rows, None)
    except (InputError, ImportError) as error:
        raise InputError(f"{message} ({error})") from None
    if head is not None:
        yield head
        yield from rows
