"""What draft and target answer, with everything a gate may look at: collected once, resumed where it was killed.

One session per batch reads the prompts, is rated if there is a rater, and goes on to write. Each row of the outcomes
table is written as soon as it is known; hidden states lie beside it.

Legend: B rows, T generated tokens, V vocabulary, L layers, D hidden.
"""

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmroute import cost
from mmroute.backbones.images import prepare
from mmroute.bench.items import _tower_flops, messages
from mmroute.bench.outcomes.base import UNKNOWN, Row, read_rows
from mmroute.engine.attach import Routed
from mmroute.gate._statistics import statistics
from mmroute.gate.base import Prefill, Question, Ratings
from mmroute.gate.prp import Prp, fingerprint
from mmroute.reason import Session, _end_ids, _sample
from mmroute.tasks._mixture import Drawn
from mmroute.think.base import Thinker
from mmroute.tokens import NUM_MODALITIES, Modality
from mmroute.trace import Shape

__all__ = ["Collected", "Rollout", "ask", "collect", "prompt_hash", "roll_out"]

log = logging.getLogger(__name__)

_NUMBER_TOKENS = 6
"""Longest reply to a question for a number."""


@dataclass
class Rollout:
    """One answer, and what was seen on the way."""

    text: str
    ids: list[int]
    stats: dict[str, float]
    finished: bool
    prompt_tokens: int
    image_tokens: int
    flops: float
    prefill_flops: float
    prefill: Prefill
    last: np.ndarray
    seconds: tuple[float, float, float]
    """Of prefill, rating and decode; the batch's, divided by its rows."""


@dataclass
class Collected:
    """The rows of one role, and what the files do not hold."""

    rows: list[Row]
    prefill: dict[str, Prefill] = field(default_factory=dict)
    """By query id."""
    last: dict[str, np.ndarray] = field(default_factory=dict)
    """State at the end of the answer."""
    texts: dict[str, str] = field(default_factory=dict)
    """The answers themselves."""
    ratings: list[tuple[list[str], Ratings]] = field(default_factory=list)
    """Query ids of a batch and what the rater said of them."""


@torch.no_grad()
def roll_out(
    routed: Routed,
    chats: Sequence[list[dict[str, Any]]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    rater: Prp | None = None,
) -> tuple[list[Rollout], Ratings | None]:
    """Answers of one batch, each as it would be alone, and ratings taken between reading and writing.

    Args:
        routed: an attached model with its processor.
        chats: conversations.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        seeds: one per conversation.
        rater: on this model; it changes no answer.
    """
    began = time.perf_counter()
    tokenizer = routed.processor.tokenizer
    batch = prepare(routed.model, routed.processor, chats)
    session = Session(routed, reserve=max_new_tokens)
    with _watching(routed, batch["attention_mask"]) as states:
        logits = session.append(batch)
    read = time.perf_counter()
    ratings = rater.rate_session(session) if rater is not None else None
    started = time.perf_counter()
    B = len(chats)
    draw = [torch.Generator().manual_seed(seed) for seed in (seeds or range(B))]
    ends = _end_ids(routed)
    ids: list[list[int]] = [[] for _ in chats]
    figures = np.full((3, B, max_new_tokens), np.nan)  # log-probability, entropy, margin
    last = np.zeros((B, session.routed.controller.shape.hidden), np.float32)
    tap: dict[str, Tensor] = {}
    handle = routed.family.text_model(routed.model).norm.register_forward_hook(
        lambda module, args, out: tap.__setitem__("state", out[:, -1])
    )
    try:
        for step in range(max_new_tokens):
            token = _sample(logits, temperature, 1.0, [draw[r] for r in session.rows])
            figures[:, session.rows, step] = _figures(logits, token)
            values = token.tolist()
            for row, value in zip(session.rows, values, strict=True):
                ids[row].append(value)
            stays = [i for i, value in enumerate(values) if value not in ends]
            if not stays or step + 1 == max_new_tokens:
                break
            if len(stays) < len(values):
                session.keep_rows(stays)
                token = token[torch.tensor(stays, device=token.device)]
            logits = session.step(token)
            last[session.rows] = tap["state"].float().cpu().numpy()
    finally:
        handle.remove()
    done = time.perf_counter()
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]
    longest = max(map(len, ids))
    real = np.arange(longest) < np.array([len(row) for row in ids])[:, None]
    answer = np.arange(longest) >= np.array([_answer_from(tokenizer, row) for row in ids])[:, None]
    lp, entropy, margin = figures[:, :, :longest]
    stats = statistics(lp, entropy, margin, real, answer & real)
    vision = (routed.controller.table[batch["input_ids"]] == int(Modality.VISION)).sum(1).tolist()
    prompt = batch["attention_mask"].sum(1).tolist()
    tower = _tower_flops(routed, batch)
    per_row = (tower or 0) / B
    out = []
    for b in range(B):
        flops = _flops(routed.controller.shape, prompt[b] - vision[b], vision[b], len(ids[b]) - 1)
        out.append(
            Rollout(
                text=texts[b],
                ids=ids[b],
                stats={name: float(values[b]) for name, values in stats.items()},
                finished=ids[b][-1] in ends,
                prompt_tokens=prompt[b],
                image_tokens=vision[b],
                flops=flops[1] + per_row,
                prefill_flops=flops[0] + per_row,
                prefill=Prefill(states["last"][b], states["mean"][b]),
                last=last[b],
                seconds=((read - began) / B, (started - read) / B, (done - started) / B),
            )
        )
    return out, ratings


