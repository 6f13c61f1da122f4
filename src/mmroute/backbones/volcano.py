"""VolCano (VoCoT): LLaVA wiring in a checkpoint layout of its own, opened as the stock LLaVA that it is.

A Mistral text model, a CLIP-L/14 tower and a projector of one or two linear maps; boxes are written as text. Its folder
holds a Mistral config with the tower's name in it, and one flat set of weights:

    model.*, lm_head.*                       the text model
    vision_encoder.vision_tower.*            the tower
    front_mm_projector.* or .0.*, .2.*       the projector, `linear` or `mlp2x_gelu`

Legend: V vocabulary, D hidden.

Source: VoCoT (NAACL 2025, arXiv 2405.16919) and its released code, for names and sizes.
Deviates: `<ImageHere>` lies just behind the embedding table there, since it is never looked up; here the table gets a
    row for it, the mean of the others. Sizes of the tower are read off its weights, with CLIP's 64 numbers a head.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmroute.errors import CheckpointMismatch

__all__ = ["IMAGE_TOKEN", "MODEL_TYPE", "open_model", "open_processor", "rename"]

MODEL_TYPE = "VolCanoMistral"
IMAGE_TOKEN = "<ImageHere>"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %} {% else %}[INST] {% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<ImageHere>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% else %} [/INST]{% endif %}{% endfor %}"
)
HEAD = 64
"""Numbers of one attention head in every CLIP tower."""
_RENAMED = (
    (r"^model\.", "model.language_model."),
    (r"^vision_encoder\.vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"^front_mm_projector\.(0\.)?(weight|bias)$", r"model.multi_modal_projector.linear_1.\2"),
    (r"^front_mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
)
_LEFT_OUT = re.compile(r"position_ids$|^(behind_projector|vision_generator|input_embed_grad|output_embed_grad)")


def rename(key: str) -> str | None:
    """The stock name of one of its weights; None for what answering does not need.

    Example:
        >>> rename("front_mm_projector.0.weight"), rename("model.norm.weight")
        ('model.multi_modal_projector.linear_1.weight', 'model.language_model.norm.weight')
    """
    if _LEFT_OUT.search(key):
        return None
    for pattern, stock in _RENAMED:
        if re.search(pattern, key):
            return re.sub(pattern, stock, key)
    return key


def open_model(folder: Path, config: dict[str, Any], shards: list[Path], **options: Any) -> tuple[Any, dict[str, Any]]:
    """The stock model, and Transformers' report of weights missing and unused.

    Args:
        folder: the checkpoint's.
        config: its config.json.
        shards: its weight files.
        options: for `from_pretrained`.
    """
    from transformers import LlavaForConditionalGeneration  # its classes take seconds to import, like all below

    weights: dict[str, Tensor] = {}
    for shard in shards:
        for key, value in load_file(shard).items():
            name = rename(key)
            if name is not None:
                weights[name] = value
    try:
        stock = _config(config, weights, _tokenizer(folder))
    except KeyError as missing:
        raise CheckpointMismatch(
            f"{folder}: no weight {missing} after renaming; VolCano's checkpoint holds model.*, "
            "vision_encoder.vision_tower.* and front_mm_projector.*"
        ) from None
    _widen(weights, stock.text_config.vocab_size)
    if "model.multi_modal_projector.linear_2.weight" not in weights:  # one linear map: the second changes nothing
        D = stock.text_config.hidden_size
        like = weights["model.multi_modal_projector.linear_1.weight"]
        weights["model.multi_modal_projector.linear_2.weight"] = torch.eye(D, dtype=like.dtype)
        weights["model.multi_modal_projector.linear_2.bias"] = torch.zeros(D, dtype=like.dtype)
    return LlavaForConditionalGeneration.from_pretrained(
        None, config=stock, state_dict=weights, output_loading_info=True, **{"dtype": stock.dtype, **options}
    )


def _config(config: dict[str, Any], weights: dict[str, Tensor], tokenizer: Any) -> Any:
    from transformers import CLIPVisionConfig, LlavaConfig, MistralConfig

    text = MistralConfig(**{k: v for k, v in config.items() if k in MistralConfig().to_dict() and k != "model_type"})
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    text.vocab_size = max(text.vocab_size, image_token + 1)
    tower = "model.vision_tower."
    patch = weights[tower + "embeddings.patch_embedding.weight"]
    places = weights[tower + "embeddings.position_embedding.weight"].shape[0] - 1
    layers = {m[1] for k in weights if (m := re.match(rf"{re.escape(tower)}encoder\.layers\.(\d+)\.", k))}
    return LlavaConfig(
        text_config=text,
        vision_config=CLIPVisionConfig(
            hidden_size=patch.shape[0],
            intermediate_size=weights[f"{tower}encoder.layers.0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=len(layers),
            num_attention_heads=max(patch.shape[0] // HEAD, 1),
            patch_size=patch.shape[-1],
            image_size=int(places**0.5) * patch.shape[-1],
        ),
        image_token_id=image_token,
        projector_hidden_act="gelu" if config.get("front_projector_type", "linear").startswith("mlp") else "linear",
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if config.get("mm_vision_select_feature") == "cls_patch" else "default",
        image_seq_length=places,
        tie_word_embeddings=False,
        dtype=config.get("dtype", config.get("torch_dtype", "float32")),
    )


def _widen(weights: dict[str, Tensor], V: int) -> None:
    """Rows for tokens behind the table, as the release makes them: the mean of those there are."""
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        table = weights[name]
        if table.shape[0] < V:
            mean = table.float().mean(0, keepdim=True).to(table.dtype)
            weights[name] = torch.cat([table, mean.expand(V - table.shape[0], -1)])


def open_processor(folder: Path, model: Any) -> Any:
    """Its tokenizer beside images padded to a square, as it was trained; the folder holds no processor."""
    from transformers import LlavaImageProcessorPil, LlavaProcessor

    side, patch = model.config.vision_config.image_size, model.config.vision_config.patch_size
    images = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    return LlavaProcessor(
        images,
        _tokenizer(folder),
        patch_size=patch,
        vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=TEMPLATE,
    )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, MistralConfig

    tokenizer = AutoTokenizer.from_pretrained(folder, config=MistralConfig())  # its own type is unknown
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    return tokenizer
