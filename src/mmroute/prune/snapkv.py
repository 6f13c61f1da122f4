"""Which positions stay in the cache: SnapKV keeps what the last positions of the prompt look at, and those themselves.

Legend: B batch, N positions, D hidden, H query heads, Q queries whose attention is read, G averages of them.
Source: SnapKV (NeurIPS 2024, arXiv 2404.14469): mean attention of an observation window to what precedes it, pooled
    over neighbours; the best go on beside the window.
Deviates: one set for all key-value heads (the mean of their scores) where the paper keeps one each; separate shares
    for vision and text, text whole by default; the window is an eighth of what enters where that is less than
    `window`; only positions that enter together compete, generated ones stay.
Checked: twin (tests/unit/prune/test_twins_of_peers.py; on five families the sets equal those from the stock model's
    own attention maps, tests/conformance/test_peers_on_models.py); not run against the release.
"""

import math
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.prune._cache_only import CacheOnly
from mmroute.prune.base import Site
from mmroute.tokens import Tokens

__all__ = ["SnapKV"]


class SnapKV(CacheOnly):
    """Training-free, cache only: all positions run, and what the end of the prompt does not look at is forgotten."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision keys that stays cached."""
        text_keep: Annotated[float, Field(ge=0, le=1)] = 1.0
        """The same for text."""
        window: Annotated[int, Field(ge=1)] = 64
        """Last positions of what enters that look, at most; an eighth of it in short prompts."""
        kernel: Annotated[int, Field(ge=1)] = 5
        """Neighbouring positions whose attention is pooled; an odd number."""
        pool: Literal["mean", "max"] = "mean"
        """How it is pooled."""

    needs = frozenset({"rows"})
    config: Config

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if self.config.kernel % 2 == 0:
            raise ConfigError(f"prune.snapkv.kernel: {self.config.kernel} given, a window around a position is odd")

    def queries(self, tokens: Tokens, site: Site) -> tuple[Int[Tensor, "B Q"], Float[Tensor, "B G Q"]]:
        width = self._width(tokens, site)
        columns = _from_end(tokens).argsort(dim=1, stable=True)[:, : max(width)]
        size = torch.tensor(width, device=columns.device)[:, None]
        inside = torch.arange(columns.shape[1], device=columns.device) < size
        return columns, (inside / size.clamp(min=1))[:, None]

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        age = _from_end(tokens)
        window = age < torch.tensor(self._width(tokens, site), device=x.device)[:, None]
        look_BHN = site.rows[:, :, 0].masked_fill(window[:, None], 0.0)
        pool = torch.nn.functional.avg_pool1d if self.config.pool == "mean" else torch.nn.functional.max_pool1d
        pooled = pool(look_BHN, self.config.kernel, stride=1, padding=self.config.kernel // 2).mean(1)
        return torch.where(window, 2.0 + 1 / (1.0 + age), pooled)  # the window first, its last position before all

    def _width(self, tokens: Tokens, site: Site) -> list[int]:
        """[row]: positions of the observation window."""
        given = [0] * tokens.shape[0]
        for group in (g for g in site.groups if not g.generated):
            given = [n + size for n, size in zip(given, group.size, strict=True)]
        return [min(self.config.window, math.ceil(n / 8)) for n in given]


def _from_end(tokens: Tokens) -> Int[Tensor, "B N"]:
    """How many given positions of the row stand behind each; N for those that were not given."""
    given = tokens.valid & ~tokens.generated
    rank = given.long().cumsum(1)
    return (rank[:, -1:] - rank).masked_fill(~given, tokens.shape[1])