@contextmanager
def _watching(routed: Routed, mask: Tensor) -> Iterator[dict[str, np.ndarray]]:
    """Hidden states of the prompt behind each layer: of the last position, and their mean over real ones."""
    found: dict[str, list[np.ndarray]] = {"last": [], "mean": []}
    weight = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1)

    def keep(module: Any, args: Any, out: Any) -> None:
        x = (out[0] if isinstance(out, tuple) else out).float()
        found["last"].append(x[:, -1].cpu().numpy())
        found["mean"].append((x * weight).sum(1).cpu().numpy())

    layers = routed.family.text_model(routed.model).layers
    handles = [layer.register_forward_hook(keep) for layer in layers]
    stacked: dict[str, np.ndarray] = {}
    try:
        yield stacked
    finally:
        for handle in handles:
            handle.remove()
    stacked.update({name: np.stack(values, 1) for name, values in found.items()})


def _figures(logits: Tensor, token: Tensor) -> np.ndarray:
    """(3, b): log-probability of the token, entropy, margin of the best over the second."""
    logp = logits.float().log_softmax(-1)
    best = logp.topk(2, dim=-1).values
    chosen = logp.gather(1, token[:, None])[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    return torch.stack([chosen, entropy, best[:, 0] - best[:, 1]]).cpu().numpy()


def _answer_from(tokenizer: Any, ids: list[int]) -> int:
    """First token behind the last word "answer"; the last token where the text has no such word."""
    text = tokenizer.decode(ids).lower()
    if "answer" not in text:
        return len(ids) - 1
    head = text[: text.rindex("answer") + len("answer")]
    low, high = 0, len(ids)
    while low < high:  # the shortest beginning of the ids that holds the word
        middle = (low + high) // 2
        low, high = (low, middle) if len(tokenizer.decode(ids[:middle]).lower()) >= len(head) else (middle + 1, high)
    return min(low, len(ids) - 1)


@lru_cache(maxsize=4096)
def _flops_cached(shape: tuple, text: int, vision: int, steps: int) -> tuple[float, float]:
    new = [0] * NUM_MODALITIES
    new[Modality.TEXT], new[Modality.VISION] = text, vision
    made = Shape(**dict(shape))
    whole = cost.estimate_flops(cost.planned_trace(made, [new], decode_steps=steps)).total
    return float(cost.estimate_flops(cost.planned_trace(made, [new])).total), float(whole)


def _flops(shape: Shape, text: int, vision: int, steps: int) -> tuple[float, float]:
    return _flops_cached(tuple(sorted(dataclasses.asdict(shape).items())), text, vision, steps)


# ---------------------------------------------------------------------- questions besides


@torch.no_grad()
def ask(
    routed: Routed, question: Question, chats: Sequence[list[dict[str, Any]]], answers: Sequence[str], batch: int = 32
) -> list[tuple[float, float]] | None:
    """What a model replies to a gate's question about each of its answers, and the FLOPs that took.

    Args:
        routed: the model.
        question: of a gate.
        chats: the conversations so far.
        answers: what it answered to each.
        batch: conversations at once.

    Returns:
        Per conversation the reply and its FLOPs; None where the model's vocabulary cannot write the question. A reply
        without a number counts as 50.
    """
    tokenizer, shape = routed.processor.tokenizer, routed.controller.shape
    words = tokenizer(question.text, add_special_tokens=False)["input_ids"]
    options = [tokenizer(option, add_special_tokens=False)["input_ids"] for option in question.options]
    if tokenizer.unk_token_id in (*words, *(i for ids in options for i in ids)) or any(
        len(ids) != 1 for ids in options
    ):
        return None
    out: list[tuple[float, float]] = []
    for start in range(0, len(chats), batch):
        asked = [
            _followed(chat, answer if question.after_answer else None, question.text)
            for chat, answer in zip(chats[start : start + batch], answers[start : start + batch], strict=True)
        ]
        if not options:
            rolled, _ = roll_out(routed, asked, max_new_tokens=_NUMBER_TOKENS)
            numbers = [re.search(r"\d+(\.\d+)?", each.text) for each in rolled]
            out += [(float(n[0]) if n else 50.0, each.flops) for n, each in zip(numbers, rolled, strict=True)]
            continue
        given = prepare(routed.model, routed.processor, asked)
        logp = Session(routed).append(given).float().log_softmax(-1)
        first, second = (logp[:, ids[0]] for ids in options)
        vision = (routed.controller.table[given["input_ids"]] == int(Modality.VISION)).sum(1).tolist()
        length = given["attention_mask"].sum(1).tolist()
        tower = (_tower_flops(routed, given) or 0) / len(asked)
        out += [
            (reply, _flops(shape, n - v, v, 0)[0] + tower)
            for reply, n, v in zip((first - second).sigmoid().tolist(), length, vision, strict=True)
        ]
    return out


def _followed(chat: list[dict[str, Any]], answer: str | None, question: str) -> list[dict[str, Any]]:
    said = [] if answer is None else [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return [*chat, *said, {"role": "user", "content": [{"type": "text", "text": question}]}]


# ---------------------------------------------------------------------- a whole role


def collect(
    routed: Routed,
    role: str,
    name: str,
    items: Sequence[Drawn],
    *,
    think: Thinker,
    file: Path | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    batch: int = 64,
    rater: Prp | None = None,
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
        samples: answers per item; more than one needs a temperature.
        temperature: 0 is greedy.
        batch: conversations at once; changes no answer.
        rater: rates between reading and writing.
        progress: told items done and items in all.

    Returns:
        Rows in the order of items and samples; hidden states and ratings of what was asked now, from the first sample.
    """
    revision = fingerprint(routed.model)[:16]
    settings = {"temperature": temperature, "max_new_tokens": think.max_new_tokens}
    generation = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    known = {row.key: row for row in _known(file)}
    out = Collected([])
    todo: list[tuple[Drawn, int, str, list[dict[str, Any]]]] = []
    for item in items:
        chat = messages(routed, item.task, item.sample, think)
        digest = prompt_hash(item)
        todo += [
            (item, sample, digest, chat)
            for sample in range(samples)
            if (digest, name, revision, generation, sample) not in known or (rater is not None and sample == 0)
        ]
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch]
        rolled, ratings = roll_out(
            routed,
            [chat for *_, chat in part],
            max_new_tokens=think.max_new_tokens,
            temperature=temperature,
            seeds=[int(digest[:8], 16) + sample for _, sample, digest, _ in part],
            rater=rater,
        )
        fresh = []
        for (item, sample, digest, _), wrote in zip(part, rolled, strict=True):
            row = _row(item, wrote, role, name, revision, generation, sample, digest)
            if row.key not in known:
                known[row.key] = row
                fresh.append(row)
            if sample == 0:
                out.prefill[item.sample.id], out.last[item.sample.id] = wrote.prefill, wrote.last
                out.texts[item.sample.id] = wrote.text
        if ratings is not None:
            out.ratings.append(([item.sample.id for item, *_ in part], ratings))
        if file is not None and fresh:
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in fresh))
        if progress is not None:
            progress(min(start + batch, len(todo)), len(todo))
    for item in items:
        digest = prompt_hash(item)
        # Two questions may have the same picture and words: they share an answer, not an id.
        own: dict[str, Any] = {"query_id": item.sample.id, "level": item.part.label, "group": item.group}
        for sample in range(samples):
            out.rows.append(dataclasses.replace(known[digest, name, revision, generation, sample], **own))
    return out


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
