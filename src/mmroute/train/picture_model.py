"""The small model that draws its thoughts: a stock Chameleon of about a million parameters, and its processor.

Its words are those of all small models, then Chameleon's brackets and placeholder, then a word for every tile of the
atlas. Its image encoder is the exact atlas tokenizer (`tile_codes.py`).
"""

from typing import Annotated

import torch
from pydantic import Field
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
)

from mmroute.backbones.chameleon import BEGIN, END
from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.tasks._texts import BOS, EOS, PAD, SPECIAL, VOCABULARY
from mmroute.train.tile_codes import NUM_CODES, TILE, code_name, set_weights, vq_config
from mmroute.train.words import word_tokenizer

__all__ = ["CODES", "CUE", "IMAGE", "SEPARATOR", "WORDS", "Shape", "build", "make_processor"]

IMAGE, CUE, SEPARATOR = "<image>", "image:", "response:"
"""Chameleon's placeholder; what asks for drawn thoughts; what stock Chameleon processors end every prompt with."""
WORDS: list[str] = [*VOCABULARY, IMAGE, BEGIN, END, CUE, *(code_name(code) for code in range(NUM_CODES))]
"""Position = token id; a part of every checkpoint."""
CODES = len(WORDS) - NUM_CODES
"""Token id of code 0."""
CHAT_TEMPLATE = (
    f"{BOS}"
    "{% for message in messages %}{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %} " + IMAGE + "{% elif block['type'] == 'text' %} {{ block['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
"""Prints the blocks in order, without roles."""

PositiveInt = Annotated[int, Field(ge=1)]


@options
class Shape:
    """Sizes of the model."""

    hidden: PositiveInt = 128
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    mlp: PositiveInt = 384
    rope_theta: Annotated[float, Field(gt=1)] = 100.0
    initializer_range: Annotated[float, Field(gt=0)] = 0.06


def build(shape: Shape, canvas: int, seed: int) -> ChameleonForConditionalGeneration:
    """A stock model of this shape with fresh weights, in fp32; its image encoder is set and takes no gradient.

    Args:
        shape: sizes.
        canvas: tiles of one side of its pictures.
        seed: of the initial weights. The global random state is left as it was.

    Raises:
        ConfigError: the sizes do not fit each other.
    """
    if shape.hidden % (2 * shape.heads):
        raise ConfigError(f"model.hidden {shape.hidden} must be a multiple of twice model.heads {shape.heads}")
    known = {word: i for i, word in enumerate(WORDS)}
    config = ChameleonConfig(
        vocab_size=len(WORDS),
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        initializer_range=shape.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        bos_token_id=known[BOS],
        eos_token_id=known[EOS],
        pad_token_id=known[PAD],
        tie_word_embeddings=True,
        vocabulary_map=known,
        vq_config=vq_config(canvas),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ChameleonForConditionalGeneration(config)
    model.model.vqmodel.requires_grad_(False)
    set_weights(model.model.vqmodel)
    return model


def make_processor(canvas: int) -> ChameleonProcessor:
    """The stock processor: whole words, pictures of tiles as they are."""
    special = [*SPECIAL, IMAGE, BEGIN, END, SEPARATOR]
    tokenizer = word_tokenizer(WORDS, special, sep_token=SEPARATOR)
    side = canvas * TILE
    images = ChameleonImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = ChameleonProcessor(images, tokenizer, image_seq_length=canvas * canvas)
    processor.chat_template = CHAT_TEMPLATE
    return processor
