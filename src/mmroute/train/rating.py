"""What a rater learns from: labels, and losses whose gradients are known in closed form.

Source: PRP (arXiv 2606.30217) for GRPO on rating tokens, dynamic score replacement and joint rating; RLCR (2507.16806)
and ConfTuner for the Brier score as reward; EquiRouter for ranking.
Deviates: `all_action` sums the expected reward over every level instead of sampling a group: the same gradient without
variance; the success rate of all samples stands for that of the other rollouts; formulas are our reading of the paper.

Legend: B queries, R ratings (draft, target), K levels, G samples of one query.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from mmroute.train.prp_config import PrpConfig

__all__ = [
    "all_action",
    "cross_entropy",
    "gain",
    "grpo",
    "objective",
    "pair_loss",
    "read",
    "replaced",
    "reward",
    "shrunk",
    "soft_pair",
]

EPS = 1e-4
_MARGIN = 0.05


def levels(num: int, like: Tensor) -> Float[Tensor, " K"]:
    """The value of each level."""
    return torch.linspace(0, 1, num, dtype=like.dtype, device=like.device)


def gain(rated: Float[Tensor, "B R"]) -> Float[Tensor, " B"]:
    """What is ranked: the advantage, or with one rating the difficulty."""
    return rated[:, 1] - rated[:, 0] if rated.shape[1] == 2 else 1 - rated[:, 0]


def shrunk(y: Float[np.ndarray, " n"], cells: Sequence[str], samples: int) -> Float[np.ndarray, " n"]:
    """Success rates drawn towards the mean of their cell by one pseudo-count; for ranking only, where noise would rank.

    Args:
        y: mean over the samples.
        cells: task and level of each query.
        samples: behind each `y`.
    """
    names = {name: i for i, name in enumerate(dict.fromkeys(cells))}
    index = np.array([names[name] for name in cells])
    mean = np.bincount(index, y) / np.bincount(index)
    return (samples * y + mean[index]) / (samples + 1)


def reward(value: Tensor, y: Tensor) -> Tensor:
    """1 - (v - y)^2: proper, so what is likeliest to be rewarded is the truth."""
    return 1 - (value - y) ** 2


def all_action(logp: Float[Tensor, "B R K"], y: Float[Tensor, "B R"], eta: float = 0.01) -> Float[Tensor, ""]:
    """Expected squared error over all levels, minus eta times the entropy.

    Its optimum is pi proportional to exp(-(v - p)^2 / eta) with p the success rate; eta = 0 ends in one level.
    """
    pi, v = logp.exp(), levels(logp.shape[-1], logp)
    error = (pi * (v - y[..., None]) ** 2).sum(-1)
    return (error + eta * (pi * logp).sum(-1)).sum(1).mean()


def cross_entropy(logp: Float[Tensor, "B R K"], y: Float[Tensor, "B R"]) -> Float[Tensor, ""]:
    """Against the two levels beside y, weighted by how near they are."""
    at = y * (logp.shape[-1] - 1)
    low = at.floor().clamp(max=logp.shape[-1] - 2).long()
    part = at - low
    below = logp.gather(-1, low[..., None])[..., 0]
    above = logp.gather(-1, low[..., None] + 1)[..., 0]
    return -((1 - part) * below + part * above).sum(1).mean()


def grpo(
    logp: Float[Tensor, "B R K"], y: Float[Tensor, "B R"], group: int, replace: float, draw: torch.Generator
) -> tuple[Float[Tensor, ""], float]:
    """Group-relative policy gradient on sampled levels; no rollouts, as the reward needs the level and y alone.

    Args:
        logp: of the current policy, which also sampled.
        y: success rates.
        group: G.
        replace: probability that a group whose samples agree gets two of them replaced.
        draw: where samples come from.

    Returns:
        The loss, and the share of groups that agreed.
    """
    K = logp.shape[-1]
    flat = logp.detach().exp().reshape(-1, K)
    picked = torch.multinomial(flat.cpu(), group, True, generator=draw).to(logp.device).view(*logp.shape[:2], group)
    agree = (picked == picked[..., :1]).all(-1)
    chosen = agree & (torch.rand(agree.shape, generator=draw).to(agree.device) < replace)
    picked = replaced(picked, chosen, y, K, draw)
    rewards = reward(picked.to(logp.dtype) / (K - 1), y[..., None])
    advantage = (rewards - rewards.mean(-1, keepdim=True)) / (rewards.std(-1, keepdim=True) + EPS)
    return -(advantage * logp.gather(-1, picked)).mean(-1).sum(1).mean(), float(agree.float().mean())


def replaced(
    picked: Int[Tensor, "B R G"], where: Bool[Tensor, "B R"], y: Float[Tensor, "B R"], num: int, draw: torch.Generator
) -> Int[Tensor, "B R G"]:
    """Dynamic score replacement: the first sample says the best level, the second another one.

    If all said the best level already, the two are its neighbours: there the reward differs least, but it differs.
    """
    best = (y * (num - 1)).round().long()
    other = (best + torch.randint(1, num, best.shape, generator=draw).to(best.device)) % num
    done = picked[..., 0] == best
    # At the ends of the scale both neighbours are the same level: the best one stands in for the missing one.
    first = torch.where(done, (best - 1).clamp(min=0), best)
    second = torch.where(done, (best + 1).clamp(max=num - 1), other)
    out = picked.clone()
    out[..., 0] = torch.where(where, first, picked[..., 0])
    out[..., 1] = torch.where(where, second, picked[..., 1])
    return out


def read(logp: Float[Tensor, "B R K"]) -> Float[Tensor, "B R"]:
    """The ratings: mean levels."""
    return logp.exp() @ levels(logp.shape[-1], logp)


def objective(
    logp: Float[Tensor, "B R K"],
    y: Float[Tensor, "B R"],
    a: Float[Tensor, " B"],
    config: "PrpConfig",
    done: float,
    draw: torch.Generator,
) -> Float[Tensor, ""]:
    """The loss of a batch of ratings: each alone, and their differences.

    Args:
        logp: of the levels.
        y: success rates.
        a: what is ranked, drawn towards the mean of its cell.
        config: which losses, and their weights.
        done: share of the training that is over.
        draw: where sampled levels come from.
    """
    if config.objective == "all_action":
        loss = all_action(logp, y, config.eta)
    elif config.objective == "ce":
        loss = cross_entropy(logp, y)
    else:
        loss = grpo(logp, y, config.group_size, 1 - done if config.replace == "dynamic" else 0.0, draw)[0]
    if config.rank == "none" or not config.rank_weight:
        return loss
    ranking = soft_pair if config.rank == "soft_pair" else pair_loss
    return loss + config.rank_weight * ranking(gain(read(logp)), a, config.rank_temperature)


def soft_pair(u: Float[Tensor, " B"], a: Float[Tensor, " B"], temperature: float = 0.2) -> Float[Tensor, ""]:
    """Differences of scores against differences of advantages, by cross-entropy; least where they are equal.

    The target's own entropy is taken off, so the least value is 0.
    """
    first, second = torch.triu_indices(len(u), len(u), 1, device=u.device)
    said, true = (u[first] - u[second]) / temperature, (a[first] - a[second]) / temperature
    share = true.sigmoid()
    least = F.binary_cross_entropy_with_logits(true, share)
    return F.binary_cross_entropy_with_logits(said, share) - least


def pair_loss(u: Float[Tensor, " B"], a: Float[Tensor, " B"], temperature: float = 0.2) -> Float[Tensor, ""]:
    """Pairs in the right order, weighted by how much is at stake; it pushes scores apart without end."""
    stake = a[:, None] - a[None]
    weight = torch.where(stake > _MARGIN, stake, 0)
    said = (u[:, None] - u[None]) / temperature
    return (weight * F.softplus(-said)).sum() / weight.sum().clamp(min=1e-6)
