"""Seconds of a pair that is routed, over those of the target alone: both in turn, on the same questions.

What is timed is what a server does: read, rate, write greedily; nothing is kept for statistics. In a batch the draft
reads and rates all rows, those it keeps go on in it, and the others make a smaller batch for the target.

Legend: n questions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmroute.backbones.images import prepare
from mmroute.bench.measure import clock_of, one_thread
from mmroute.decoding import end_ids
from mmroute.engine.attach import Routed, attach
from mmroute.gate.prp import Prp
from mmroute.recipe import Recipe
from mmroute.session import Session
from mmroute.tasks._mixture import draw_mixture
from mmroute.train.prompts import chats_of
from mmroute.train.prp_config import sections

__all__ = ["Spent", "timed"]

Chat = list[dict[str, Any]]


@dataclass(frozen=True)
class Spent:
    """Seconds of one batch, and the decode steps of its longest answer, whose first token comes with the prompt."""

    prefill_s: float
    rating_s: float
    decode_s: float
    steps: int

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.rating_s + self.decode_s


def timed(
    recipe: Recipe,
    draft: Any,
    target: Any,
    rater: Prp,
    sent: np.ndarray,
    num: int,
    seed: int,
    at_once: int = 1,
    rounds: int = 5,
) -> dict[str, float]:
    """Seconds of a routed pair over always-target's, medians over rounds of each batch.

    Args:
        recipe: with a `gate` section.
        draft: a loaded model.
        target: likewise.
        rater: a `Prp` on this draft.
        sent: (n,) which of the questions of `seed` the target answers.
        num: how many of them are timed: of either kind in proportion, spread over all.
        seed: which.
        at_once: questions in a batch.
        rounds: counted ones; one more warms up.

    Returns:
        `ratio` of routed seconds over always-target's, and `rating_steps`, a rating over a decode step of the draft.
    """
    chosen = _in_proportion(sent, min(num, len(sent)))
    think = recipe.build("think")
    drawn = draw_mixture(sections(recipe)[0].mix, chosen[-1] + 1, "test", seed)
    items, sent, num = [drawn[i] for i in chosen], sent[chosen], len(chosen)
    asked, wanted = chats_of(draft, items, think), chats_of(target, items, think)
    longest = think.max_new_tokens
    routed, alone, steps = 0.0, 0.0, []
    with one_thread(), attach(draft) as small, attach(target) as large:
        for start in range(0, num, at_once):
            part = range(start, min(start + at_once, num))
            away = [i for i in part if sent[i]]
            kept = [i - start for i in part if not sent[i]]
            seen: dict[str, list[Spent]] = {"draft": [], "sent": [], "alone": []}
            for turn in range(rounds + 1):
                took = {
                    "draft": _spend(small, [asked[i] for i in part], longest, kept, rater),
                    "alone": _spend(large, [wanted[i] for i in part], longest),
                }
                if away:  # all of them are `alone`, once more: the machine may have changed pace
                    took["sent"] = _spend(large, [wanted[i] for i in away], longest)
                if turn:
                    for name, spent in took.items():
                        seen[name].append(spent)
            middle = {name: median(s.total_s for s in each) for name, each in seen.items() if each}
            routed += middle["draft"] + middle.get("sent", 0.0)
            alone += middle["alone"]
            if kept:
                step = median(s.decode_s / s.steps for s in seen["draft"])
                steps.append(median(s.rating_s for s in seen["draft"]) / step)
    return {"ratio": routed / alone, "rating_steps": float(np.median(steps)) if steps else float("nan")}


def _in_proportion(sent: np.ndarray, num: int) -> list[int]:
    """Questions of either kind, as many of each as its share asks: few at random would be mostly luck.

    Spread over all of them: questions of one image follow each other, from the shortest answer to the longest.
    """
    away, kept = np.flatnonzero(sent), np.flatnonzero(~sent)
    ours = round(len(away) / len(sent) * num)
    return sorted([*_spread(away, ours), *_spread(kept, num - ours)])


def _spread(index: np.ndarray, num: int) -> list[int]:
    """`num` of them at even distances."""
    return index[np.arange(num) * len(index) // max(num, 1)].tolist()


@torch.no_grad()
def _spend(
    routed: Routed, chats: Sequence[Chat], longest: int, kept: Sequence[int] | None = None, rater: Prp | None = None
) -> Spent:
    """Reads some chats, rates them if there is a rater, and answers those that are kept (all, if not given)."""
    clock = clock_of(routed.model.device).read
    began = clock()
    session = Session(routed, reserve=longest)
    logits = session.append(prepare(routed.model, routed.processor, chats))
    read = clock()
    wanted = set(range(len(chats)) if kept is None else kept)
    due = 0 if rater is None else rater.config.decide_after
    ends, rating = torch.tensor(sorted(end_ids(routed)), device=logits.device), 0.0
    written, steps = 0, 0
    while True:
        if written == due:
            rating = _rate(rater, session, clock)
            logits = _only(session, logits, [i for i, row in enumerate(session.rows) if row in wanted])
        if not len(logits) or written == longest:
            break
        token = logits.argmax(-1)
        written += 1
        going = (~torch.isin(token, ends)).nonzero()[:, 0].tolist()
        if not going:
            if written <= due:  # an answer shorter than the thought that was asked for
                rating = _rate(rater, session, clock)
            break
        logits = session.step(_only(session, token, going))
        steps += 1
    return Spent(read - began, rating, clock() - read - rating, max(steps, 1))


def _rate(rater: Prp | None, session: Session, clock: Callable[[], float]) -> float:
    """Seconds of rating a session where it stands."""
    began = clock()
    if rater is not None:
        rater.rate_session(session)
    return clock() - began


def _only(session: Session, values: Tensor, rows: list[int]) -> Tensor:
    """A session's rows and what belongs to them, without the others."""
    if rows and len(rows) < len(values):
        session.keep_rows(rows)
    return values[rows]
