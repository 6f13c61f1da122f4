"""Which small stock model is trained: a Qwen2.5-VL configuration of one to two million parameters, and its start.

Four choices decide whether such a model learns to look at its image (docs/log.md): the initial spread of the weights
(.7/sqrt(hidden), not .02); a rotary base of 100 (at 1e6 the height and width bands turn by hundredths of a radian per
tile, at 10 no band is slow enough to compare what two positions hold whatever their distance); coordinate words that
start as a row vector plus a column vector, so that what is learned about one cell holds for its row and its column; and
queries that start equal to keys, so that a position first looks for what resembles it.

Legend: V vocabulary, D hidden size.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mmroute.config import options
from mmroute.errors import ConfigError

__all__ = ["MERGE", "PATCH", "Shape", "build", "coordinate_words", "look_alike", "look_back", "pass_on"]

PATCH = 14
"""Pixels along one side of a vision patch."""
MERGE = 2
"""Patches along one side of a vision token."""
_COORDINATE = re.compile(r"r(\d+)c(\d+)$")
_OCTAVES = 4
_FAST_BANDS, _SURE = 3, 7.0
"""Pairs that tell neighbours apart, and how large a bias in them: attention that starts at over nine tenths."""
_SPECIAL = {
    "bos_token_id": "<|im_start|>",
    "eos_token_id": "<|im_end|>",
    "pad_token_id": "<|endoftext|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}

PositiveInt = Annotated[int, Field(ge=1)]


@options
class Shape:
    """Sizes of the model; the defaults are those of the bundled one."""

    hidden: PositiveInt = 128
    layers: PositiveInt = 6
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    mlp: PositiveInt = 384
    mrope_section: tuple[int, int, int] = (4, 6, 6)
    """Rotary frequencies of time, height and width; their sum is half the head size."""
    rope_theta: Annotated[float, Field(gt=1)] = 100.0
    alike_from: Annotated[int, Field(ge=0)] = 2
    """First layer, counted from 0, whose queries start equal to its keys."""
    vision_depth: PositiveInt = 1
    vision_hidden: PositiveInt = 64
    vision_heads: PositiveInt = 4
    vision_mlp: PositiveInt = 128
    initializer_range: Annotated[float, Field(gt=0)] = 0.06


def build(shape: Shape, vocabulary: Sequence[str], seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A stock model of this shape with fresh weights, in fp32.

    Args:
        shape: sizes.
        vocabulary: the words in order; their index is the token id.
        seed: of the initial weights. The global random state is left as it was.

    Raises:
        ConfigError: the vocabulary lacks a special word, or the sizes do not fit each other.
    """
    missing = [word for word in _SPECIAL.values() if word not in vocabulary]
    if missing:
        raise ConfigError(f"the vocabulary lacks {', '.join(missing)}; the model needs these special words")
    if shape.hidden % shape.heads or sum(shape.mrope_section) * 2 != shape.hidden // shape.heads:
        raise ConfigError(
            f"model.mrope_section {list(shape.mrope_section)} must sum to half of hidden / heads = "
            f"{shape.hidden}/{shape.heads}"
        )
    ids = {name: vocabulary.index(word) for name, word in _SPECIAL.items()}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": list(shape.mrope_section),
                "rope_theta": shape.rope_theta,
            },
            "bos_token_id": ids["bos_token_id"],
            "eos_token_id": ids["eos_token_id"],
            "pad_token_id": ids["pad_token_id"],
            "tie_word_embeddings": True,
            "initializer_range": shape.initializer_range,
            "rms_norm_eps": 1e-6,
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_mlp,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            # One window is one vision token: a tile looks the same wherever it lies, so each is encoded once a batch.
            "window_size": PATCH * MERGE,
            "fullatt_block_indexes": [],
            "initializer_range": shape.initializer_range,
        },
        image_token_id=ids["image_token_id"],
        video_token_id=ids["video_token_id"],
        vision_start_token_id=ids["vision_start_token_id"],
        vision_end_token_id=ids["vision_end_token_id"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
        with torch.no_grad():
            words = model.model.language_model.embed_tokens.weight
            words.copy_(coordinate_words(words, vocabulary, shape.initializer_range))
            look_alike(model.model.language_model.layers[shape.alike_from :], shape.heads, shape.kv_heads)
    return model


@torch.no_grad()
def look_alike(layers: Iterable[Any], heads: int, kv_heads: int) -> None:
    """Lets the queries of stock layers start equal to their keys."""
    for layer in layers:
        keys = layer.self_attn.k_proj.weight.unflatten(0, (kv_heads, -1))
        layer.self_attn.q_proj.weight.copy_(keys.repeat_interleave(heads // kv_heads, 0).flatten(0, 1))


@torch.no_grad()
def pass_on(layers: Iterable[Any], heads: int, kv_heads: int) -> None:
    """Lets the first group of heads start by passing on what resembles a position: queries as keys, outputs as the
    transposes of values. The other groups stay as they are, free to look by place."""
    each = heads // kv_heads
    for layer in layers:
        attention = layer.self_attn
        width = attention.head_dim
        queries = attention.k_proj.weight[:width].repeat(each, 1)
        attention.q_proj.weight[: each * width] = queries
        attention.o_proj.weight[:, : each * width] = attention.v_proj.weight[:width].repeat(each, 1).T


@torch.no_grad()
def look_back(layer: Any, heads: int, kv_heads: int, rope_theta: float) -> None:
    """Lets the last group of heads of a stock layer with biases start by looking one word back, two words, and so on.

    Keys share a direction in the fastest turning pairs, and queries the same one turned by the distance: a bias is all
    that can say where without saying what.
    """
    attention = layer.self_attn
    half, each = attention.head_dim // 2, heads // kv_heads
    keys = attention.k_proj.bias.view(kv_heads, 2, half)
    queries = attention.q_proj.bias.view(kv_heads, each, 2, half)
    for band in range(_FAST_BANDS):
        keys[-1, 0, band] = _SURE
        for head in range(each):
            turn = torch.tensor((head + 1) * rope_theta ** (-band / half))
            queries[-1, head, :, band] = _SURE * torch.stack([turn.cos(), -turn.sin()])


def coordinate_words(start: Float[Tensor, "V D"], vocabulary: Sequence[str], spread: float) -> Float[Tensor, "V D"]:
    """The initial embeddings, with each word `r2c1` made of a part of its row and a part of its column.

    Both parts are random projections of sines and cosines of the index in octaves, so that "one row up" is the same
    rotation for every cell. Each word keeps a small part of its own.

    Args:
        start: embeddings to begin with; not changed.
        vocabulary: the word of each row of `start`.
        spread: standard deviation that the result keeps.
    """
    out = start.clone()
    width = start.shape[1]
    row_part, column_part = (torch.randn(2 * _OCTAVES, width) for _ in range(2))
    for index, word in enumerate(vocabulary):
        match = _COORDINATE.fullmatch(word)
        if match:
            row, column = int(match[1]), int(match[2])
            place = _waves(row) @ row_part + _waves(column) @ column_part  # variance: 2 * _OCTAVES
            out[index] = 0.2 * start[index] + spread * place / math.sqrt(2 * _OCTAVES)
    return out


def _waves(index: int) -> Tensor:
    angles = torch.tensor([index * math.pi / 16 * 2**octave for octave in range(_OCTAVES)])
    return torch.cat([angles.sin(), angles.cos()])
