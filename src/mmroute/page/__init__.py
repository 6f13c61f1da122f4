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
        answer: made with a full trace.
        image: as the model saw it.
        grid: rows and columns of its vision tokens.
        words: text of each prompt position.
        vision: whether each is a patch.

    Raises:
        ConfigError: the trace says how many positions ran, not which.
    """
    prompt = answer.trace.calls[0]
    if any(layer.kept is None for layer in prompt.layers):
        raise ConfigError("the page needs a full trace; set routed.full_trace = True before answering")
    first = prompt.start + len(words) - sum(prompt.new[0])  # left padding has no column of its own here
    offset = min((c for layer in prompt.layers for c in (layer.kept or [[]])[0]), default=first)
    patches = iter(range(len(vision)))
    tokens = [{"text": w, "vision": next(patches) if v else -1} for w, v in zip(words, vision, strict=True)]
    bytes_per_slot = kv_bytes_per_slot(answer.trace.shape)
    ends = [0]
    for text in answer.hops:
        ends.append(ends[-1] + max(1, len(text.split())))
    steps = len(answer.trace.calls) - 1
    marks = [round(e / max(ends[-1], 1) * steps) for e in ends]
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
        kept=[[c - offset for c in (layer.kept or [[]])[0]] for layer in prompt.layers],
        kv=[
            [answer.trace.calls[m].layers[i].stored[0] * bytes_per_slot for m in marks]
            for i in range(len(prompt.layers))
        ],
        relevant=[list(r) for r in relevant],
    )


def render(views: Sequence[View]) -> str:
    """The page as HTML text."""
    data = json.dumps([asdict(v) for v in views]).replace("</", "<\\/")  # a closing tag in data would end the script
    return files("mmroute.page").joinpath("trace.html").read_text().replace("/*DATA*/[]", data)


def _data_address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
