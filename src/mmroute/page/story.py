"""What was asked and written, told beside a full trace: words by column, pictures as the model saw them.

Legend: P vision positions of one image.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmroute.backbones.images import opened, prepare
from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError
from mmroute.reason import Answer
from mmroute.tokens import Modality
from mmroute.trace import Picture, Story, Trace

__all__ = ["column_hops", "column_modality", "tell"]


def tell(
    routed: Routed,
    conversation: list[dict[str, Any]],
    answer: Answer,
    *,
    title: str = "",
    recipe: str = "",
    gold: str = "",
    relevant: Sequence[Sequence[int]] = (),
) -> Trace:
    """The answer's trace with its story: all that `mmroute inspect` needs, in one file.

    Args:
        routed: what answered.
        conversation: the messages it answered, images in them.
        answer: made with `routed.full_trace = True`.
        title: what the page is called; default the model's name.
        recipe: name of what routed.
        gold: the right answer, where it is known.
        relevant: [hop]: vision positions of the first picture that must be seen.

    Raises:
        ConfigError: the trace says how many positions ran, not which.
    """
    trace = answer.trace
    if any(call.ids is None and call.modality is None for call in trace.calls):
        raise ConfigError("a story needs a full trace; set routed.full_trace = True before answering")
    tokenizer = routed.processor.tokenizer
    kinds = column_modality(trace)
    words = [""] * len(kinds)
    for call in trace.calls:
        for at, token in enumerate((call.ids or [[]])[0]):
            if kinds[call.start + at] == Modality.TEXT:
                words[call.start + at] = tokenizer.decode([token])
    model = str(getattr(routed.model.config, "_name_or_path", ""))
    said = [item for message in opened(conversation) for item in message["content"]]
    trace.story = Story(
        question=" ".join(item["text"] for item in said if item["type"] == "text"),
        text=answer.text,
        hops=list(answer.hops),
        words=words,
        pictures=_pictures(routed, conversation, trace),
        title=title,
        model=model.rstrip("/").rpartition("/")[2] if model.startswith(("/", ".")) else model,
        recipe=recipe,
        gold=gold,
        relevant=[list(patches) for patches in relevant],
    )
    return trace


def column_modality(trace: Trace) -> list[int]:
    """`Modality` value of each logical column of a full trace of one conversation."""
    return [kind for call in trace.calls for kind in (call.modality or [[]])[0]]


def column_hops(trace: Trace) -> list[int]:
    """Hop of each of them."""
    return [call.hop[0] for call in trace.calls for _ in (call.modality or [[]])[0]]


def _pictures(routed: Routed, conversation: list[dict[str, Any]], trace: Trace) -> list[Picture]:
    """The prompt's images, each with the columns its grid stands for."""
    images = [item["image"] for m in opened(conversation) for item in m["content"] if item["type"] == "image"]
    if not images:
        return []
    batch = prepare(routed.model, routed.processor, conversation)
    grids = routed.family.image_grid(routed.model, batch)
    vision = [c for c, kind in enumerate((trace.calls[0].modality or [[]])[0]) if kind == Modality.VISION]
    lead = routed.family.lead(routed.model)
    seen = _seen(routed.processor.image_processor, batch["pixel_values"])
    out, at = [], 0
    for i, (image, (rows, columns)) in enumerate(zip(images, grids, strict=True)):
        out.append(Picture(_png(image if seen is None else seen[i]), (rows, columns), vision[at + lead]))
        at += lead + rows * columns
    return out


def _seen(processor: Any, pixels: Any) -> list[Image.Image] | None:
    """Images back from normalised pixels (images, 3, height, width): cropped as the model saw them.

    None where they came as patches (Qwen-VL), which show the whole image stretched: there the original will do.
    """
    if pixels.ndim != 4:
        return None
    mean, std = (np.array(v, np.float32)[:, None, None] for v in (processor.image_mean, processor.image_std))
    scale = float(processor.rescale_factor)
    values = (pixels.float().cpu().numpy() * std + mean) / scale
    return [Image.fromarray(v.round().clip(0, 255).astype(np.uint8).transpose(1, 2, 0)) for v in values]


def _png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
