"""Tiny checkpoint folders of the six families, as `save_pretrained` writes them: model, tokenizer, processor.

The tokenizer knows the 256 bytes and no merges, so any text is one token a byte and comes back unchanged.
"""

import json
from pathlib import Path
from typing import Any

import families
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils import is_torchvision_available

from mmroute.backbones.load import image_only

__all__ = ["as_older_releases", "byte_tokenizer", "write", "write_as_released", "write_volcano"]

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


def write(name: str, folder: Path, layers: int = 3, shard: str = "5GB", **text_options: Any) -> Path:
    """Writes the folder and returns its path.

    Args:
        name: family.
        folder: where to.
        layers: of the language model.
        shard: most that a file of weights holds.
        text_options: as in `families.config`.
    """
    processor, ids = {"chameleon": _chameleon, "llava": _llava, "llava_next": _llava_next}.get(name, _qwen)(name)
    config = families.config(name, layers, **text_options)
    for key, value in ids.items():
        setattr(config, key, value)
    text = config.get_text_config(decoder=True)
    tokenizer = processor.tokenizer
    assert len(tokenizer) <= text.vocab_size
    text.bos_token_id = tokenizer.bos_token_id
    text.eos_token_id = tokenizer.eos_token_id
    text.pad_token_id = tokenizer.pad_token_id
    families.build(config).save_pretrained(folder, max_shard_size=shard)
    processor.save_pretrained(folder)
    return folder


def write_as_released(name: str, folder: Path, **text_options: Any) -> Path:
    """A LLaVA or LLaVA-NeXT folder as on the Hub: shards with an index, and the tower's last layer but one."""
    write(name, folder, shard="100KB", **text_options)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_feature_layer": -2}))
    as_older_releases(folder)
    return folder


def as_older_releases(folder: Path) -> None:
    """Lays a folder out as most of the Hub has it: image processor and chat template in JSON files of their own."""
    saved = json.loads((folder / "processor_config.json").read_text())
    images = saved.pop("image_processor")
    images["image_processor_type"] = images["image_processor_type"].removesuffix("Pil")
    images["processor_class"] = saved["processor_class"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    if saved["processor_class"].startswith("Qwen"):  # has nothing else to say, so there never was such a file
        (folder / "processor_config.json").unlink()
    else:
        (folder / "processor_config.json").write_text(json.dumps(saved))
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()


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
        "vocabulary_map": {word: vocabulary[word] for word in ("<image>", "<pad>", "<racm3:break>", "<eoss>", *codes)},
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


def write_volcano(folder: Path, projector: str = "linear", layers: int = 3) -> Any:
    """A folder as VoCoT's release lays it out, in two shards; returns the stock LLaVA that it must open as.

    Args:
        folder: where to.
        projector: `linear` or `mlp2x_gelu`.
        layers: text layers.
    """
    tokenizer = byte_tokenizer({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]"}, ["<coor>", "</coor>"])
    known = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<coor>", "</coor>", "<ImageHere>"]})
    config = families.config("llava", layers, vocab_size=known)
    config.vision_feature_layer = -2
    config.vision_config.num_attention_heads = 1  # 64 numbers a head, as in every CLIP; here all 32
    config.projector_hidden_act = "gelu" if projector.startswith("mlp") else "linear"
    config.image_token_id = known  # just behind the table, as in the release
    config.text_config.eos_token_id, config.text_config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    model = families.build(config)
    second = model.model.multi_modal_projector.linear_2
    if projector == "linear":
        with torch.no_grad():
            second.weight.copy_(torch.eye(families.HIDDEN))
            second.bias.zero_()
    weights = {}
    for key, value in model.state_dict().items():
        key = key.replace("model.language_model.", "model.")
        key = key.replace("model.vision_tower.", "vision_encoder.vision_tower.vision_model.")
        one = "0." if projector.startswith("mlp") else ""
        key = key.replace("model.multi_modal_projector.linear_1.", f"front_mm_projector.{one}")
        key = key.replace("model.multi_modal_projector.linear_2.", "front_mm_projector.2.")
        if not (projector == "linear" and key.startswith("front_mm_projector.2.")):
            weights[key] = value.clone()
    weights["vision_encoder.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # as of old
    folder.mkdir()
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    own = {
        **config.text_config.to_dict(),
        "model_type": "VolCanoMistral",
        "architectures": ["VolCanoMistralForCausalLM"],
        "vision_encoder": "openai/clip-vit-large-patch14-336",
        "front_projector_type": projector,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 32,
    }
    (folder / "config.json").write_text(json.dumps(own))
    tokenizer.save_pretrained(folder)
    return model
