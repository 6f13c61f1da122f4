"""A trajectory as the training rows that MVoT's loader makes of it.

Source: MVoT (arXiv 2501.07542), the kinds, the order and the contents of rows; all wording here is our own.
"""

from typing import Literal, NamedTuple

from mmroute.errors import InputError
from mmroute.tasks._mvot import listed_moves
from mmroute.tasks.base import Sample

__all__ = ["Row", "rows"]


class Row(NamedTuple):
    """One training row as MVoT's loader makes them: what stands before, and what is to be produced."""

    kind: Literal["single_step_visualization", "action_reasoning"]
    source: str
    images: list[int]
    """The sample's pictures behind the `<image>` tags of `source`, in order."""
    target: str
    target_image: int
    """The picture behind the tag of `target`; -1 is none."""
    label: str
    """The answer's letter; empty in all rows but the last."""


_RULES = {
    "maze": (
        "Task: Maze\nFind where a series of moves ends. The moves are carried out one by one from the start marked in "
        "the picture; choose the letter of the cell that is reached.\n{moves}\n",
        "Initial maze: ",
        "finished",
    ),
    "frozenlake": (
        "Task: Frozen lake\nSay how a series of moves ends. The figure carries them out one by one on a lake that is "
        "not slippery, and stops in a hole or at the gift.\n{moves}\nOptions:\nA. The gift is reached.\n"
        "B. The figure falls into a hole.\nC. The figure is safe and the gift is not reached.\n",
        "Initial State: ",
        "stopped",
    ),
}
_MOVES = "Moves: up is one row towards the top, down one towards the bottom, left and right one column to that side."


def rows(sample: Sample) -> list[Row]:
    """The 2T + 1 rows of a trajectory: T pictures to draw, T moves to name, and the answer.

    Actions accumulate in the source; of the thought images only the latest stays.

    Raises:
        InputError: another task, or a hop without its picture.
    """
    if sample.task not in _RULES:
        raise InputError(f"{sample.id}: MVoT's rows are made of maze and frozenlake, this is {sample.task}")
    if any(hop.image < 0 for hop in sample.hops):
        raise InputError(f"{sample.id}: a hop has no picture; make the data with --set task.hop_images=observed")
    head, opening, end = _RULES[sample.task]
    executed, unused = listed_moves(sample, len(sample.hops))
    moves = [f"Go {move}. " for move in executed]
    listed = "".join([*moves, *(f"Go {move}. " for move in unused)]).strip()
    start = sample.prompt_images[0]
    prompt = f"{head.format(moves=_MOVES)}Action sequence: {listed}\n{opening}<image>\nResponse: "
    out: list[Row] = []
    for t, hop in enumerate(sample.hops):
        before = "".join(moves[:t])
        latest = [sample.hops[t - 1].image] if t else []
        done = before + "<image>" * len(latest)
        out.append(Row("action_reasoning", prompt + done, [start, *latest], moves[t].strip(), -1, ""))
        seen = [start, *latest]
        out.append(Row("single_step_visualization", prompt + done + moves[t], seen, "<image>", hop.image, ""))
    latest = [sample.hops[-1].image] if sample.hops else []
    done = "".join(moves) + "<image>" * len(latest)
    answer = f"Action sequence {end}. The answer is {sample.answer}."
    return [*out, Row("action_reasoning", prompt + done, [start, *latest], answer, -1, sample.answer)]
