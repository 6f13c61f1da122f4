"""What draft and target answer to many questions: collected once, resumed where it was killed.

Each row of the outcomes table is written as soon as it is known; hidden states, which some gates look at, lie in files
of their own, one a batch, written before the rows they belong to.

Legend: L layers, D hidden.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmroute.bench.items import messages
from mmroute.bench.outcomes.base import UNKNOWN, Row, read_rows
from mmroute.engine.attach import Routed
from mmroute.gate.base import Prefill
from mmroute.gate.prp import fingerprint
from mmroute.tasks._mixture import Drawn
from mmroute.think.base import Thinker
from mmroute.train.rollouts import Rollout, roll_out

__all__ = ["Collected", "Seen", "collect", "prompt_hash"]


@dataclass(frozen=True)
class Seen:
    """What a row does not hold of a first sample."""

    prefill: Prefill
    """States behind the prompt."""
    last: np.ndarray
    """(D,): behind the answer."""
    text: str
    """The answer itself."""


@dataclass
class Collected:
    """The rows of one role in the order of items and samples."""

    rows: list[Row]
    seen: dict[str, Seen] = field(default_factory=dict)
    """By query id; without a folder of states, of what was asked now only."""
    asked: int = 0
    """Answers that were not known before."""


def collect(
    routed: Routed,
    role: str,
    name: str,
    items: Sequence[Drawn],
    *,
    think: Thinker,
    file: Path | None = None,
    states: Path | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    batch: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> Collected:
    """Answers of one model to every item, with one row for each sample.

    Args:
        routed: the model.
        role: `draft` or `target`.
        name: what rows call the model.
        items: the questions.
        think: what a hop is, and how long an answer may be.
        file: JSONL to append to; what it holds already is not asked again, a torn last line is cut off.
        states: folder that keeps what was seen of first samples; a first sample counts as known if it is there too.
        samples: answers per item; more than one needs a temperature.
        temperature: 0 is greedy.
        batch: conversations at once; changes no answer.
        progress: told items done and items in all.
    """
    revision = fingerprint(routed.model)[:16]
    settings = {"temperature": temperature, "max_new_tokens": think.max_new_tokens}
    generation = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    known = {row.key: row for row in _known(file)}
    kept = _Kept(states, f"{revision}-{generation}")
    digests = [prompt_hash(item) for item in items]
    key = lambda digest, sample: (digest, name, revision, generation, sample)  # noqa: E731
    todo: dict[tuple, tuple[Drawn, int, str, list[dict[str, Any]]]] = {}
    for item, digest in zip(items, digests, strict=True):
        chat = None
        for sample in range(samples):
            lost = states is not None and sample == 0 and digest not in kept.seen
            if key(digest, sample) not in known or lost:
                chat = chat or messages(routed, item.task, item.sample, think)
                todo.setdefault(key(digest, sample), (item, sample, digest, chat))
    left = list(todo.values())
    for start in range(0, len(left), batch):
        part = left[start : start + batch]
        rolled, _ = roll_out(
            routed,
            [chat for *_, chat in part],
            max_new_tokens=think.max_new_tokens,
            temperature=temperature,
            seeds=[int(digest[:8], 16) + sample for _, sample, digest, _ in part],
        )
        first = {d: Seen(w.prefill, w.last, w.text) for (_, s, d, _), w in zip(part, rolled, strict=True) if s == 0}
        if first:
            kept.add(first)
        fresh = []
        for (item, sample, digest, _), wrote in zip(part, rolled, strict=True):
            row = _row(item, wrote, role, name, revision, generation, sample, digest)
            if row.key not in known:
                known[row.key] = row
                fresh.append(row)
        if file is not None and fresh:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in fresh))
        if progress is not None:
            progress(min(start + batch, len(left)), len(left))
    out = Collected([], asked=len(left))
    for item, digest in zip(items, digests, strict=True):
        # Two questions may have the same picture and words: they share an answer, not an id.
        own: dict[str, Any] = {"query_id": item.sample.id, "level": item.part.label, "group": item.group}
        out.rows += [dataclasses.replace(known[key(digest, sample)], **own) for sample in range(samples)]
        if digest in kept.seen:
            out.seen[item.sample.id] = kept.seen[digest]
    return out


class _Kept:
    """States of one model under one way to write, by the prompt's hash: in memory, and in a folder if there is one.

    A file a batch: it is whole or not there, and a kill loses one batch at most.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self.folder, self.name = folder, name
        self.seen: dict[str, Seen] = {}
        for file in self._files():
            with np.load(file) as data:
                columns = (data[column] for column in ("digest", "last", "mean", "end", "text"))
                for digest, last, mean, end, text in zip(*columns, strict=True):
                    self.seen[str(digest)] = Seen(Prefill(last, mean), end, str(text))

    def _files(self) -> list[Path]:
        return [] if self.folder is None else sorted(self.folder.glob(f"{self.name}-*.npz"))

    def add(self, batch: dict[str, Seen]) -> None:
        self.seen |= batch
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = self.folder / ".part.npz"
        each = batch.values()
        mean: list[Any] = [s.prefill.mean for s in each]
        np.savez(
            beside,
            digest=np.array(list(batch)),
            last=np.stack([s.prefill.last for s in each]),
            mean=np.stack(mean),
            end=np.stack([s.last for s in each]),
            text=np.array([s.text for s in each]),
        )
        last = max((int(file.stem.rpartition("-")[2]) for file in self._files()), default=-1)
        beside.replace(self.folder / f"{self.name}-{last + 1:05d}.npz")


