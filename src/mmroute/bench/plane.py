"""Many numbers on a plane: principal components, or t-SNE.

Legend: n points, D numbers of each.

Source: t-SNE, van der Maaten and Hinton (2008), exact; early exaggeration and gains as in their code.
Deviates: it starts from the two principal components, so a picture depends on nothing random.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mmroute.errors import ConfigError

__all__ = ["Plane", "neighbours", "on_plane"]

Plane = Literal["pca", "tsne"]
_MOST = 4000
"""Points of an exact t-SNE, at most."""
_STEPS, _EXAGGERATED = 500, 120


def on_plane(points: Float[Tensor, "n D"], how: Plane = "pca") -> Float[Tensor, "n 2"]:
    """Two coordinates of each point; the wider axis first under `pca`.

    Args:
        points: fewer than 4000 for `tsne`, whose cost grows with their square.
        how: keeps large distances (`pca`) or neighbourhoods (`tsne`).

    Raises:
        ConfigError: no such way, or too many or too few points for t-SNE.
    """
    if how not in ("pca", "tsne"):
        raise ConfigError(f"plane is pca or tsne, given {how!r}")
    centred = points.float() - points.float().mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    flat = centred @ axes[:2].T
    if flat.shape[1] < 2:
        flat = torch.cat([flat, flat.new_zeros(len(flat), 2 - flat.shape[1])], 1)
    if how == "pca":
        return flat
    if not 4 <= len(points) < _MOST:
        raise ConfigError(f"t-SNE takes 4 to {_MOST} points, given {len(points)}; change --n, or use pca")
    return _tsne(centred.double(), flat.double()).float()


def neighbours(points: Float[Tensor, "n D"], perplexity: float) -> Float[Tensor, "n n"]:
    """How much each point looks at each other one: rows sum to 1 and have this perplexity.

    Args:
        points: any.
        perplexity: neighbours of a point, as it were; below n - 1.
    """
    square = torch.cdist(points, points).square()
    square.fill_diagonal_(float("inf"))
    low, high = square.new_zeros(len(points)), square.new_full((len(points),), float("inf"))
    beta = square.new_ones(len(points))
    for _ in range(64):
        share = (-square * beta[:, None]).softmax(1)
        entropy = -torch.special.xlogy(share, share).sum(1)
        wide = entropy > torch.log(torch.tensor(perplexity))
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    return share


def _tsne(points: Float[Tensor, "n D"], flat: Float[Tensor, "n 2"]) -> Float[Tensor, "n 2"]:
    n = len(points)
    share = neighbours(points, min(30.0, (n - 1) / 3))
    share = ((share + share.T) / (2 * n)).clamp(min=1e-12)
    y = flat / flat[:, 0].std().clamp(min=1e-12) * 1e-4
    speed, gain, rate = torch.zeros_like(y), torch.ones_like(y), max(n / 12.0, 50.0)
    for step in range(_STEPS):
        near = 1 / (1 + torch.cdist(y, y).square())
        near.fill_diagonal_(0)
        pull = (share * (12.0 if step < _EXAGGERATED else 1.0) - near / near.sum()) * near
        grad = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gain = torch.where((grad > 0) == (speed > 0), gain * 0.8, gain + 0.2).clamp(min=0.01)
        speed = (0.5 if step < _EXAGGERATED else 0.8) * speed - rate * gain * grad
        y = y + speed
        y = y - y.mean(0)
    return y
