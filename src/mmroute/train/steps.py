"""How a rationale is cut into the groups that latents replace."""

import re
from collections.abc import Sequence
from typing import Literal, TypeVar

from mmroute.tasks._texts import MOVES

__all__ = ["Splitter", "merged", "split_text", "states_of"]

T = TypeVar("T")
Splitter = Literal["given", "sentence", "blank_line"]

_NOT_STATE = re.compile(r"s\d+$|start$|\.$|(?:" + "|".join(MOVES) + ")$")


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


def states_of(steps: Sequence[Sequence[str]]) -> list[list[str]]:
    """Where each step of a generated chain ends up, without the words that the question or the state before give.

    One word is one look-up and a group of its own: a latent learns to hold a state, not a sentence.

    Example:
        >>> states_of([["start", "r2c1", "."], ["s1", "right", "r2c2", "ice"]])
        [['r2c1'], ['r2c2'], ['ice']]
    """
    return [[word] for step in steps for word in step if not _NOT_STATE.match(word)]
