"""Images and questions as users give them, checked, and as a model takes them."""

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmroute import backbones
from mmroute.errors import InputError

__all__ = [
    "MAX_RATIO",
    "MAX_SIDE",
    "MIN_SIDE",
    "Source",
    "check_given",
    "check_prompt",
    "open_images",
    "opened",
    "prepare",
    "user_message",
]

Source = str | Path | bytes | Image.Image
"""An image file's path, its bytes, or a PIL image."""

MIN_SIDE, MAX_SIDE = 4, 10_000
"""Pixels. Below 4, image processors mistake a side for the colour channels."""
MAX_RATIO = 200
"""Longer to shorter side; Qwen-VL's image processor takes no more."""


def open_images(sources: Sequence[Source] | Source) -> list[Image.Image]:
    """The images in RGB and upright, fully read.

    Of an animation it is the first frame; transparency is laid on white; the camera's orientation is applied.

    Raises:
        InputError: a file is missing, empty or no readable image, or an image is too small, large or narrow.
    """
    if isinstance(sources, str | Path | bytes | Image.Image):
        sources = [sources]
    return [_open(source, f"image {number}") for number, source in enumerate(sources, 1)]


def _open(source: Source, name: str) -> Image.Image:
    file: Path | io.BytesIO
    if isinstance(source, Image.Image):
        return _rgb(source, name)
    if isinstance(source, bytes):
        name = f"{name} ({len(source)} bytes)"
        file, size = io.BytesIO(source), len(source)
    elif isinstance(source, str | Path):
        if str(source).startswith(("http://", "https://")):
            raise InputError(f"{name} is an address ({source}); images are read from files; download it first")
        file = Path(source)
        name = f"{name} ({file})"
        if not file.exists():
            raise InputError(f"{name}: no such file; check the path")
        if file.is_dir():
            raise InputError(f"{name} is a folder; give one image file each")
        size = file.stat().st_size
    else:
        raise InputError(f"{name} is a {type(source).__name__}; give a path, bytes or a PIL image")
    if size == 0:
        raise InputError(f"{name} is empty (0 bytes); the file may not have been written to its end")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            picture = Image.open(file)
        with picture:
            return _rgb(picture, name)
    except Image.DecompressionBombError:
        raise InputError(f"{name} has too many pixels; allowed: sides of {MIN_SIDE} to {MAX_SIDE:,} px") from None
    except InputError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for broken files
        raise InputError(
            f"{name} cannot be read as an image ({error}); give a whole PNG, JPEG, WebP, GIF, BMP or TIFF file"
        ) from None


def _rgb(image: Image.Image, name: str) -> Image.Image:
    width, height = image.size  # known from the header: checked before the pixels are read
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_SIDE:
        raise InputError(
            f"{name} is {width} x {height} px; allowed: sides of {MIN_SIDE} to {MAX_SIDE:,} px; resize or crop it"
        )
    if max(width, height) >= MAX_RATIO * min(width, height):
        raise InputError(f"{name} is {width} x {height} px; allowed: a ratio below {MAX_RATIO}:1; crop it")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip sixteen bits to eight instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise InputError(f"{name} has 32-bit pixels of unknown range; save it with 8 bits a channel")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def user_message(question: str, images: Sequence[Any]) -> list[dict[str, Any]]:
    """A conversation of one turn: the images in order, then the question."""
    content = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def check_given(question: str, images: Sequence[Any]) -> None:
    """Whether there is anything to ask; needs no model.

    Raises:
        InputError: no question, or no image.
    """
    if not question.strip():
        raise InputError("the question is empty; write what to find out about the image")
    if not images:
        raise InputError("no image given; at least one is needed (-i FILE on the command line)")


def check_prompt(question: str, images: Sequence[Any], processor: Any) -> None:
    """Whether a question about these images can be asked.

    Raises:
        InputError: no question, no image, or the processor's chat template does not place every image once.
    """
    check_given(question, images)
    _placed([user_message(question, images)], processor)


