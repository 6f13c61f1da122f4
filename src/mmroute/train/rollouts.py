"""What a model answers, batch by batch, with everything a gate may look at.

One session per batch reads the prompts, is rated if there is a rater, and goes on to write.

Legend: B rows, T generated tokens, V vocabulary, L layers, D hidden.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmroute import cost
from mmroute.backbones.images import prepare
from mmroute.bench.items import _tower_flops
from mmroute.decoding import end_ids, sample
from mmroute.engine.attach import Routed
from mmroute.gate._statistics import statistics
from mmroute.gate.base import Prefill, Ratings
from mmroute.gate.prp import Prp, stacked
from mmroute.session import Session
from mmroute.tokens import NUM_MODALITIES, Modality
from mmroute.trace import Shape

__all__ = ["Rollout", "answer_flops", "roll_out"]


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


@torch.no_grad()
def roll_out(
    routed: Routed,
    chats: Sequence[list[dict[str, Any]]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seeds: Sequence[int] | None = None,
    rater: Prp | None = None,
    template: Mapping[str, Any] | None = None,
) -> tuple[list[Rollout], Ratings | None]:
    """Answers of one batch, each as it would be alone, and ratings before the first token, or where the rater says.

    Args:
        routed: an attached model with its processor.
        chats: conversations.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        seeds: one per conversation.
        rater: on this model; it changes no answer.
        template: variables of the chat template.
    """
    began = time.perf_counter()
    tokenizer = routed.processor.tokenizer
    batch = prepare(routed.model, routed.processor, chats, template)
    session = Session(routed, reserve=max_new_tokens)
    with _watching(routed, batch["attention_mask"]) as states:
        logits = session.append(batch)
    read = time.perf_counter()
    looks = _Looks(rater, session)
    if looks.after == 0:
        looks.take(session.rows)
    B = len(chats)
    draw = [torch.Generator().manual_seed(seed) for seed in (seeds or range(B))]
    ends = end_ids(routed)
    ids: list[list[int]] = [[] for _ in chats]
    figures = np.full((3, B, max_new_tokens), np.nan)  # log-probability, entropy, margin
    last = np.zeros((B, session.routed.controller.shape.hidden), np.float32)
    tap: dict[str, Tensor] = {}
    handle = routed.family.text_model(routed.model).norm.register_forward_hook(
        lambda module, args, out: tap.__setitem__("state", out[:, -1])
    )
    try:
        for step in range(max_new_tokens):
            token = sample(logits, temperature, 1.0, [draw[r] for r in session.rows])
            figures[:, session.rows, step] = _figures(logits, token)
            values = token.tolist()
            for row, value in zip(session.rows, values, strict=True):
                ids[row].append(value)
            stays = [i for i, value in enumerate(values) if value not in ends]
            if not stays or step + 1 == max_new_tokens:
                looks.take(session.rows)
                break
            looks.take([row for i, row in enumerate(session.rows) if i not in stays])
            if len(stays) < len(values):
                session.keep_rows(stays)
                token = token[torch.tensor(stays, device=token.device)]
            logits = session.step(token)
            last[session.rows] = tap["state"].float().cpu().numpy()
            if step + 1 == looks.after:
                looks.take(session.rows)
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
        flops = answer_flops(routed.controller.shape, prompt[b] - vision[b], vision[b], len(ids[b]) - 1)
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
                seconds=((read - began) / B, looks.seconds / B, (done - read - looks.seconds) / B),
            )
        )
    return out, looks.ratings(B)


class _Looks:
    """When a batch is rated: every row once, behind so many tokens, or at the end of a shorter answer."""

    def __init__(self, rater: Prp | None, session: Session) -> None:
        self._rater, self._session = rater, session
        self.after = rater.config.decide_after if rater is not None else -1
        self.seconds = 0.0
        self._found: dict[int, tuple[Ratings, int]] = {}

    def take(self, rows: Sequence[int]) -> None:
        """Rates these rows as they stand, unless that has been done."""
        if self._rater is None or all(row in self._found for row in rows):
            return
        began = time.perf_counter()
        ratings = self._rater.rate_session(self._session)
        for i, row in enumerate(self._session.rows):
            if row in rows:
                self._found.setdefault(row, (ratings, i))
        self.seconds += time.perf_counter() - began

    def ratings(self, num: int) -> Ratings | None:
        return None if self._rater is None else stacked([self._found[row] for row in range(num)])


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


def answer_flops(shape: Shape, text: int, vision: int, steps: int) -> tuple[float, float]:
    """What a stock model spends on so many prompt positions, and on them and so many steps; without its tower."""
    return _flops_cached(tuple(sorted(dataclasses.asdict(shape).items())), text, vision, steps)
