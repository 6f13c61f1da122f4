"""What training changed in a backbone, as a small file beside the routers: the new values of the tensors that moved.

`tuned` puts them into a loaded base model and takes them out again, bit for bit, so one base serves many recipes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmroute.engine.attach import Routed
from mmroute.engine.saving import load
from mmroute.errors import CheckpointMismatch, ConfigError
from mmroute.recipe import trained_folder
from mmroute.train.loop import replacing

__all__ = ["DELTA", "begun_from", "fingerprint", "save_delta", "tuned"]

DELTA = "backbone.safetensors"


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of these tensors in bf16, by name: what a base must be for a delta to fit it."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().bfloat16().contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def save_delta(folder: Path, before: Mapping[str, Tensor], after: Mapping[str, Tensor], base: str) -> None:
    """Writes the tensors of `after` that are not those of `before`, in bf16; nothing if none moved.

    Args:
        folder: where the routers lie.
        before: the base's values, by name.
        after: the values now, by the same names.
        base: what the base is called, for messages.
    """
    moved = {n: t.detach().cpu().bfloat16().contiguous() for n, t in after.items() if not torch.equal(t, before[n])}
    if not moved:
        (folder / DELTA).unlink(missing_ok=True)
        return
    about = {"base": base, "replaces": fingerprint({n: before[n] for n in moved})}
    with replacing(folder / DELTA) as beside:
        save_file(moved, beside, metadata={"mmroute": json.dumps(about), "format": "pt"})


@contextmanager
def tuned(model: nn.Module, folder: Path) -> Iterator[None]:
    """The model with a folder's new weights, until the block ends; as it is where the folder has none.

    Raises:
        CheckpointMismatch: the weights were trained on another base, or the file is broken.
    """
    path = folder / DELTA
    if not path.is_file():
        yield
        return
    about, tensors = _read(path)
    own: dict[str, Any] = dict(model.named_parameters())
    missing = sorted(set(tensors) - set(own))
    if missing or any(own[n].shape != t.shape for n, t in tensors.items()):
        raise CheckpointMismatch(
            f"{path}: made for {about['base']}, not for this model ({missing[:3] or 'other shapes'}); load that one"
        )
    before = {n: own[n].detach().clone() for n in tensors}
    if fingerprint(before) != about["replaces"]:
        raise CheckpointMismatch(
            f"{path}: trained on other weights of {about['base']} than this model "
            f"({getattr(model, 'name_or_path', '')}) has; train the routers on this one: mmroute train dare --model"
        )
    with torch.no_grad():
        for name, value in tensors.items():
            own[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                own[name].copy_(value)


@contextmanager
def begun_from(start: str | None, routed: Routed, backbone: str) -> Iterator[None]:
    """A run that begins where another ended, until the block ends; fresh parts and the model's own weights if `None`.

    Args:
        start: folder of the earlier run's parts, or their bundled name.
        routed: attached with the same methods.
        backbone: what the run trains of it.

    Raises:
        ConfigError: there is no such folder, or adapters would hide the weights in it.
        CheckpointMismatch: its parts are not those of this run, or were trained on another base.
    """
    if start is None:
        yield
        return
    if backbone == "lora":
        raise ConfigError("train.start brings weights that adapters would hide; give train.backbone full or frozen")
    folder = trained_folder(start)
    load(routed, folder)
    with tuned(routed.model, folder):
        yield


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["mmroute"])
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise CheckpointMismatch(f"{path}: cannot be read ({error}); copy or train it again") from None
