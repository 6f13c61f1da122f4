"""One self-contained page of a trace: the picture with the patches each layer kept, the words, the hops, the KV bytes.

The page holds its data, styles and script; it opens from disk, offline.

Legend: L layers, P vision tokens of one image.
"""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

from PIL import Image

from mmroute.cost import kv_bytes_per_slot
from mmroute.errors import ConfigError
from mmroute.reason import Answer

__all__ = ["View", "render", "view"]


@dataclass(frozen=True)
class View:
    """What the page shows of one answer."""

    title: str
    recipe: str
    question: str
    gold: str
    text: str
    hops: list[str]
    image: str
    """PNG as a data address."""
    grid: tuple[int, int]
    """Rows and columns of vision tokens."""
    tokens: list[dict[str, Any]]
    """Prompt positions in order: {"text", "vision": index of the patch or -1}."""
    kept: list[list[int]]
    """[layer]: indices into `tokens` that ran."""
    kv: list[list[int]]
    """[layer][hop]: bytes live after the prompt (0) and after each hop."""
    relevant: list[list[int]]
    """[hop]: patches that the ground truth says must be seen; empty where unknown."""


def view(
    answer: Answer,
    image: Image.Image,
    grid: tuple[int, int],
    words: Sequence[str],
    vision: Sequence[bool],
    *,
    title: str,
    recipe: str,
    question: str,
    gold: str = "",
    relevant: Sequence[Sequence[int]] = (),
) -> View:
    """What the page needs of one answer with one image.

    Args:
        answer: made alone, with a full trace: then columns of the trace count the prompt's positions.
        image: as the model saw it.
        grid: rows and columns of its vision tokens.
        words: text of each prompt position.
        vision: whether each is a patch.

    Raises:
        ConfigError: the trace says how many positions ran, not which.
    """
    calls = answer.trace.calls
    if any(layer.kept is None for layer in calls[0].layers):
        raise ConfigError("the page needs a full trace; set routed.full_trace = True before answering")
    if len(words) != sum(calls[0].new[0]):
        raise ConfigError(f"{len(words)} words given for a prompt of {sum(calls[0].new[0])} positions; give one each")
    patches = iter(range(len(vision)))
    tokens = [{"text": w, "vision": next(patches) if v else -1} for w, v in zip(words, vision, strict=True)]
    # The call that enters the last token of each hop; the prompt is hop 0.
    ends = [max(i for i, call in enumerate(calls) if call.hop[0] <= hop) for hop in range(len(answer.hops) + 1)]
    bytes_per_slot = kv_bytes_per_slot(answer.trace.shape)
    return View(
        title=title,
        recipe=recipe,
        question=question,
        gold=gold,
        text=answer.text,
        hops=list(answer.hops),
        image=_data_address(image),
        grid=grid,
        tokens=tokens,
        kept=[(layer.kept or [[]])[0] for layer in calls[0].layers],
        kv=[[calls[end].layers[i].stored[0] * bytes_per_slot for end in ends] for i in range(len(calls[0].layers))],
        relevant=[list(r) for r in relevant],
    )


def render(views: Sequence[View]) -> str:
    """The page as HTML text."""
    # An opening comment or closing tag in the data would end the script, or keep it from ending.
    data = json.dumps([asdict(v) for v in views]).replace("<", "\\u003c")
    return files("mmroute.page").joinpath("trace.html").read_text().replace("/*DATA*/[]", data)


def _data_address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
