"""What a session enters as one segment: pictures between their delimiters, and where ground truth belongs in it.

Legend: B batch, N positions of the segment.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmroute.backbones.images import prepare
from mmroute.decoding import processor_of
from mmroute.engine.attach import Routed
from mmroute.errors import InputError
from mmroute.tokens import Modality

__all__ = ["picture_segment", "place_relevance"]


def picture_segment(routed: Routed, pictures: Sequence[Any]) -> dict[str, Tensor]:
    """A picture in every row that has one to see: `input_ids` and `attention_mask` (B, N), and its image tensors.

    Of what a chat template prints only the picture and the delimiters that touch it, padded on the left.

    Args:
        routed: whose processor reads them.
        pictures: [row]: path, bytes or Pillow image, or None where nothing is to be seen; one at least is.
    """
    controller, processor = routed.controller, processor_of(routed)
    rows = [i for i, picture in enumerate(pictures) if picture is not None]
    chats = [[{"role": "user", "content": [{"type": "image", "image": pictures[i]}]}] for i in rows]
    given = prepare(routed.model, processor, chats)
    ids = given["input_ids"]
    picture, bracket = controller.table[ids] == Modality.VISION, controller.delimiters[ids]
    start = picture.long().argmax(1)
    start = start - (bracket.gather(1, (start - 1).clamp(min=0)[:, None]).squeeze(1) & (start > 0)).long()
    end = ids.shape[1] - picture.flip(1).long().argmax(1)
    after = bracket.gather(1, end.clamp(max=ids.shape[1] - 1)[:, None]).squeeze(1) & (end < ids.shape[1])
    end = end + after.long()
    width = int((end - start).max())
    at = end[:, None] - width + torch.arange(width, device=ids.device)
    real = at >= start[:, None]

    def placed(values: Tensor, fill: int) -> Tensor:
        out = values.new_full((len(pictures), width), fill)
        out[rows] = values.gather(1, at.clamp(min=0)).masked_fill(~real, fill)
        return out

    batch = {k: given[k] for k in routed.family.image_kwargs(given)}
    if "mm_token_type_ids" in batch:
        batch["mm_token_type_ids"] = placed(batch["mm_token_type_ids"], 0)
    batch["input_ids"] = placed(ids, processor.tokenizer.pad_token_id or 0)
    batch["attention_mask"] = placed(torch.ones_like(ids), 0)
    return batch


def place_relevance(
    relevance: Sequence[Sequence[float]] | None, batch: dict[str, Tensor], routed: Routed
) -> Tensor | None:
    """(B, N): ground truth at the vision columns, zero elsewhere; None where none is given.

    Args:
        relevance: [row]: one number per vision position.
        batch: the segment; its `input_ids` (B, N) are read.
        routed: knows which ids are vision.

    Raises:
        InputError: a row has more or fewer numbers than vision positions.
    """
    if relevance is None:
        return None
    ids = batch["input_ids"]
    vision = routed.controller.table[ids] == Modality.VISION
    out = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    for row, values in enumerate(relevance):
        columns = vision[row].nonzero().flatten()
        if len(columns) != len(values):
            raise InputError(
                f"conversation {row}: relevance has {len(values)} numbers, the prompt {len(columns)} vision positions"
            )
        out[row, columns] = torch.tensor(values, dtype=torch.float32, device=ids.device)
    return out
