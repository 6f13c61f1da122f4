"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions have a time, a row and a column; images arrive as patch grids.

Legend: B batch, N positions, D hidden, T layers that the vision tower adds to.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmroute.backbones.base import Family, box, running_positions
from mmroute.errors import InputError

__all__ = ["Qwen2VL", "Qwen3VL", "Qwen25VL"]


class Qwen2VL(Family):
    """Qwen2-VL; the later ones differ in details of their layers."""

    name: ClassVar[str] = "qwen2_vl"
    example: ClassVar[str] = "Qwen/Qwen2-VL-2B-Instruct"
    image_tensors: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw", "mm_token_type_ids")

    def text_model(self, model: Any) -> Any:
        return model.model.language_model

    def vision_ids(self, model: Any) -> list[int]:
        ids = {model.config.image_token_id, model.config.video_token_id} - {None}
        vocab = model.config.get_text_config(decoder=True).vocab_size
        return sorted(i for i in ids if i < vocab)

    def delimiter_ids(self, model: Any) -> list[int]:
        vocab = model.config.get_text_config(decoder=True).vocab_size
        brackets = (model.config.vision_start_token_id, model.config.vision_end_token_id)
        return [i for i in brackets if i is not None and i < vocab]

    def windowed(self, model: Any) -> list[Any]:
        return [block.attn for block in model.model.visual.blocks]

    def positions(
        self,
        model: Any,
        ids: Int[Tensor, "B N"],
        mask: Int[Tensor, "B N"],
        grids: Int[Tensor, "images 3"] | None = None,
        mm_token_type_ids: Int[Tensor, "B N"] | None = None,
    ) -> Int[Tensor, "3 B N"]:
        """See `Family.positions`.

        Raises:
            InputError: the number of images in the ids is not that of the grids, or there are video placeholders.
        """
        config = model.config
        if bool((ids == config.video_token_id).any()):
            raise InputError(f"{self.name}: the prompt holds a video, only images are routed; send frames as images")
        is_image = (ids == config.image_token_id) & mask.bool()
        needed = int(is_image.sum())
        merge = config.vision_config.spatial_merge_size
        given = 0 if grids is None else int((grids.prod(-1) // merge**2).sum())
        if needed != given:
            raise InputError(
                f"{self.name}: {needed} image positions in the prompt, {given} in image_grid_thw; "
                "pass the grids of every image of the whole sequence, row by row"
            )
        if grids is None:
            return running_positions(mask).expand(3, -1, -1).clone()
        # Footgun: stock code falls back to one-dimensional positions, silently, where mm_token_type_ids is missing.
        types = is_image.long() if mm_token_type_ids is None else mm_token_type_ids
        places, _ = model.model.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=grids, attention_mask=mask.long()
        )
        return places

    def generate_positions(self, positions: Int[Tensor, "3 B N"], mask: Int[Tensor, "B N"]) -> Int[Tensor, "4 B N"]:
        """`positions` behind a row of plain text order, which is what `generate()` advances and slices."""
        return torch.cat([running_positions(mask)[None].to(positions), positions])

    _encoder_inputs: ClassVar[tuple[str, ...]] = ("pixel_values", "image_grid_thw")

    def grid_to_pixels(
        self, size: tuple[int, int], grid: tuple[int, int], window: tuple[int, int, int, int]
    ) -> tuple[int, int, int, int]:
        """See `Family.grid_to_pixels`; the whole picture was shrunk."""
        return box(window, size[0] / grid[1], size[1] / grid[0])

    def image_grid(self, model: Any, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        grids = batch.get("image_grid_thw")
        if grids is None:
            raise InputError(
                f"{self.name}: the batch holds no image_grid_thw; make it with mmroute.backbones.images.prepare"
            )
        merge = model.config.vision_config.spatial_merge_size
        return [(rows // merge, columns // merge) for _, rows, columns in grids.tolist()]


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL."""

    name: ClassVar[str] = "qwen2_5_vl"
    example: ClassVar[str] = "Qwen/Qwen2.5-VL-3B-Instruct"


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: normalised queries and keys; the tower also feeds the first text layers (deepstack)."""

    name: ClassVar[str] = "qwen3_vl"
    example: ClassVar[str] = "Qwen/Qwen3-VL-2B-Instruct"
    qk_norm: ClassVar[bool] = True

    def deep(self, given: Mapping[str, Any]) -> Float[Tensor, "T B N D"] | None:
        where, features = given.get("visual_pos_masks"), given.get("deepstack_visual_embeds")
        if where is None or not features:
            return None
        empty = features[0].new_zeros(*where.shape, features[0].shape[-1])
        return torch.stack([empty.masked_scatter(where[..., None], each.to(empty.dtype)) for each in features])

    def carry(self, deep: Float[Tensor, "T B N D"]) -> dict[str, Any]:
        everywhere = torch.ones(deep.shape[1:3], dtype=torch.bool, device=deep.device)  # zeros change nothing
        return {"visual_pos_masks": everywhere, "deepstack_visual_embeds": list(deep.flatten(1, 2))}