def _placed(conversations: list[list[dict[str, Any]]], processor: Any) -> None:
    """Raises InputError unless each conversation's rendered text has one placeholder for each of its images."""
    if not processor.chat_template:
        raise InputError("the processor has no chat template; set processor.chat_template to the model's own")
    for conversation in conversations:
        given = len(_images(conversation))
        text = processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        places = text.count(processor.image_token)
        if places != given:
            raise InputError(
                f"{given} image{'s' * (given != 1)} where the prompt has {places} place{'s' * (places != 1)} "
                f"({processor.image_token}); give as many images as the chat template places, and do not write "
                f"{processor.image_token} in a text"
            )


def _images(conversation: list[dict[str, Any]]) -> list[Any]:
    return [
        item["image"]
        for message in conversation
        if not isinstance(message["content"], str)
        for item in message["content"]
        if item["type"] == "image"
    ]


def opened(conversation: Any) -> list[dict[str, Any]]:
    """The conversation with its images opened and its texts as blocks; see `prepare` for what is allowed."""
    out = []
    for message in conversation:
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise InputError(f"a message is a mapping with role and content, given {message!r}")
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        items = []
        for item in content:
            kind = item.get("type")
            if kind == "text":
                items.append({"type": "text", "text": item["text"]})
            elif kind == "image":
                # Footgun: processors skip an image entry without image data and go on without it.
                if item.get("image") is None:
                    raise InputError('an image entry without its image; write {"type": "image", "image": FILE}')
                items.append({"type": "image", "image": open_images(item["image"])[0]})
            else:
                raise InputError(f"content of type {kind!r} given; allowed: text, image")
        out.append({"role": message["role"], "content": items})
    return out


def prepare(
    model: Any, processor: Any, messages: Sequence[Any], template: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """The tensors that `model(**batch)` and `model.generate(**batch)` take.

    Args:
        model: a model of a supported family, attached or not.
        processor: its processor, as `load` sets it.
        messages: one conversation (a list of messages with `role` and `content`; content is text or a list of
            `{"type": "text", "text": ...}` and `{"type": "image", "image": path, bytes or PIL image}`), or a list of
            conversations, which are padded on the left to the longest.
        template: variables of the chat template, such as `{"mmroute_rating": True}`.

    Returns:
        `input_ids`, `attention_mask` and the image tensors, on the model's device, pixels in its dtype.

    Raises:
        InputError: an image cannot be used, or is not placed in the prompt exactly once.
    """
    family = backbones.of(model)
    if not messages:
        raise InputError("no messages given; write at least one user message")
    batched = not isinstance(messages[0], Mapping)
    conversations = [opened(c) for c in (messages if batched else [messages])]
    _placed(conversations, processor)
    processor.tokenizer.padding_side = "left"
    encoded = processor.apply_chat_template(
        conversations,
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
        **(template or {}),
    )
    batch = {key: value for key, value in encoded.items() if isinstance(value, Tensor)}
    images = sum(len(_images(conversation)) for conversation in conversations)
    length, limit = batch["input_ids"].shape[1], model.config.get_text_config(decoder=True).max_position_embeddings
    if length > limit:
        vision = int((batch["input_ids"] == model.config.image_token_id).sum(1).max())
        raise InputError(
            f"the prompt has {length} positions, {vision} of them of its images, and this model reads at most {limit}; "
            "give fewer or smaller images, or a shorter text"
        )
    if images:
        taken = len(family.image_grid(model, batch))
        if taken != images:
            raise InputError(f"{images} images given, the processor took {taken}; give each conversation its images")
    if "mm_token_type_ids" in family.image_tensors and images:
        batch.setdefault("mm_token_type_ids", (batch["input_ids"] == model.config.image_token_id).long())
    else:
        batch.pop("mm_token_type_ids", None)
    batch.pop("token_type_ids", None)
    dtype = model.get_input_embeddings().weight.dtype
    return {
        key: value.to(device=model.device, dtype=dtype if torch.is_floating_point(value) else None)
        for key, value in batch.items()
    }
