"""A trajectory as the training rows that MVoT's loader makes of it.

Source: MVoT (arXiv 2501.07542), the kinds, the order and the contents of rows; all wording here is our own.
"""

from typing import Literal, NamedTuple

from mmroute.errors import InputError
from mmroute.tasks._mvot_export import listed_moves
from mmroute.tasks._prompts import mvot_like
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


_ENDS = {"maze": "finished", "frozenlake": "stopped"}


def rows(sample: Sample) -> list[Row]:
    """The 2T + 1 rows of a trajectory: T pictures to draw, T moves to name, and the answer.

    Actions accumulate in the source; of the thought images only the latest stays.

    Raises:
        InputError: another task, or a hop without its picture.
    """
    if sample.task not in _ENDS:
        raise InputError(f"{sample.id}: MVoT's rows are made of maze and frozenlake, this is {sample.task}")
    if any(hop.image < 0 for hop in sample.hops):
        raise InputError(f"{sample.id}: a hop has no picture; make the data with --set task.hop_images=observed")
    executed, unused = listed_moves(sample, len(sample.hops))
    moves = [f"Go {move}. " for move in executed]
    before, after = mvot_like(sample.task, [*(move.strip() for move in moves), *(f"Go {move}." for move in unused)])
    start = sample.prompt_images[0]
    prompt = f"{before}<image>{after}"
    out: list[Row] = []
    for t, hop in enumerate(sample.hops):
        said = "".join(moves[:t])
        latest = [sample.hops[t - 1].image] if t else []
        done = said + "<image>" * len(latest)
        out.append(Row("action_reasoning", prompt + done, [start, *latest], moves[t].strip(), -1, ""))
        seen = [start, *latest]
        out.append(Row("single_step_visualization", prompt + done + moves[t], seen, "<image>", hop.image, ""))
    latest = [sample.hops[-1].image] if sample.hops else []
    done = "".join(moves) + "<image>" * len(latest)
    answer = f"Action sequence {_ENDS[sample.task]}. The answer is {sample.answer}."
    return [*out, Row("action_reasoning", prompt + done, [start, *latest], answer, -1, sample.answer)]
