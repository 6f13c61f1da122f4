"""The small model that draws its thoughts: a stock Chameleon of about a million parameters, and its folder.

Its words are those of all small models, then Chameleon's brackets and placeholder, then a word for every tile of the
atlas. Its image encoder is the exact atlas tokenizer (`tile_codes.py`).
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    ChameleonImageProcessorPil,
    ChameleonProcessor,
    PreTrainedTokenizerFast,
)

from mmroute.backbones.chameleon import BEGIN, END
from mmroute.config import options
from mmroute.errors import ConfigError
from mmroute.files import replacing_folder
from mmroute.tasks._texts import BOS, EOS, PAD, SPECIAL, UNK, VOCABULARY
from mmroute.train.loop import unwritable
from mmroute.train.tile_codes import NUM_CODES, TILE, code_name, set_weights, vq_config

__all__ = ["CODES", "CUE", "IMAGE", "SEPARATOR", "WORDS", "Shape", "build", "make_processor", "write_folder"]

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
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNK))
    # A colon belongs to mode words and `answer:`; other marks stand alone even where they touch a word.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), *(pre_tokenizers.Split(mark, "isolated") for mark in ".,?;()")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    special = [*SPECIAL, IMAGE, BEGIN, END, SEPARATOR]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        sep_token=SEPARATOR,
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    side = canvas * TILE
    images = ChameleonImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = ChameleonProcessor(images, fast, image_seq_length=canvas * canvas)
    processor.chat_template = CHAT_TEMPLATE
    return processor


def write_folder(path: Path, model: Any, canvas: int, recipe: str, results: dict[str, Any]) -> None:
    """Writes the model in bf16 with its processor, recipe and figures; a folder that exists is whole.

    Args:
        path: folder to make; one that stands there is replaced.
        model: built by `build`; it stays in its own dtype.
        canvas: as there.
        recipe: YAML text that `mmroute train backbone` takes.
        results: command, commit and figures, for `RESULTS.json`.

    Raises:
        MmrouteError: the disk is full; what stood at `path` still stands there.
    """
    stored = ChameleonForConditionalGeneration(model.config)
    stored.load_state_dict(model.state_dict())
    try:
        with replacing_folder(path) as beside:
            stored.to(torch.bfloat16).save_pretrained(beside)
            make_processor(canvas).save_pretrained(beside)
            (beside / "recipe.yaml").write_text(recipe)
            (beside / "RESULTS.json").write_text(json.dumps(results, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
