"""Right chains whose hops hold more than words: a picture that ends a hop, or a box and what lies under it.

The simulator says what each piece is; who turns pieces into token ids knows a model's vocabulary (`pictures.py`,
`boxes.py`, `chains.py`).
"""

import re
from dataclasses import dataclass

from mmroute.tasks.base import Generated, Spec
from mmroute.think.base import Box, LookingThinker, Thinker

__all__ = ["BOX_END", "BOX_START", "Piece", "box_words", "boxed", "drawn", "told"]

BOX_START, BOX_END = "<coor>", "</coor>"
_COORDINATE = re.compile(r"r\d+c\d+")


@dataclass(frozen=True)
class Piece:
    """One hop: words, then what they bring."""

    words: list[str]
    state: int | None = None
    """The hop ends with the picture of the world after so many steps, which the model writes."""
    box: Box | None = None
    """The words end with this box; the image features under it enter behind them."""


def told(task: Generated, spec: Spec, think: Thinker) -> list[Piece] | None:
    """The pieces of an item's right chain under a way to think; None where they are words alone."""
    if think.draws:
        return drawn(task, spec)
    return boxed(task, spec) if isinstance(think, LookingThinker) else None


def drawn(task: Generated, spec: Spec) -> list[Piece]:
    """Every step's number and action with the picture of what it leads to, then the answer.

    Args:
        task: a world whose actions are listed.
        spec: one item.
    """
    steps, num_hops = task.chain(spec), len(task.trace(spec)) - 1
    hops = steps[len(steps) - num_hops :]
    pieces = [Piece(hop[:2], state=i) for i, hop in enumerate(hops, start=1)]
    return [*pieces, Piece(_rest(task, spec))]


def boxed(task: Generated, spec: Spec) -> list[Piece]:
    """Every step up to where it says where something is: there stands its box, and the rest begins the next hop.

    Args:
        task: a world whose every hop looks at one cell.
        spec: one item.
    """
    steps, states = task.chain(spec), task.trace(spec)[1:]
    head = len(steps) - len(states)
    pieces, words = [], [word for step in steps[:head] for word in step]
    for step, state in zip(steps[head:], states, strict=True):
        assert state.cell is not None  # a hop always looks somewhere
        at = next(i for i, word in enumerate(step) if _COORDINATE.fullmatch(word))
        left, upper, right, lower = task.box(spec, state.cell)
        box = (left, upper, right, lower)
        pieces.append(Piece([*words, *step[:at], *box_words(box)], box=box))
        words = step[at:]
    return [*pieces, Piece([*words, *_rest(task, spec)])]


def box_words(box: Box) -> list[str]:
    """A box as `think/boxes.py` reads it.

    Example:
        >>> " ".join(box_words((0.0, 0.25, 0.25, 0.5)))
        '<coor> 0.000 , 0.250 , 0.250 , 0.500 </coor>'
    """
    numbers = [f"{edge:.3f}" for edge in box]
    return [BOX_START, numbers[0], *(word for number in numbers[1:] for word in (",", number)), BOX_END]


def _rest(task: Generated, spec: Spec) -> list[str]:
    """What is written behind the chain: the answer and the end."""
    return task.words(spec, "cot").response[sum(map(len, task.chain(spec))) :]
