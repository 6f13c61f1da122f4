"""LLaVA and LLaVA-NeXT: a CLIP tower, a projector, and a Mistral or Llama text model with one-dimensional positions."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers.image_processing_utils import select_best_resolution

from mmroute.backbones.base import Family
from mmroute.errors import UnsupportedBackbone

__all__ = ["Llava", "LlavaNext"]

_TEXT = ("mistral", "llama")


class Llava(Family):
    """LLaVA wiring, VolCano's too (`volcano.py` reads its checkpoints)."""

    name: ClassVar[str] = "llava"
    example: ClassVar[str] = "llava-hf/llava-1.5-7b-hf"

    def check(self, model: nn.Module) -> None:
        """See `Family.check`; refuses text models whose layers we have not looked at."""
        config: Any = model.config
        text = config.get_text_config(decoder=True).model_type
        if text not in _TEXT:
            raise UnsupportedBackbone(
                f"{self.name} with a {text} text model; {' and '.join(_TEXT)} text models can be routed"
            )
        super().check(model)

    def text_model(self, model: Any) -> Any:
        return model.model.language_model

    def vision_ids(self, model: Any) -> list[int]:
        vocab = model.config.get_text_config(decoder=True).vocab_size
        return [i for i in (model.config.image_token_id,) if i < vocab]

    def image_grid(self, model: Any, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        images, _, height, width = self._pixels(batch).shape
        patch = model.config.vision_config.patch_size
        return [(height // patch, width // patch)] * images

    def lead(self, model: Any) -> int:
        """The tower's class token, where its features are taken whole."""
        return int(model.config.vision_feature_select_strategy == "full")


class LlavaNext(Llava):
    """LLaVA-NeXT (1.6): an image is seen whole, and again in tiles at the resolution that fits its shape best."""

    name: ClassVar[str] = "llava_next"
    example: ClassVar[str] = "llava-hf/llava-v1.6-mistral-7b-hf"
    image_tensors: ClassVar[tuple[str, ...]] = ("pixel_values", "image_sizes")

    def image_grid(self, model: Any, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        """See `Family.image_grid`: the grid of the tiles, with a line break at the end of each row."""
        self._pixels(batch)
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        pinpoints = model.config.image_grid_pinpoints
        out = []
        for height, width in batch["image_sizes"].tolist():
            best_height, best_width = select_best_resolution((height, width), pinpoints)
            rows, columns = best_height // vision.image_size * side, best_width // vision.image_size * side
            # The image was scaled to fit and padded; whole rows or columns of padding are cut off again.
            if width / height > columns / rows:
                rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
            else:
                columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
            out.append((rows, columns + 1))
        return out

    def lead(self, model: Any) -> int:
        """The image as a whole comes first, in the grid of one tile."""
        vision = model.config.vision_config
        return super().lead(model) + (vision.image_size // vision.patch_size) ** 2
