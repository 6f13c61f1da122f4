"""How a rationale is cut into the groups that latents replace."""

import re
from collections.abc import Sequence
from typing import Literal, TypeVar

__all__ = ["Splitter", "merged", "split_text"]

T = TypeVar("T")
Splitter = Literal["given", "sentence", "blank_line"]


def split_text(steps: Sequence[str], how: Splitter) -> list[str]:
    """The steps of a rationale.

    Args:
        steps: as the data has them; often one long text.
        how: leave them, cut at the ends of sentences, or at blank lines.

    Example:
        >>> split_text(["It is red. It is hot, e.g. fire.", "So it burns"], "sentence")
        ['It is red.', 'It is hot, e.g. fire.', 'So it burns']
    """
    if how == "given":
        return list(steps)
    border = r"\n\s*\n" if how == "blank_line" else r"(?<=[.!?])\s+(?=[A-Z0-9])"
    pieces = (piece.strip() for step in steps for piece in re.split(border, step))
    return [piece for piece in pieces if piece]


def merged(steps: Sequence[list[T]], most: int) -> list[list[T]]:
    """Steps as at most `most` groups whose numbers of steps differ by one at most, earlier ones larger.

    Example:
        >>> merged([["a"], ["b"], ["c"], ["d"], ["e"]], 3)
        [['a', 'b'], ['c', 'd'], ['e']]
    """
    groups = min(most, len(steps))
    out, at = [], 0
    for g in range(groups):
        size = len(steps) // groups + (g < len(steps) % groups)
        out.append([item for step in steps[at : at + size] for item in step])
        at += size
    return out
