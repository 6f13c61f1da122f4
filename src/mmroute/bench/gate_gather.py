"""Both models of a pair on the same questions, with all that gates may look at; asked once, kept in a folder.

Legend: n queries.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from mmroute.bench.gate_judge import evidence_of
from mmroute.bench.items import messages
from mmroute.bench.outcomes.base import Outcomes, pair_up
from mmroute.engine.attach import Routed, attach
from mmroute.files import write_text
from mmroute.gate.base import Evidence, Question, Ratings
from mmroute.gate.prp import Prp, fingerprint
from mmroute.recipe import Recipe
from mmroute.tasks._mixture import Drawn, draw_mixture
from mmroute.train.collect import Collected, collect
from mmroute.train.prompts import Prompts
from mmroute.train.prp_config import sections
from mmroute.train.questions import ask

__all__ = ["Gathered", "gather", "rate_chats"]

log = logging.getLogger(__name__)

_AT_ONCE = 32


@dataclass(frozen=True)
class Gathered:
    """Both models' answers to the same questions."""

    items: list[Drawn]
    outcomes: Outcomes
    evidence: list[Evidence]
    kinds: list[str]
    """What kind of question each is: its part of the mixture and its size and length."""
    asked: int
    """Answers that were not known before."""


def gather(
    recipe: Recipe,
    draft: Any,
    target: Any,
    n: int,
    seed: int,
    split: Literal["val", "test"],
    *,
    samples: int = 0,
    questions: Sequence[Question] = (),
    work: Path | None = None,
) -> Gathered:
    """Asks both models.

    Args:
        recipe: with a `gate` section.
        draft: a loaded model.
        target: likewise.
        n: questions.
        seed: which.
        split: `val` or `test`.
        samples: sampled draft answers besides.
        questions: what gates ask the draft besides; those its vocabulary cannot write are left out.
        work: folder that keeps every answer; what it holds already is not asked again.
    """
    (gated, _), think = sections(recipe), recipe.build("think")
    items = draw_mixture(gated.mix, n, split, seed)
    at = lambda name: {} if work is None else {"file": work / f"{name}.jsonl"}  # noqa: E731
    with attach(draft) as routed:
        states = None if work is None else work / "states"
        given: dict[str, Any] = {"think": think, "progress": _told("draft"), "states": states, **at("draft")}
        first = collect(routed, "draft", gated.draft, items, **given)
        more = Collected([])
        if samples:
            drawn: dict[str, Any] = {"think": think, "progress": _told("samples"), **at("samples")}
            more = collect(routed, "draft", gated.draft, items, samples=samples, temperature=1.0, **drawn)
        texts = [first.seen[item.sample.id].text for item in items]
        replies: list[dict[str, float]] = [{} for _ in items]
        for question in questions:
            chats = [messages(routed, item.task, item.sample, think) for item in items]
            said = _asked(routed, question, chats, texts, [row.prompt_hash for row in first.rows], work)
            if said is None:
                log.info("%s is not asked: the draft's vocabulary cannot write it", question.name)
                continue
            for known, (reply, flops) in zip(replies, said, strict=True):
                known |= {question.name: reply, f"{question.name}.flops": flops}
    with attach(target) as routed:
        given = {"think": think, "progress": _told("target"), **at("target")}
        second = collect(routed, "target", gated.target, items, **given)
    outcomes = pair_up([*first.rows, *second.rows])
    outcomes.stats["tokens"] = np.array([row.tokens_out for row in first.rows], float)
    sampled: dict[str, list[str]] = {}
    for row in more.rows:
        sampled.setdefault(row.query_id, []).append(row.prediction)
    evidence = evidence_of(
        outcomes,
        {name: seen.prefill for name, seen in first.seen.items()},
        {name: seen.last for name, seen in first.seen.items()},
        sampled,
        dict(zip(outcomes.ids, replies, strict=True)),
        dict(zip([item.sample.id for item in items], texts, strict=True)),
    )
    asked = first.asked + more.asked + second.asked
    return Gathered(items, outcomes, evidence, [_kind(item) for item in items], asked)


def rate_chats(rater: Prp, chats: Sequence[list[dict[str, Any]]], batch: int = 64) -> Ratings:
    """What a rater says of conversations: one prefill of its draft and one position behind it.

    Args:
        rater: with weights.
        chats: the conversations.
        batch: at once; changes no rating.
    """
    parts, positions = [], 0
    for start in range(0, len(chats), batch):
        prompts = Prompts.of(rater, chats[start : start + batch], batch)
        parts.append(prompts.probs(rater))
        positions += int(prompts.mask.sum())
    return rater.ratings(torch.cat(parts), positions // len(chats))


def _told(role: str) -> Callable[[int, int], None]:
    return lambda done, total: log.info("%s: %d of %d answers", role, done, total)


def _kind(item: Drawn) -> str:
    return f"{item.part.label}: grid {item.sample.difficulty['grid']}, {item.sample.difficulty['hops']} hops"


def _asked(
    routed: Routed,
    question: Question,
    chats: Sequence[list[dict[str, Any]]],
    texts: Sequence[str],
    digests: Sequence[str],
    work: Path | None,
) -> list[tuple[float, float]] | None:
    """The replies to one question, those of the folder first."""
    asked = hashlib.sha256(repr(question).encode()).hexdigest()[:8]  # other words, other replies
    file = None if work is None else work / f"{question.name}-{asked}-{fingerprint(routed.model)[:16]}.jsonl"
    known: dict[str, tuple[float, float]] = {}
    if file is not None and file.exists():
        whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_text(file, "".join(whole))  # a line torn by a kill would swallow the next one
        known = {digest: (reply, flops) for digest, reply, flops in map(json.loads, whole)}
    left = [i for i, digest in enumerate(digests) if digest not in known]
    for start in range(0, len(left), _AT_ONCE):
        part = left[start : start + _AT_ONCE]
        said = ask(routed, question, [chats[i] for i in part], [texts[i] for i in part], _AT_ONCE)
        if said is None:
            return None
        known |= {digests[i]: pair for i, pair in zip(part, said, strict=True)}
        if file is not None:
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps([digests[i], *known[digests[i]]]) + "\n" for i in part))
    return [known[digest] for digest in digests]
