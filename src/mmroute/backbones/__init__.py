"""The model families that can be routed, how their checkpoints are loaded and their inputs prepared."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from mmroute.backbones.base import Family
from mmroute.backbones.chameleon import Chameleon
from mmroute.backbones.llava import Llava, LlavaNext
from mmroute.backbones.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL
from mmroute.errors import UnsupportedBackbone

__all__ = ["FAMILIES", "Family", "names", "of"]

FAMILIES: tuple[Family, ...] = (Qwen2VL(), Qwen25VL(), Qwen3VL(), Chameleon(), Llava(), LlavaNext())


def names() -> list[str]:
    """The supported families by their `config.model_type`."""
    return [family.name for family in FAMILIES]


def of(model: Any) -> Family:
    """The family of a model, checked to be one we can route.

    Raises:
        UnsupportedBackbone: not a Transformers model with a language head, an unknown family, or one of a known
            family with a sliding window or quantised weights.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedBackbone(
            f"a Transformers model is needed, given {type(model).__name__}; pass what from_pretrained returned "
            "(of a PEFT model: model.get_base_model())"
        )
    for family in FAMILIES:
        if family.matches(model):
            if model.get_output_embeddings() is None:
                raise UnsupportedBackbone(
                    f"{type(model).__name__} has no language head; load it with AutoModelForImageTextToText"
                )
            family.check(model)
            return family
    given = getattr(model.config, "model_type", type(model).__name__)
    raise UnsupportedBackbone(
        f"no family file knows {given!r}; supported: {_listed(FAMILIES)}; "
        "a new family is one file in mmroute/backbones (see base.py)"
    )


def _listed(families: Iterable[Family]) -> str:
    return ", ".join(f"{family.name} (e.g. {family.example})" for family in families)
