"""A checkpoint, with its processor, from a folder, the Hub or this package; told clearly when it cannot be."""

import importlib.util
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available
from transformers.utils import logging as hf_logging

from mmroute.backbones import names, volcano, vq
from mmroute.backbones.base import QUANTISED
from mmroute.backbones.chameleon import Chameleon
from mmroute.errors import CheckpointMismatch, ConfigError, MissingExtra, MmrouteError, UnsupportedBackbone
from mmroute.repository import fetched, is_hub_id

__all__ = ["bundled", "image_only", "load", "locate"]

_LOG = logging.getLogger(__name__)
_ASSETS = Path(__file__).parent.parent / "assets"
_DEFAULT = "tiny"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ATTENTION = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
_FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "consolidated*.pth")


def bundled() -> list[str]:
    """Names of the checkpoints that come with this package."""
    return sorted(config.parent.name for config in _ASSETS.glob("*/config.json"))


def load(
    model: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantization: Any = None,
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa",
) -> PreTrainedModel:
    """A stock model in eval mode with its processor as `model.processor`.

    A Chameleon whose folder holds the decoder of its pictures (Anole) has it as `model.picture_decoder`, else None.

    Args:
        model: a checkpoint folder, a Hub id (`owner/name`), or a bundled checkpoint's name; None is `tiny`.
        dtype: float32, bfloat16 or float16; None is the checkpoint's own, and float32 for bundled ones, which are
            stored in bfloat16 only to be small.
        device: where to put it; None is the CPU.
        device_map: instead, how accelerate spreads it over devices ("auto", or module name to device).
        quantization: weights are quantised while they are read: Transformers' `BitsAndBytesConfig` or
            `TorchAoConfig`. A checkpoint that is quantised already needs none.
        attention: attention backend.

    Raises:
        CheckpointMismatch: there is no such checkpoint, files of it are missing or broken, or its weights do not fit.
        UnsupportedBackbone: no family file knows the model.
        ConfigError: dtype, device, device_map, quantization or attention is not one of those allowed.
        MissingExtra: a package is missing that device_map or quantised weights need.
    """
    options: dict[str, Any] = {"attn_implementation": attention}
    if attention not in _ATTENTION:
        raise ConfigError(f"attention: one of {', '.join(_ATTENTION)} (given {attention!r})")
    model = _DEFAULT if model is None else model
    if dtype is None and str(model) in bundled():
        dtype = torch.float32
    if dtype is not None:
        options["dtype"] = _dtype(dtype)
    target = _device(device)
    if device_map is not None:
        options["device_map"] = _device_map(device_map, device)
    name, folder = locate(model)
    kind = _check_folder(name, folder)
    if quantization is not None:
        options["quantization_config"] = quantization
    _check_quantised(name, folder, quantization)
    try:
        with _quiet():
            if kind == volcano.MODEL_TYPE:
                shards = [folder / file for file in _weight_files(name, folder)]
                loaded, report = volcano.open_model(folder, _json(name, folder / "config.json"), shards, **options)
            else:
                loaded, report = AutoModelForImageTextToText.from_pretrained(
                    folder, output_loading_info=True, **options
                )
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, MmrouteError):
            raise
        raise CheckpointMismatch(f"{name}: the weights cannot be read: {error}; fetch the checkpoint again") from None
    _check_keys(name, report)
    loaded.config._name_or_path = str(name)
    loaded.processor = _processor(folder, kind, loaded)
    if target is not None and target.type != "cpu":  # read to there; bitsandbytes' weights refuse to be moved at all
        loaded.to(target)
    if kind == Chameleon.name:
        loaded.__dict__["picture_decoder"] = vq.find_decoder(folder, loaded)  # no part of the stock model's weights
    return loaded.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """No bar for reading local files; a download's bar stays as the user has it."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _dtype(given: str | torch.dtype) -> torch.dtype:
    found = _DTYPES.get(str(given).removeprefix("torch."))
    if found is None:
        raise ConfigError(f"dtype: one of {', '.join(_DTYPES)} (given {given!r})")
    return found


def _device(given: str | torch.device | None) -> torch.device | None:
    if given is None:
        return None
    try:
        device = torch.device(given)
    except RuntimeError:
        raise ConfigError(f"device: cpu, cuda, cuda:N or mps (given {given!r})") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: this machine has no CUDA device (given {given!r}); use cpu")
    return device


def _device_map(given: Any, device: Any) -> Any:
    if device is not None:
        raise ConfigError(f"device={device!r} and device_map={given!r} both say where the model goes; give one")
    if isinstance(given, str) and given not in ("auto", "balanced", "balanced_low_0", "sequential"):
        _device(given)
    elif not isinstance(given, str | dict):
        raise ConfigError(f'device_map: "auto", a device, or module name to device (given {given!r})')
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtra("device_map", "accelerate", "train")
    return given


def _check_quantised(name: str, folder: Path, asked: Any) -> None:
    """Raises where the weights are, or shall be, quantised in a way that cannot be routed or read here."""
    saved = _json(name, folder / "config.json").get("quantization_config") or {}
    given = getattr(asked, "quant_method", None) if asked is not None else saved.get("quant_method")
    if asked is None and not saved:
        return
    if asked is not None and saved:
        raise ConfigError(f"{name} is quantised already ({saved.get('quant_method')}); leave quantization out")
    method = str(getattr(given, "value", given))
    if method not in QUANTISED:
        raise UnsupportedBackbone(
            f"{name}: weights quantised by {method!r}; {' and '.join(QUANTISED)} can be routed, or take the checkpoint "
            "in bfloat16"
        )
    if importlib.util.find_spec(method) is None:  # each is the name of its package
        raise ConfigError(f"{name}: {method} weights need {method}, which is not installed; pip install {method}")


def locate(model: str | Path) -> tuple[str, Path]:
    """A checkpoint's name for messages and saved files, and its folder; what is on the Hub is fetched.

    Raises:
        CheckpointMismatch: no folder, no bundled name, and nothing that the Hub can give.
    """
    name = str(model)
    if Path(model).is_dir():
        return name, Path(model)
    if name in bundled():
        return name, _ASSETS / name
    if not is_hub_id(model):
        listed = ", ".join(bundled()) or "none in this installation"
        raise CheckpointMismatch(
            f"{name!r} is no folder and no bundled checkpoint (bundled: {listed}); "
            "give a checkpoint folder or a Hub id such as Qwen/Qwen2.5-VL-3B-Instruct"
        )
    return name, fetched(name, _FETCHED, "save_pretrained")


def _check_folder(name: str, folder: Path) -> str:
    """The folder's model type, once every file that loading needs is there."""
    missing = []
    if not (folder / "config.json").exists():
        missing.append("config.json")
    files = _weight_files(name, folder)
    where = f" (named in {_INDEX})" if (folder / _INDEX).exists() else ""
    missing += [f"{file}{where}" for file in files if not (folder / file).exists()]
    config = folder / "config.json"
    own = config.exists() and _json(name, config).get("model_type") == volcano.MODEL_TYPE
    for choices in (_TOKENIZERS,) if own else (_TOKENIZERS, _PROCESSORS):
        if not any((folder / file).exists() for file in choices):
            missing.append(" or ".join(choices))
    if missing:
        hint = "copy the whole checkpoint folder"
        if (folder / "mmroute.json").exists():
            hint = "this folder holds saved routing parts: load their base model, then the parts"
        elif (folder / "adapter_config.json").exists():
            hint = "this folder holds a PEFT adapter: load its base model, then PeftModel.from_pretrained"
        elif pickled := sorted(file.name for pattern in _PICKLED for file in folder.glob(pattern)):
            hint = (
                f"its weights are pickled ({pickled[0]}), which may run code when opened and is never opened here; "
                "where you trust them, convert"
            )
            if own or pickled[0].startswith("consolidated"):
                hint += " them to safetensors"  # Transformers opens neither
            else:
                hint += (
                    ": python -c 'from transformers import AutoModelForImageTextToText as A; "
                    f'A.from_pretrained("{folder}").save_pretrained("{folder}")\''
                )
        raise CheckpointMismatch(f"{name}: missing {', '.join(missing)}; {hint}")
    kind = _json(name, folder / "config.json").get("model_type")
    supported = [*names(), volcano.MODEL_TYPE]
    if kind not in supported:
        raise UnsupportedBackbone(f"{name}: config.json says model_type {kind!r}; supported: {', '.join(supported)}")
    return str(kind)


