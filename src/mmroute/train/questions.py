"""What gates ask a model besides the question itself: "is that right?", or a number; each call is charged."""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mmroute.backbones.images import prepare
from mmroute.bench.items import _tower_flops
from mmroute.engine.attach import Routed
from mmroute.gate.base import Question
from mmroute.session import Session
from mmroute.tokens import Modality
from mmroute.train.rollouts import answer_flops, roll_out

__all__ = ["ask"]

_NUMBER_TOKENS = 6
"""Longest reply to a question for a number."""


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
        without a number of its own counts as 50.
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
            numbers = [re.search(r"\b\d+(\.\d+)?\b", each.text) for each in rolled]
            out += [(float(n[0]) if n else 50.0, each.flops) for n, each in zip(numbers, rolled, strict=True)]
            continue
        given = prepare(routed.model, routed.processor, asked)
        logp = Session(routed).append(given).float().log_softmax(-1)
        first, second = (logp[:, ids[0]] for ids in options)
        vision = (routed.controller.table[given["input_ids"]] == int(Modality.VISION)).sum(1).tolist()
        length = given["attention_mask"].sum(1).tolist()
        shares = (first - second).sigmoid().tolist()
        if question.draws:
            shares = [_drawn(p, question.draws, chat) for p, chat in zip(shares, asked, strict=True)]
        tower = (_tower_flops(routed, given) or 0) / len(asked)
        out += [
            (reply, answer_flops(shape, n - v, v, 0)[0] + tower)
            for reply, n, v in zip(shares, length, vision, strict=True)
        ]
    return out


def _drawn(probability: float, draws: int, chat: list[dict[str, Any]]) -> float:
    """The share of successes; it depends on the words of the conversation alone, so asking again brings the same."""
    words = [block["text"] for message in chat for block in message["content"] if block["type"] == "text"]
    rng = np.random.default_rng(zlib.crc32("\n".join(words).encode()))
    return float((rng.random(draws) < probability).mean())


def _followed(chat: list[dict[str, Any]], answer: str | None, question: str) -> list[dict[str, Any]]:
    said = [] if answer is None else [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return [*chat, *said, {"role": "user", "content": [{"type": "text", "text": question}]}]
