"""Which positions stay in the cache: StreamingLLM keeps the first few and the most recent.

Legend: B batch, N positions, D hidden.
Source: StreamingLLM (ICLR 2024, arXiv 2309.17453): attention sinks at the start of the sequence and a recent window.
Deviates: separate shares for vision and text, text whole by default: the window of a modality is its own most recent
    positions; keys keep the angles of their original positions; the window does not roll on while decoding, generated
    positions all stay.
Checked: twin (tests/unit/prune/test_twins_of_peers.py); not run against the release.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.prune._cache_only import CacheOnly
from mmroute.prune.base import Site
from mmroute.tokens import Tokens

__all__ = ["Streaming"]


class Streaming(CacheOnly):
    """Training-free, cache only, blind to content: sinks and recency."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision keys that stays cached."""
        text_keep: Annotated[float, Field(ge=0, le=1)] = 1.0
        """The same for text."""
        sinks: Annotated[int, Field(ge=0)] = 4
        """First positions of the sequence that stay before any other."""

    config: Config

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        recent = torch.arange(tokens.shape[1], device=x.device).expand(tokens.shape).float()
        sink = (tokens.hop == 0) & (tokens.rank < self.config.sinks)
        return torch.where(sink, recent + tokens.shape[1], recent)
