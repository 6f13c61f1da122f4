"""Beam search on a session: the most likely answer rather than the most likely next word.

Legend: B conversations, W beams of each, V vocabulary.

Source: stock `generate(num_beams=W)`, whose answers these are.
Deviates: it begins from logits, which latent steps leave and a list of ids cannot say.
"""

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["search"]


class _Grows(Protocol):
    """What a search needs of a session."""

    def repeat_rows(self, times: int) -> None: ...

    def reorder_rows(self, index: Tensor) -> None: ...

    def step(self, ids: Tensor, hops: list[int] | None = None) -> Tensor: ...


def search(
    session: _Grows, logits: Tensor, beams: int, limit: int, ends: Collection[int | None], hop: int
) -> list[list[int]]:
    """[conversation]: ids of its best answer, by mean log-likelihood of a word.

    Args:
        session: its rows become `beams` times as many.
        logits: (B, V) of the first word.
        beams: per conversation.
        limit: longest answer.
        ends: ids that end one.
        hop: the hop that the words belong to.
    """
    B, device = len(logits), logits.device
    session.repeat_rows(beams)
    logits = logits.repeat_interleave(beams, 0)
    score = torch.full((B, beams), float("-inf"), device=device)
    score[:, 0] = 0  # all beams are one at first
    written: list[list[list[int]]] = [[[] for _ in range(beams)] for _ in range(B)]
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in range(B)]
    for length in range(1, limit + 1):
        whole = score[..., None] + logits.float().log_softmax(-1).view(B, beams, -1)
        # Each beam may propose every end, so that many more candidates leave W that go on.
        best, at = whole.flatten(1).topk(beams * (1 + len(ends)), dim=1)
        values, places = best.tolist(), at.tolist()
        V = logits.shape[-1]
        order, words, after = [], [], []
        for b in range(B):
            alive: list[tuple[float, int, int]] = []
            for rank, (value, place) in enumerate(zip(values[b], places[b], strict=True)):
                beam, word = divmod(place, V)
                if word in ends:
                    if rank < beams:
                        finished[b].append((value / length, [*written[b][beam], word]))
                elif len(alive) < beams:
                    alive.append((value, beam, word))
            finished[b] = sorted(finished[b], key=lambda pair: -pair[0])[:beams]
            order += [b * beams + beam for _, beam, _ in alive]
            words += [word for _, _, word in alive]
            after.append([value for value, _, _ in alive])
            written[b] = [[*written[b][beam], word] for _, beam, word in alive]
        score = torch.tensor(after, device=device)
        if length == limit or all(
            len(done) == beams and done[-1][0] >= alive[0] / length for done, alive in zip(finished, after, strict=True)
        ):
            break
        session.reorder_rows(torch.tensor(order, device=device))
        logits = session.step(torch.tensor(words, device=device), [hop] * (B * beams))
    out = []
    for done, texts, values_of in zip(finished, written, after, strict=True):
        going = [(value / len(ids), ids) for value, ids in zip(values_of, texts, strict=True)]
        complete = len(done) == beams and done[-1][0] >= going[0][0]
        out.append(max(done if complete else [*done, *going], key=lambda pair: pair[0])[1])
    return out
