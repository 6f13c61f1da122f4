"""LLaVA: a CLIP tower, a projector, and a Mistral or Llama text model with one-dimensional positions."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from mmroute.backbones.base import Family
from mmroute.errors import UnsupportedBackbone

__all__ = ["Llava"]

_TEXT = ("mistral", "llama")


class Llava(Family):
    """LLaVA wiring, VolCano's too."""

    name: ClassVar[str] = "llava"
    example: ClassVar[str] = "llava-hf/llava-1.5-7b-hf"

    def check(self, model: nn.Module) -> None:
        """See `Family.check`; refuses text models whose layers we have not looked at."""
        config: Any = model.config
        text = config.get_text_config(decoder=True).model_type
        if text not in _TEXT:
            raise UnsupportedBackbone(
                f"llava with a {text} text model; {' and '.join(_TEXT)} text models can be routed"
            )
        super().check(model)

    def text_model(self, model: Any) -> Any:
        return model.model.language_model

    def vision_ids(self, model: Any) -> list[int]:
        vocab = model.config.get_text_config(decoder=True).vocab_size
        return [i for i in (model.config.image_token_id,) if i < vocab]

    def image_grid(self, model: Any, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        """See `Family.image_grid`; with `vision_feature_select_strategy="full"` one more position precedes the grid."""
        images, _, height, width = self._pixels(batch).shape
        patch = model.config.vision_config.patch_size
        return [(height // patch, width // patch)] * images