def _weight_files(name: str, folder: Path) -> list[str]:
    """Names of the files that the weights are, or should be, in."""
    index = folder / _INDEX
    return sorted(set(_json(name, index).get("weight_map", {}).values())) if index.exists() else ["model.safetensors"]


def _json(name: str, file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointMismatch(f"{name}: {file.name} is not JSON ({error}); fetch the checkpoint again") from None
    if not isinstance(data, dict):
        raise CheckpointMismatch(f"{name}: {file.name} holds no JSON object; fetch the checkpoint again")
    return data


def _check_keys(name: str, report: Any) -> None:
    """Raises for weights that the checkpoint lacks: Transformers would go on with random ones."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointMismatch(
            f"{name}: {len(missing)} weights are not in the checkpoint, e.g. {missing[0]}; config and weights "
            "are of different models"
        )
    unexpected = sorted(key for key in report["unexpected_keys"] if not key.startswith(vq.PREFIX))
    if any(key.startswith("mmroute.") or ".mmroute." in key for key in unexpected):
        _LOG.warning("%s was saved while routing was attached; its routing parts are not loaded from here", name)
    elif unexpected:
        _LOG.warning("%s: %d weights of the checkpoint are unused, e.g. %s", name, len(unexpected), unexpected[0])


class _WithoutVideos(ProcessorMixin):
    """Stands behind a Qwen-VL processor and takes the video processor that it hands on away."""

    def __init__(self, image_processor: Any, tokenizer: Any, video_processor: Any, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def image_only(base: type) -> type:
    """A Qwen-VL processor class that needs no video processor, which needs torchvision.

    ProcessorMixin reads off the signature of `__init__` which parts a processor has; this one names no video part.
    """

    class ImageOnly(base, _WithoutVideos):  # type: ignore[misc, valid-type]
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            super().__init__(image_processor, tokenizer, None, chat_template=chat_template)

    ImageOnly.__name__ = ImageOnly.__qualname__ = base.__name__  # what save_pretrained writes down
    return ImageOnly


def _processor(folder: Path, kind: str, model: Any = None) -> Any:
    """The folder's processor, padding on the left, with its chat template."""
    if kind == volcano.MODEL_TYPE:
        processor = volcano.open_processor(folder, model)
    elif kind.startswith("qwen") and not is_torchvision_available():
        processor = image_only(_qwen_processor(kind)).from_pretrained(folder)  # type: ignore[attr-defined]
    else:
        processor = AutoProcessor.from_pretrained(folder)
    if not processor.chat_template:  # ChameleonProcessor loses it: its __init__ does not take one
        saved, _ = type(processor).get_processor_dict(folder)
        processor.chat_template = saved.get("chat_template") or processor.tokenizer.chat_template
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def _qwen_processor(kind: str) -> type:
    import transformers  # the classes take seconds to import; only this family pays

    return {
        "qwen2_vl": transformers.Qwen2VLProcessor,
        "qwen2_5_vl": transformers.Qwen2_5_VLProcessor,
        "qwen3_vl": transformers.Qwen3VLProcessor,
    }[kind]
