"""Makes a batch write what a test says, and records what it would have chosen from."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mmroute import reason

__all__ = ["dictated"]


@contextmanager
def dictated(monkeypatch: pytest.MonkeyPatch, scripts: Sequence[Sequence[int]]) -> Iterator[list[list[Tensor]]]:
    """Conversation i writes script i (by its seed, which must be i).

    Yields:
        [conversation][step]: (V,) the logits that the step chose from.
    """
    seen: list[list[Tensor]] = [[] for _ in scripts]

    def write(logits: Tensor, temperature: float, top_p: float, draw: list[torch.Generator]) -> Tensor:
        rows = [generator.initial_seed() for generator in draw]
        for row, values in zip(rows, logits, strict=True):
            seen[row].append(values.clone())
        return torch.tensor([scripts[row][len(seen[row]) - 1] for row in rows])

    with monkeypatch.context() as patch:
        patch.setattr(reason, "sample", write)
        yield seen
