"""The small model that looks where its thoughts point: a stock LLaVA of about a million parameters, and its processor.

A CLIP tower whose patch is one tile, a projector, a Llama text model with plain positions. Its words are those of all
small models, then the brackets and numbers of boxes, then the names of things: colour and shape are one word here, as
frequent pairs are in any learned vocabulary.

As in `small_model.py` the start decides whether it learns to look (docs/log.md). Half of the heads start by looking at
what resembles a position and by passing it on, so that a word tells from the first step where its like lies. In the
first layer the others start by looking one and two words back, which is what biases of queries and keys are for:
without it no name was ever copied out of the question. The tower's place vectors start as a row part plus a column part
of the size of what a tile shows, where stock ones start fifty times smaller.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.tasks._texts import BOS, COLOURS, EOS, IMAGE, PAD, SHAPES, SPECIAL, VOCABULARY, coordinate
from mmroute.train.folder import CHAT_TEMPLATE
from mmroute.train.small_model import coordinate_words, look_back, pass_on
from mmroute.train.stories import BOX_END, BOX_START
from mmroute.train.words import word_tokenizer

__all__ = ["CANVASES", "TILE", "WORDS", "Shape", "build", "make_processor", "merged"]

TILE = 28
"""Pixels of one side of a tile, which is one patch of the tower."""
_PARTS = 8
CANVASES = (4, 8)
"""Tiles of one side of pictures whose boxes the vocabulary can write."""
WORDS: list[str] = [
    *VOCABULARY,
    *(BOX_START, BOX_END),
    *(f"{i / _PARTS:.3f}" for i in range(_PARTS + 1)),
    *(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES),
]
"""Position = token id; a part of every checkpoint."""

PositiveInt = Annotated[int, Field(ge=1)]


@options
class Shape:
    """Sizes of the model."""

    hidden: PositiveInt = 128
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    kv_heads: PositiveInt = 2
    mlp: PositiveInt = 320
    rope_theta: Annotated[float, Field(gt=1)] = 10_000.0
    alike_from: Annotated[int, Field(ge=0)] = 0
    """First layer, counted from 0, half of whose heads start by passing on what resembles a position."""
    vision_depth: PositiveInt = 1
    vision_hidden: PositiveInt = 64
    vision_heads: PositiveInt = 4
    vision_mlp: PositiveInt = 128
    initializer_range: Annotated[float, Field(gt=0)] = 0.06


def build(shape: Shape, canvas: int, seed: int) -> LlavaForConditionalGeneration:
    """A stock model of this shape with fresh weights, in fp32.

    Args:
        shape: sizes.
        canvas: tiles of one side of its pictures.
        seed: of the initial weights. The global random state is left as it was.

    Raises:
        ConfigError: the sizes do not fit each other, or no box of such a picture can be written.
    """
    if canvas not in CANVASES:
        raise ConfigError(
            f"boxes of {canvas} x {canvas} tiles cannot be written; take a preset with 4 or 8 (nano, tiny)"
        )
    if shape.hidden % (2 * shape.heads) or shape.heads % shape.kv_heads:
        raise ConfigError(
            f"model.hidden {shape.hidden} must be a multiple of twice model.heads {shape.heads}, and these of "
            f"model.kv_heads {shape.kv_heads}"
        )
    known = {word: i for i, word in enumerate(WORDS)}
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.hidden // shape.heads,
            max_position_embeddings=4096,
            attention_bias=True,
            initializer_range=shape.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            bos_token_id=known[BOS],
            eos_token_id=known[EOS],
            pad_token_id=known[PAD],
            tie_word_embeddings=True,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=shape.vision_hidden,
            intermediate_size=shape.vision_mlp,
            num_hidden_layers=shape.vision_depth,
            num_attention_heads=shape.vision_heads,
            image_size=canvas * TILE,
            patch_size=TILE,
        ),
        image_token_id=known[IMAGE],
        image_seq_length=canvas * canvas,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        words = model.model.language_model.embed_tokens.weight
        words.copy_(coordinate_words(words, WORDS, shape.initializer_range))
        layers = model.model.language_model.layers
        pass_on(layers[shape.alike_from :], shape.heads, shape.kv_heads)
        look_back(layers[0], shape.heads, shape.kv_heads, shape.rope_theta)
        places = model.model.vision_tower.embeddings.position_embedding.weight
        named = [coordinate(row, column) for row in range(canvas) for column in range(canvas)]
        places[1:] = coordinate_words(places[1:], named, 1.0)  # the class token stands in front
    return model


def merged(words: Sequence[str]) -> list[str]:
    """Words of texts as words of this vocabulary.

    Example:
        >>> merged(["nearest", "red", "circle", "."])
        ['nearest', 'red circle', '.']
    """
    out: list[str] = []
    for word in words:
        if word in SHAPES and out and out[-1] in COLOURS:
            out[-1] = f"{out[-1]} {word}"
        else:
            out.append(word)
    return out


def make_processor(canvas: int) -> LlavaProcessor:
    """The stock processor: whole words, pictures of tiles as they are."""
    side = canvas * TILE
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        word_tokenizer(WORDS, SPECIAL, pairs=(COLOURS, SHAPES)),
        patch_size=TILE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
