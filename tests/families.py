"""Tiny random models of the six families, and inputs for them made without a processor.

The random weights are wider than Transformers' default: with that one attention is nearly uniform, and a test that
compares logits would pass whatever attention does.

Legend: B batch, N positions.
"""

from collections.abc import Mapping
from typing import Any, Literal

import pytest
import torch
import transformers
from torch import Tensor

__all__ = [
    "EACH",
    "IMAGE",
    "NAMES",
    "TWINS",
    "VISION_END",
    "VISION_START",
    "build",
    "config",
    "join",
    "make",
    "make_hop",
    "make_inputs",
    "slice_batch",
]

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "chameleon", "llava", "llava_next")
TWINS = ("qwen2_vl", "llava_next")
"""Families whose text model is Qwen2.5-VL's and LLaVA's over again; see unit/backbones/test_family_facts.py."""
EACH = [pytest.param(name, marks=[pytest.mark.slow] * (name in TWINS)) for name in NAMES]
"""`NAMES` for `parametrize` where only the text model matters."""
PAD, BOS, EOS = 0, 1, 2
IMAGE, VIDEO, VISION_START, VISION_END = 500, 501, 502, 503
VOCAB = 512
FIRST_CODE, NUM_CODES = 10, 64
"""Chameleon's image codes are vocabulary ids 10 .. 73; text ids of inputs start at 100."""
HIDDEN, HEADS, KV_HEADS = 64, 4, 2
GRIDS = ((1, 8, 8), (1, 4, 8), (1, 8, 4))
"""Patches of a Qwen-VL row's images in order: 16, 8 and 8 vision positions after the 2 x 2 merge."""
SIDE, NUM_SQUARE = 32, 16
"""Pixels a side, and vision positions, of an image of the other families."""
TILE, PINPOINTS = 16, [[16, 32], [32, 16], [32, 32]]
"""Pixels a side of LLaVA-NeXT's tiles, and the sizes that images are scaled to; there a grid's patch is 4 px."""


def make(
    name: str, attn: Literal["sdpa", "eager"] = "sdpa", layers: int = 5, seed: int = 0, **text_options: Any
) -> transformers.PreTrainedModel:
    """A float32 model in eval mode that never ends a sequence by itself.

    Args:
        name: one of `NAMES`.
        attn: attention backend of text model and tower.
        layers: text layers.
        seed: equal seeds give equal weights.
        text_options: overrides of the text config, e.g. `swin_norm=True` on Chameleon.
    """
    return build(config(name, layers, **text_options), attn, seed)


