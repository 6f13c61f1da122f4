"""Chameleon and Anole: images are 8192 words of the vocabulary, read and (Anole) written like text.

Legend: B batch, N positions, D hidden, V vocabulary.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmroute.backbones.base import Canvas, Family
from mmroute.errors import ConfigError

__all__ = ["BEGIN", "END", "Chameleon"]

BEGIN, END = "<racm3:break>", "<eoss>"
"""The words that bracket every picture, given or written; fixed in stock code too."""


class Chameleon(Family):
    """One stack for text and image tokens; a layer returns a tuple."""

    name: ClassVar[str] = "chameleon"
    example: ClassVar[str] = "facebook/chameleon-7b"
    tuple_out: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = True

    def text_model(self, model: Any) -> Any:
        return model.model

    def vision_ids(self, model: Any) -> list[int]:
        """The placeholder of given images, and the vocabulary's image tokens, of which written images consist."""
        return sorted({model.config.image_token_id, *self.image_tokens(model)})

    def image_tokens(self, model: Any) -> list[int]:
        """Vocabulary ids of image codes, ascending; unlocked or not."""
        return sorted(i for name, i in model.config.vocabulary_map.items() if name.startswith("IMGIMG"))

    def delimiter_ids(self, model: Any) -> list[int]:
        """Those of `BEGIN` and `END` that the checkpoint's vocabulary map names; a real one names all its words."""
        known = model.config.vocabulary_map
        return sorted(known[word] for word in (BEGIN, END) if word in known)

    def normed(self, layer: Any, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Raw `x` in the 34B's layers: they norm after attention, not before."""
        return x if type(layer).__name__ == "ChameleonSwinDecoderLayer" else layer.input_layernorm(x)

    def head(self, model: Any, h: Float[Tensor, "*n D"], images: bool = False) -> Float[Tensor, "*n V"]:
        logits = model.get_output_embeddings()(h)
        if not images:
            logits[..., model.model.vocabulary_mapping.image_tokens] = torch.finfo(logits.dtype).min  # unless unlocked
        return logits

    def image_grid(self, model: Any, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        images, _, height, width = self._pixels(batch).shape
        shrink = 2 ** (len(model.config.vq_config.channel_multiplier) - 1)
        return [(height // shrink, width // shrink)] * images

    def unlock_images(self, model: Any) -> None:
        """Lets the model write image tokens, whose logits stock code sets to the lowest number there is.

        The list of those tokens is shadowed on the model's vocabulary mapping; weights and classes stay. The mapping's
        other tables are built from that list when first asked for, so they are built before.
        """
        mapping = model.model.vocabulary_mapping
        _ = mapping.bpe2img, mapping.img2bpe, mapping.bpe2img_search_tensors, mapping.img2bpe_mapping_tensor
        mapping.__dict__["image_tokens"] = []

    def lock_images(self, model: Any) -> None:
        """The stock behaviour again; the list is rebuilt when next asked for."""
        model.model.vocabulary_mapping.__dict__.pop("image_tokens", None)

    @torch.no_grad()
    def read_pictures(self, model: Any, processor: Any, pictures: Sequence[Any]) -> list[list[int]]:
        """See `Family.read_pictures`: what its encoder makes of them."""
        pixels = processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
        return model.model.get_image_tokens(pixels.to(model.device, model.dtype)).tolist()

    def canvas(self, model: Any, processor: Any) -> Canvas:
        """See `Family.canvas`: pictures have as many codes as the processor gives those of the prompt."""
        mapping, known = model.model.vocabulary_mapping, model.config.vocabulary_map
        missing = [word for word in (BEGIN, END) if word not in known]
        if missing:
            raise ConfigError(
                f"{self.name}: vocabulary_map lacks {' and '.join(missing)}, which bracket a written picture; take the "
                "config.json of a whole checkpoint, whose map names every word"
            )
        codes = tuple(mapping.img2bpe[code] for code in range(len(mapping.img2bpe)))
        side = math.isqrt(processor.image_seq_length)
        return Canvas(known[BEGIN], codes, known[END], side, side)
