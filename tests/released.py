"""Released checkpoints by the sizes in their public `config.json`, as stock models without memory: what they weigh, and
what a position of them costs. Nothing is fetched.

VolCano's few words of its own are left out: under a ten-thousandth of its weights.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf

from mmroute import backbones
from mmroute.trace import Shape

__all__ = ["NAMES", "Released", "released"]

_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_QWEN3_TOWER = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 4096,
    "deepstack_visual_indexes": [8, 16, 24],
    "num_position_embeddings": 2304,
}


def _text(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, vocab: int, context: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    }


def _qwen25(text: dict[str, Any], tied: bool = False, tower_mlp: int = 3420) -> Any:
    tower = {"depth": 32, "hidden_size": 1280, "intermediate_size": tower_mlp, "num_heads": 16}
    tower["out_hidden_size"] = text["hidden_size"]
    return tf.Qwen2_5_VLConfig(
        text_config={**text, "tie_word_embeddings": tied}, vision_config=tower, tie_word_embeddings=tied
    )


def _llava(kind: Any, text: dict[str, Any], whole: Any = tf.LlavaConfig) -> Any:
    free = {"sliding_window": None} if kind is tf.MistralConfig else {}
    return whole(text_config=kind(**text, **free), vision_config=tf.CLIPVisionConfig(**_CLIP))


_CONFIGS = {
    "Qwen2-VL-7B": lambda: tf.Qwen2VLConfig(
        text_config=_text(3584, 28, 28, 4, 18944, 152064, 32768),
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16},
        tie_word_embeddings=False,
    ),
    "Qwen2.5-VL-3B": lambda: _qwen25(_text(2048, 36, 16, 2, 11008, 151936, 128000), tied=True),
    "Qwen2.5-VL-7B": lambda: _qwen25(_text(3584, 28, 28, 4, 18944, 152064, 128000)),
    "Qwen3-VL-8B": lambda: tf.Qwen3VLConfig(
        text_config={**_text(4096, 36, 32, 8, 12288, 151936, 262144), "head_dim": 128},
        vision_config=_QWEN3_TOWER,
        tie_word_embeddings=False,
    ),
    "LLaVA-1.5-7B (Llama)": lambda: _llava(tf.LlamaConfig, _text(4096, 32, 32, 32, 11008, 32064, 4096)),
    "LLaVA-NeXT-7B (Mistral)": lambda: _llava(
        tf.MistralConfig, _text(4096, 32, 32, 8, 14336, 32064, 32768), tf.LlavaNextConfig
    ),
    "VolCano-7B (Mistral)": lambda: _llava(tf.MistralConfig, _text(4096, 32, 32, 8, 14336, 32000, 32768)),
    "Chameleon-7B, Anole-7B": lambda: tf.ChameleonConfig(
        **_text(4096, 32, 32, 32, 11008, 65536, 4096), vocabulary_map={"<image>": 8711}
    ),
    "Qwen2.5-VL-72B": lambda: _qwen25(_text(8192, 80, 64, 8, 29568, 152064, 128000), tower_mlp=3456),
}
NAMES = tuple(_CONFIGS)


@dataclass(frozen=True)
class Released:
    """One checkpoint in bf16."""

    shape: Shape
    """Of its text model."""
    parameters: int
    """All of them, tower included."""
    trained: int
    """Of the text model's layers and last norm: what `train.backbone: full` moves."""
    context: int
    """Positions it is made for."""


@functools.cache
def released(name: str) -> Released:
    """The checkpoint of that name."""
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(_CONFIGS[name](), dtype=torch.bfloat16)
    family = backbones.of(model)
    text = family.text_model(model)
    return Released(
        shape=family.shape(model),
        parameters=sum(p.numel() for p in model.parameters()),
        trained=sum(p.numel() for part in (text.layers, text.norm) for p in part.parameters()),
        context=model.config.get_text_config(decoder=True).max_position_embeddings,
    )