def build(config: Any, attn: Literal["sdpa", "eager"] = "sdpa", seed: int = 0) -> transformers.PreTrainedModel:
    """The random model of a config; see `make`."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation=attn).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 or "_norm." in key:  # norms and biases: neither exactly 1 nor exactly 0
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = config.get_text_config(decoder=True).pad_token_id
    return model


def config(name: str, layers: int = 5, **text_options: Any) -> Any:
    """The config of a tiny model; see `make`."""
    head_dim = HIDDEN // HEADS
    text = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 8192,
        "initializer_range": 0.1,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **text_options,
    }
    if name == "chameleon":
        return transformers.ChameleonConfig(
            **text,
            vocabulary_map={"<image>": IMAGE, "<pad>": PAD, **{code_name(i): FIRST_CODE + i for i in range(NUM_CODES)}},
            vq_config={
                "num_embeddings": NUM_CODES,
                "embed_dim": 16,
                "latent_channels": 16,
                "resolution": SIDE,
                "base_channels": 32,
                "channel_multiplier": [1, 1, 1, 2],
                "num_res_blocks": 1,
            },
        )
    if name.startswith("llava"):
        kinds = {"mistral": transformers.MistralConfig, "llama": transformers.LlamaConfig}
        kind = kinds[text.pop("kind", "mistral" if name == "llava" else "llama")]
        if kind is transformers.MistralConfig:
            text = {"sliding_window": None, **text}
        tower = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE if name == "llava" else TILE,
            "patch_size": 8,
        }
        own: dict[str, Any] = {"image_seq_length": NUM_SQUARE}
        if name == "llava_next":
            own = {"image_seq_length": (TILE // 8) ** 2, "image_grid_pinpoints": PINPOINTS}
        return {"llava": transformers.LlavaConfig, "llava_next": transformers.LlavaNextConfig}[name](
            text_config=kind(**text, head_dim=head_dim),
            vision_config=transformers.CLIPVisionConfig(**tower),
            image_token_id=IMAGE,
            vision_feature_layer=-1,
            **own,
        )
    third = head_dim // 2 // 3  # M-RoPE: pairs of a head that turn with time, row and column
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [head_dim // 2 - 2 * third, third, third]}
    vision: dict[str, Any] = {"num_heads": 2, "patch_size": 4}
    if name == "qwen2_vl":
        kind = transformers.Qwen2VLConfig
        vision |= {"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": HIDDEN, "intermediate_size": 64}
        if name == "qwen2_5_vl":
            kind = transformers.Qwen2_5_VLConfig
            vision |= {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
        else:
            kind = transformers.Qwen3VLConfig
            vision |= {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
            text["head_dim"] = head_dim
            rope["mrope_interleaved"] = True
    return kind(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def code_name(code: int) -> str:
    """The vocabulary's name of an image code: its digits as letters A to J."""
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def _pixels(name: str, model: Any, grids: list[tuple[int, int, int]], generator: torch.Generator) -> Tensor:
    if name.startswith("qwen"):
        patch = model.config.vision_config.patch_size
        patches = sum(t * h * w for t, h, w in grids)
        return torch.randn(patches, 3 * 2 * patch**2, generator=generator)
    if name == "llava_next":  # the whole image, then its tiles; what an image has less than five is padding
        pixels = torch.randn(len(grids), 5, 3, TILE, TILE, generator=generator)
        for image, (_, h, w) in zip(pixels, grids, strict=True):
            image[1 + h * w // 16 :] = 0
        return pixels
    return torch.randn(len(grids), 3, SIDE, SIDE, generator=generator)


def _num_vision(name: str, grid: tuple[int, int, int]) -> int:
    _, h, w = grid
    if name == "llava_next":
        return (TILE // 8) ** 2 + h // 2 * (w // 2 + 1)
    return h * w // 4 if name.startswith("qwen") else NUM_SQUARE


def make_inputs(
    name: str,
    model: Any,
    batch: int = 1,
    pads: list[int] | None = None,
    seed: int = 1,
    images: int = 1,
    before: int = 5,
    after: int = 9,
) -> dict[str, Tensor]:
    """A batch: left padding, then for each image some text and the image, then text.

    All rows have the same length; a row with padding has as many text positions less at its end.

    Args:
        name: one of `NAMES`.
        model: the model of that name, for its patch size.
        batch: rows.
        pads: padding of each row, below `after`; None is none.
        seed: equal seeds give equal inputs.
        images: per row, 0 to 3.
        before: text positions before each image.
        after: text positions after the last image, of a row without padding.

    Returns:
        `input_ids`, `attention_mask` and the family's image tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    pads = [0] * batch if pads is None else pads
    assert len(pads) == batch
    assert max(pads) < after
    assert images <= len(GRIDS)
    grids = list(GRIDS[:images])
    N = sum(before + 2 + _num_vision(name, grid) for grid in grids) + after
    ids = torch.randint(100, 480, (batch, N), generator=generator)
    mask = torch.ones(batch, N, dtype=torch.long)
    for row, pad in enumerate(pads):
        ids[row, :pad] = PAD
        mask[row, :pad] = 0
        at = pad
        for grid in grids:
            ids[row, at + before] = VISION_START
            at += before + 1
            ids[row, at : at + _num_vision(name, grid)] = IMAGE
            at += _num_vision(name, grid)
            ids[row, at] = VISION_END
            at += 1
    return _with_images(name, model, ids, mask, grids * batch, generator)


def make_hop(
    name: str, model: Any, batch: int = 1, seed: int = 5, images: int = 1, before: int = 3, after: int = 4
) -> dict[str, Tensor]:
    """A chunk that follows a prompt: an observation without padding. `join` makes it part of a whole sequence."""
    return make_inputs(name, model, batch, None, seed, images, before, after)


def _with_images(
    name: str, model: Any, ids: Tensor, mask: Tensor, grids: list[tuple[int, int, int]], generator: torch.Generator
) -> dict[str, Tensor]:
    out = {"input_ids": ids, "attention_mask": mask}
    if grids:
        out["pixel_values"] = _pixels(name, model, grids, generator)
        if name.startswith("qwen"):
            out["image_grid_thw"] = torch.tensor(grids)
            out["mm_token_type_ids"] = (ids == IMAGE).long()
        if name == "llava_next":
            out["image_sizes"] = torch.tensor([(4 * h, 4 * w) for _, h, w in grids])
    return out


def join(name: str, *chunks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One batch that holds the chunks one after the other: what an uncached forward of everything takes.

    Images are put row by row, in the order of the text, as the models read them.
    """
    out = {key: torch.cat([chunk[key] for chunk in chunks], dim=1) for key in ("input_ids", "attention_mask")}
    batch = out["input_ids"].shape[0]
    pictured = [chunk for chunk in chunks if "pixel_values" in chunk]
    if pictured:
        pixels = [chunk["pixel_values"].unflatten(0, (batch, -1)) for chunk in pictured]
        out["pixel_values"] = torch.cat(pixels, dim=1).flatten(0, 1)
        if name.startswith("qwen"):
            grids = [chunk["image_grid_thw"].unflatten(0, (batch, -1)) for chunk in pictured]
            out["image_grid_thw"] = torch.cat(grids, dim=1).flatten(0, 1)
            out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).long()
        if name == "llava_next":
            sizes = [chunk["image_sizes"].unflatten(0, (batch, -1)) for chunk in pictured]
            out["image_sizes"] = torch.cat(sizes, dim=1).flatten(0, 1)
    return out


def slice_batch(batch: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    """One row of a batch alone, without its padding."""
    real = batch["attention_mask"][row].bool()
    rows = batch["input_ids"].shape[0]
    out = {}
    for key, value in batch.items():
        if value.shape[0] == rows and value.ndim == 2 and value.shape[1] == real.shape[0]:
            out[key] = value[row : row + 1, real]
        else:  # image tensors: each row holds as many
            out[key] = value.unflatten(0, (rows, -1))[row]
    return out
