"""Teacher-forced chains: is every word of the right chain the most likely one, and the answer right behind it?

The right words enter as the model's own would, hop by hop on the routed cache: all run, hops are closed, pictures enter
between steps. So a chain is exact here where greedy decoding writes it word for word (`exact_chains`); the answer
behind a right chain is what only this tells.

Legend: B batch, N words of a hop, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mmroute.bench import items
from mmroute.engine.attach import Routed
from mmroute.segment import place_relevance
from mmroute.session import Session
from mmroute.tasks.base import Generated, Sample, Spec, Task
from mmroute.think.base import LookingThinker, Thinker

__all__ = ["Forced", "exact_chains", "force_chains"]


@dataclass(frozen=True)
class Forced:
    """0 or 1 per item, in order."""

    exact: list[int]
    """Every word was the most likely one, the closing one included."""
    answers: list[int]
    """The answer was, whatever came before it."""


@torch.no_grad()
def force_chains(routed: Routed, think: Thinker, task: Task, prompts: items.Prompts) -> Forced | None:
    """Chains of the whole list; None where no right chain is known in the model's own words."""
    golds = _golds(routed, think, task, prompts.samples)
    if golds is None:
        return None
    exact: list[int] = []
    answers: list[int] = []
    for asked in prompts.batches(routed, task, think):
        right = _right(routed, think, asked, golds[len(exact) : len(exact) + len(asked.samples)])
        exact += [int(all(row)) for row in right]
        answers += [int(row[-2]) for row in right]  # before the closing word
    return Forced(exact, answers)


def exact_chains(
    routed: Routed, think: Thinker, task: Task, samples: Sequence[Sample], written: Sequence[list[int]]
) -> list[int] | None:
    """0 or 1 per item: what was written is the right chain, word for word; None where none is known."""
    golds = _golds(routed, think, task, samples)
    return None if golds is None else [int(w == gold) for w, gold in zip(written, golds, strict=True)]


def _golds(routed: Routed, think: Thinker, task: Task, samples: Sequence[Sample]) -> list[list[int]] | None:
    """Ids of the right responses; None if the task knows none, the vocabulary cannot write them, or they hold more
    than words."""
    if not isinstance(task, Generated) or think.draws or isinstance(think, LookingThinker):
        return None
    tokenizer = routed.processor.tokenizer
    style: Any = think.style
    responses = [task.words(Spec.from_dict(sample.meta["spec"]), style).response for sample in samples]
    golds = [[tokenizer.convert_tokens_to_ids(word) for word in response] for response in responses]
    unknown = {None, tokenizer.unk_token_id}
    return None if any(i in unknown for gold in golds for i in gold) else golds


def _right(routed: Routed, think: Thinker, asked: items.Asked, golds: list[list[int]]) -> list[list[bool]]:
    """[row][word]: whether the word was the most likely one."""
    tokenizer, device = routed.processor.tokenizer, routed.model.device
    begins = {i: think.starts_hop(tokenizer.decode([i])) for gold in golds for i in gold}
    hops = [_hops(gold, begins) for gold in golds]
    pictures: list[list[Any]] = [items.observations(sample) for sample in asked.samples]
    relevance = items.relevance(routed, asked.samples, asked.batch)
    session = Session(routed, reserve=max(map(len, golds)))
    logits = session.append(asked.batch, place_relevance(relevance, asked.batch, routed))
    right: list[list[bool]] = [[] for _ in golds]
    for h in range(max(map(len, hops))):
        words = [row[h] if h < len(row) else [] for row in hops]
        width = max(map(len, words))
        ids = torch.tensor([[0] * (width - len(w)) + w for w in words], device=device)
        mask = torch.tensor([[0] * (width - len(w)) + [1] * len(w) for w in words], device=device)
        out = session.write(ids, mask, [h + 1] * len(words))
        first, rest = logits.argmax(-1).tolist(), out.argmax(-1).tolist()
        for b, row in enumerate(words):
            said = [first[b], *rest[b][width - len(row) :]]
            right[b] += [a == w for a, w in zip(said, row, strict=False)]
        logits = out[:, -1]
        goes_on = [h + 1 < len(row) for row in hops]
        due = [b for b, on in enumerate(goes_on) if on and begins[words[b][0]] and pictures[b]]
        if due:
            shown = {b: pictures[b].pop(0) for b in due}
            truth = None if relevance is None else [r if b in shown else [] for b, r in enumerate(relevance)]
            seen = session.observe([shown.get(b) for b in range(len(words))], [h + 1] * len(words), truth)
            logits[due] = seen[due]
        session.close_hop([h + 1 if on else -1 for on in goes_on])
    return right


def _hops(gold: list[int], begins: dict[int, bool]) -> list[list[int]]:
    """Cut where the thinker begins a hop, as rolling out does."""
    out: list[list[int]] = [[]]
    for i, word in enumerate(gold):
        if i and begins[word]:
            out.append([])
        out[-1].append(word)
    return out