def _known(file: Path | None) -> list[Row]:
    """What the file holds; a line torn by a kill is cut off, so that the next one starts on its own."""
    if file is None or not file.exists():
        return []
    data = file.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with file.open("r+b") as stream:
            stream.truncate(whole)
    return read_rows(file) if whole else []


def _row(
    item: Drawn, wrote: Rollout, role: str, name: str, revision: str, generation: str, sample: int, digest: str
) -> Row:
    score = item.task.score(item.sample, wrote.text)
    right = (score.correct or 0.0) if wrote.finished else 0.0
    pixels = np.asarray(item.sample.images[item.sample.prompt_images[0]].convert("L"), float) / 255
    edges = float(np.abs(np.diff(pixels, axis=0)).mean() + np.abs(np.diff(pixels, axis=1)).mean())
    return Row(
        query_id=item.sample.id,
        role=role,  # type: ignore[arg-type]
        model=name,
        correct=right,
        task=item.task.name,
        level=item.part.label,
        group=item.group,
        split=item.sample.split,
        revision=revision,
        generation=generation,
        sample=sample,
        parsed=score.parsed,
        prediction=score.prediction or "",
        scorer=score.scorer,
        tokens_in=wrote.prompt_tokens,
        image_tokens=wrote.image_tokens,
        tokens_out=len(wrote.ids),
        ar_steps=len(wrote.ids),
        flops=wrote.flops,
        prefill_flops=wrote.prefill_flops,
        usd=UNKNOWN,
        prefill_s=wrote.seconds[0],
        decode_s=wrote.seconds[2],
        finish_reason="stop" if wrote.finished else "length",
        stats=wrote.stats,
        text=_prompt_text(item),
        pixels=(float(pixels.mean()), float(pixels.std()), edges),
        prompt_hash=digest,
    )


def _prompt_text(item: Drawn) -> str:
    blocks = item.task.messages(item.sample, "cot")[0]["content"]
    return " ".join(block["text"] for block in blocks if block["type"] == "text")


def prompt_hash(item: Drawn) -> str:
    """SHA-256 of what the models read: the words and the pixels."""
    digest = hashlib.sha256(_prompt_text(item).encode())
    for index in item.sample.prompt_images:
        digest.update(item.sample.images[index].tobytes())
    return digest.hexdigest()
