"""The checkpoint folder of a small model: what plain Auto classes open, and where it came from.

Everything is written into a folder beside and moved into place, so a folder that exists is whole.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from mmroute.backbones.load import locate
from mmroute.errors import CheckpointMismatch
from mmroute.files import replacing_folder
from mmroute.tasks._texts import BOS, EOS, IMAGE, PAD, SPECIAL, UNK, VISION_END, VISION_START, VOCABULARY
from mmroute.train.loop import unwritable
from mmroute.train.small_model import MERGE, PATCH
from mmroute.train.words import word_tokenizer

__all__ = ["CHAT_TEMPLATE", "copy_weights", "make_tokenizer", "write_folder", "write_stock"]

MAX_TOKENS = 256
"""Largest picture in vision tokens that the processor leaves as it is."""
CHAT_TEMPLATE = (
    f"{BOS}"
    "{% for message in messages %}"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for block in message['content'] %}"
    "{% if block['type'] == 'image' %}"
    f" {VISION_START}{IMAGE}{VISION_END}"
    "{% elif block['type'] == 'text' %} {{ block['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
)
"""Prints the blocks in order, without roles: the model has only ever seen one text."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of the small Qwen-shaped models."""
    extra = [word for word in SPECIAL if word not in (BOS, EOS, PAD, UNK)]
    return word_tokenizer(VOCABULARY, SPECIAL, additional_special_tokens=extra)


def copy_weights(start: str, model: Any) -> None:
    """Gives a model the weights of a bundled checkpoint or of a folder.

    Raises:
        CheckpointMismatch: there is no checkpoint, or one of another shape.
    """
    _, folder = locate(start)
    try:
        other = type(model).from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for (name, new), (_, own) in zip(other.named_parameters(), model.named_parameters(), strict=True):
                if new.shape != own.shape:
                    raise ValueError(f"{name} is {list(new.shape)} there and {list(own.shape)} in the recipe")
                own.copy_(new)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointMismatch(f"{start} cannot be the start of this recipe ({error}); give one it made") from error


def write_folder(path: Path, model: Qwen2_5_VLForConditionalGeneration, recipe: str, results: dict[str, Any]) -> None:
    """Writes the model in bf16 with tokenizer, processor, chat template, recipe and figures.

    Args:
        path: folder to make; one that stands there is replaced only when the new one is whole.
        model: built by `small_model.build`.
        recipe: YAML text that `mmroute train backbone` takes.
        results: command, commit and figures, for `RESULTS.json`.

    Raises:
        MmrouteError: the disk is full; what stood at `path` still stands there.
    """
    try:
        with replacing_folder(path) as beside:
            _write(beside, model, recipe, results)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def write_stock(path: Path, model: Any, processor: Any, recipe: str, results: dict[str, Any]) -> None:
    """Writes any stock model in bf16 with its processor, recipe and figures.

    Args:
        path: as in `write_folder`.
        model: stays in its own dtype.
        processor: of the model.
        recipe: YAML text that `mmroute train backbone` takes.
        results: command, commit and figures, for `RESULTS.json`.

    Raises:
        MmrouteError: the disk is full; what stood at `path` still stands there.
    """
    stored = type(model)(model.config)
    stored.load_state_dict(model.state_dict())
    try:
        with replacing_folder(path) as beside:
            stored.to(torch.bfloat16).save_pretrained(beside)
            processor.save_pretrained(beside)
            (beside / "recipe.yaml").write_text(recipe)
            _json(beside / "RESULTS.json", results)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error


def _write(folder: Path, model: Qwen2_5_VLForConditionalGeneration, recipe: str, results: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    for part in ("text_config", "vision_config"):
        config[part]["dtype"] = "bfloat16"
    _json(folder / "config.json", config)
    GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    # The output layer is the embedding: one copy, under the name the stock class ties from.
    weights = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    image = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": (PATCH * MERGE) ** 2 * MAX_TOKENS},
    }
    processor = {"processor_class": "Qwen2_5_VLProcessor", "image_processor": image}
    _json(folder / "processor_config.json", processor)
    # Older readers look for the image processor's own file.
    _json(folder / "preprocessor_config.json", image | {"processor_class": "Qwen2_5_VLProcessor"})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "recipe.yaml").write_text(recipe)
    _json(folder / "RESULTS.json", results)


def _json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
