"""A family that mmroute does not know: InternVL. Facts of the model, no routing: python examples/add_family.py"""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, InternVLConfig

import mmroute
from mmroute import backbones
from mmroute.backbones.base import Family


class InternVL(Family):
    """InternVL with one tile an image, which is its processor's default."""

    name = "internvl"  # config.model_type
    example = "OpenGVLab/InternVL3-1B-hf"

    def text_model(self, model: Any) -> Any:
        return model.model.language_model

    def vision_ids(self, model: Any) -> list[int]:
        return [model.config.image_token_id]

    def image_grid(self, model: Any, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        images, _, height, width = self._pixels(batch).shape
        cell = model.config.vision_config.patch_size[0] / model.config.downsample_ratio
        return [(int(height / cell), int(width / cell))] * images


def tiny() -> Any:
    torch.manual_seed(0)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**width, "model_type": "qwen2", "num_key_value_heads": 1, "vocab_size": 128, "num_hidden_layers": 3}
    vision = {**width, "image_size": 32, "patch_size": 4}
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=100)
    return AutoModelForImageTextToText.from_config(config).eval()


@torch.no_grad()
def main() -> tuple[float, list[int]]:
    backbones.FAMILIES = (*backbones.FAMILIES, InternVL())  # inside the package: a file and a line in __init__.py
    model = tiny()
    batch = {"input_ids": torch.tensor([[1, 2, *[100] * 16, 3, 4]]), "pixel_values": torch.randn(1, 3, 32, 32)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    stock = model(**batch, use_cache=False).logits
    with mmroute.attach(model, strip_padding=True):  # the routed layers with nothing left out: first of all equal
        worst = float((model(**batch, use_cache=False).logits - stock).abs().max())
    with mmroute.attach(model, prune=mmroute.prune.FastV(vision_keep=0.25, start_layer=1)) as routed:
        model.generate(**batch, max_new_tokens=4, do_sample=False)
        ran = [sum(layer.ran[0]) for layer in routed.trace.calls[0].layers]
    print(f"difference to stock {worst:.1e}; positions that ran, by layer: {ran}")
    return worst, ran


if __name__ == "__main__":
    main()
