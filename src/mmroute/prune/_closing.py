"""What stays cached when a thought ends, by the scores stored while it was written: DARE's three cache policies.

Pure functions, shared by hop closes on a cache and by the gates that stand for them in one training pass.

Legend: B rows, n positions or slots.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmroute import select
from mmroute.prune.base import Slots
from mmroute.tokens import Modality, Tokens

__all__ = ["aged", "best", "candidates", "capped"]


def candidates(
    policy: str, m: Modality, at: Tokens | Slots, present: Bool[Tensor, "B n"], closing: Int[Tensor, " B"]
) -> tuple[Bool[Tensor, "B n"], Float[Tensor, " B"]]:
    """What competes when a hop closes, and the count its share is taken of.

    Args:
        policy: `append` lets only what the closing hop wrote compete; the others everything of the modality so far.
        present: what is cached still.
        closing: the hop that ends, by row.
    """
    of = (at.modality == m) & at.valid
    if policy == "append":
        mine = of & present & at.generated & (at.hop == closing[:, None])
        return mine, mine.sum(1).float()
    until = of & (at.hop <= closing[:, None])
    seen = at.seen[:, m] if isinstance(at, Slots) else until.sum(1)
    return until & present, seen.float()


def aged(
    score: Float[Tensor, "B n"], hop: Int[Tensor, "B n"], closing: Int[Tensor, " B"], discount: float
) -> Float[Tensor, "B n"]:
    """Order of score x discount ^ age, in logarithms, where large logits stay apart."""
    if discount == 1:
        return score
    age = (closing[:, None] - hop).clamp(min=0)
    return torch.nn.functional.logsigmoid(score) + age * torch.tensor(discount).log().item()


def best(
    score: Float[Tensor, "B n"],
    among: Bool[Tensor, "B n"],
    protected: Bool[Tensor, "B n"],
    base: Float[Tensor, " B"],
    rate: Float[Tensor, " B"],
) -> Bool[Tensor, "B n"]:
    """The ceil(rate x base) best candidates of each row, protected ones first and counted inside."""
    fixed = among & protected
    k = torch.ceil(rate.double() * base.double() - 1e-6).long() - fixed.sum(1)
    return fixed | select.best(score, among & ~protected, k)


def capped(
    score: Float[Tensor, "B n"],
    modality: Int[Tensor, "B n"],
    valid: Bool[Tensor, "B n"],
    protected: Bool[Tensor, "B n"],
    room: int,
    weight: dict[int, Float[Tensor, " B"]],
) -> Bool[Tensor, "B n"]:
    """At most `room` slots of each row: the best of each modality, whose parts go by `weight`; unused parts go over.

    Protected slots come first. Where they alone exceed the room, the latest of them stay: a bound is a bound.

    Args:
        weight: by modality, how much of the room it asks for (rate times count).
    """
    n = score.shape[1]
    latest = torch.arange(n, device=score.device).expand_as(score).float()
    fixed = select.best(latest, valid & protected, torch.full_like(weight[0], room).long())
    left = room - fixed.sum(1)
    free = valid & ~protected
    has = {m: (free & (modality == m)).sum(1) for m in weight}
    total = torch.stack(list(weight.values())).sum(0).clamp_min(1e-9)
    first = {m: torch.minimum((left * weight[m] / total).floor().long(), has[m]) for m in weight}
    stays = fixed
    over = left - torch.stack(list(first.values())).sum(0)
    for m in weight:
        take = torch.minimum(first[m] + over, has[m])
        over = over - (take - first[m])
        stays = stays | select.best(score, free & (modality == m), take)
    return stays
