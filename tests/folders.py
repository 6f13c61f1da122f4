"""Tiny checkpoint folders of the six families, as `save_pretrained` writes them: model, tokenizer, processor.

The tokenizer knows the 256 bytes and no merges, so any text is one token a byte and comes back unchanged.
"""

from pathlib import Path
from typing import Any

import families
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import is_torchvision_available

from mmroute.backbones.load import image_only

__all__ = ["byte_tokenizer", "write"]

QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def write(name: str, folder: Path, layers: int = 3) -> Path:
    """Writes the folder and returns its path."""
    processor, ids = {"chameleon": _chameleon, "llava": _llava, "llava_next": _llava_next}.get(name, _qwen)(name)
    config = families.config(name, layers)
    for key, value in ids.items():
        setattr(config, key, value)
    text = config.get_text_config(decoder=True)
    tokenizer = processor.tokenizer
    assert len(tokenizer) <= text.vocab_size
    text.bos_token_id = tokenizer.bos_token_id
    text.eos_token_id = tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    families.build(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def byte_tokenizer(named: dict[str, str], extra: list[str]) -> Any:
    """A byte-level tokenizer.

    Args:
        named: `bos_token`, `eos_token` and so on.
        extra: further special tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **named)
    fast.add_special_tokens({"additional_special_tokens": extra})
    return fast


def _qwen(name: str) -> tuple[Any, dict[str, Any]]:
    tokenizer = byte_tokenizer(
        {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    )
    # patches of 4 x 4 px, merged 2 x 2: between 8 and 36 vision positions an image
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 512, "longest_edge": 2304}
    )
    base = {
        "qwen2_vl": transformers.Qwen2VLProcessor,
        "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
        "qwen3_vl": transformers.Qwen3VLProcessor,
    }[name]
    if is_torchvision_available():
        videos = transformers.Qwen2VLVideoProcessor(patch_size=4)
        processor = base(images, tokenizer, videos, chat_template=QWEN_TEMPLATE)
    else:
        processor = image_only(base)(images, tokenizer, chat_template=QWEN_TEMPLATE)
    number = tokenizer.convert_tokens_to_ids
    return processor, {
        "image_token_id": number("<|image_pad|>"),
        "video_token_id": number("<|video_pad|>"),
        "vision_start_token_id": number("<|vision_start|>"),
        "vision_end_token_id": number("<|vision_end|>"),
    }


def _chameleon(name: str) -> tuple[Any, dict[str, Any]]:
    codes = [families.code_name(i) for i in range(families.NUM_CODES)]
    tokenizer = byte_tokenizer(
        {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "sep_token": "<reserved08706>"},
        ["<image>", "<racm3:break>", "<eoss>", *codes],
    )
    side = families.SIDE
    images = transformers.ChameleonImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    processor = transformers.ChameleonProcessor(images, tokenizer, image_seq_length=families.NUM_SQUARE)
    processor.chat_template = PLAIN_TEMPLATE
    vocabulary = tokenizer.get_vocab()
    return processor, {
        "vocabulary_map": {token: vocabulary[token] for token in ("<image>", "<pad>", *codes)},
        "image_token_id": vocabulary["<image>"],
    }


def _llava(name: str) -> tuple[Any, dict[str, Any]]:
    tokenizer = byte_tokenizer({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, ["<image>"])
    side = families.SIDE
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PLAIN_TEMPLATE,
    )
    return processor, {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}


def _llava_next(name: str) -> tuple[Any, dict[str, Any]]:
    tokenizer = byte_tokenizer({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}, ["<image>"])
    tile = families.TILE
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": tile},
        crop_size={"height": tile, "width": tile},
        image_grid_pinpoints=families.PINPOINTS,
    )
    processor = transformers.LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=PLAIN_TEMPLATE,
    )
    return processor, {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")}
