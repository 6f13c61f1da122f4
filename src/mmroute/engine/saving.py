"""What routing adds to a model, in a folder of its own: `mmroute.json` says what it is, `mmroute.safetensors` what it
learned. Never inside the base checkpoint: `save_pretrained` of a vision-language model renames keys on the way out, and
routers read back from there would load nothing, silently.

    routed.save_pretrained("my-router")
    routed = mmroute.from_pretrained("my-router")                 # loads the base it was made for
    routed = mmroute.from_pretrained("my-router", base=model)     # or takes yours

A method of this package, or of an entry point, is rebuilt by name. Another class is never imported because a file says
so: pass an instance of it.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

import mmroute
from mmroute import hub, repository
from mmroute.config import options, parse, resolved
from mmroute.deepen.base import Deepener
from mmroute.engine.attach import Routed, attach
from mmroute.errors import CheckpointMismatch, ConfigError, MmrouteError
from mmroute.files import replacing
from mmroute.prune.base import Pruner
from mmroute.tokens import MAX_HOPS, Modality
from mmroute.trace import Shape

log = logging.getLogger(__name__)

__all__ = ["Manifest", "Method", "from_pretrained", "load", "read_manifest", "save"]

FORMAT = 1
MANIFEST, WEIGHTS = "mmroute.json", "mmroute.safetensors"
_SIZES = ("hidden", "layers", "heads", "kv_heads", "head_dim", "mlp")


@options
class Method:
    """One method as it was saved."""

    name: str
    """As the registry knows it, or `module:Class` where it does not."""
    config: dict[str, Any]
    rates: list[list[dict[str, float | None]]] | None = None
    """[layer][hop]: share of each modality that runs, null for all; the last hop stands for later ones."""


@options
class Manifest:
    """`mmroute.json`."""

    format: int
    versions: dict[str, str]
    family: str
    shape: dict[str, Any]
    base: dict[str, str | None]
    """`id` and `revision` of the model it was made for."""
    prefix_tokens: int
    strip_padding: bool
    executor: Literal["dense", "physical"]
    prune: Method | None
    deepen: Method | None
    weights: str
    """SHA-256 of `mmroute.safetensors`."""
    think: Method | None = None
    """How it was trained to reason; None where that was not said."""


# ---------------------------------------------------------------------- writing


def save(routed: Routed, folder: Path) -> None:
    """Writes what was added to the model: both files whole, or neither.

    Raises:
        MmrouteError: the folder cannot be written; what stood there still stands.
    """
    weights = tensor_bytes(_tensors(routed.parts), metadata={"format": "pt"})
    manifest = json.dumps(asdict(_manifest(routed, weights)), indent=1) + "\n"
    try:
        with ExitStack() as stack:
            for name, data in ((WEIGHTS, weights), (MANIFEST, manifest.encode())):
                with stack.enter_context(replacing(folder / name)).open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())  # both are on disk before either takes its name
    except OSError as error:
        raise MmrouteError(
            f"could not write {folder}: {error.strerror or error}; what stood there is as it was: free space, or "
            "choose a folder that can be written"
        ) from error


def _manifest(routed: Routed, weights: bytes) -> Manifest:
    c, config = routed.controller, routed.model.config
    return Manifest(
        format=FORMAT,
        versions={
            "mmroute": mmroute.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        family=c.family.name,
        shape=asdict(c.shape),
        base={"id": config.name_or_path or None, "revision": getattr(config, "_commit_hash", None)},
        prefix_tokens=c.prefix_tokens,
        strip_padding=c.strip_padding,
        executor=c.executor,
        prune=_method("prune", c.pruner, c.shape),
        deepen=_method("deepen", c.deepener, c.shape),
        weights=hashlib.sha256(weights).hexdigest(),
        think=_method("think", routed.think, c.shape),
    )


def _method(kind: str, part: Any, shape: Shape) -> Method | None:
    if part is None:
        return None
    # Through JSON once, so that what is written equals what will be read: tuples are lists there.
    config = json.loads(json.dumps(resolved(part.config)))
    rates = _rates(part, shape.layers) if isinstance(part, Pruner) else None
    return Method(name=_name(kind, part), config=config, rates=rates)


def _name(kind: str, part: Any) -> str:
    return hub.name_of(kind, type(part)) or f"{type(part).__module__}:{type(part).__qualname__}"


def _rates(pruner: Pruner, layers: int) -> list[list[dict[str, float | None]]]:
    table = []
    for layer in range(layers):
        acts = pruner.acts(layer, layers)
        hops = [
            {m.name.lower(): pruner.rate(layer, layers, hop, m) if acts else None for m in Modality}
            for hop in range(MAX_HOPS)
        ]
        while len(hops) > 1 and hops[-1] == hops[-2]:
            hops.pop()
        table.append(hops)
    return table


def _tensors(parts: nn.Module) -> dict[str, Tensor]:
    out = {}
    for name, value in parts.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # sharded: every rank must call
        out[name] = whole.detach().cpu().clone().contiguous()  # tied weights share memory, which the format refuses
    return out


# ---------------------------------------------------------------------- reading


def from_pretrained(
    folder: str | Path,
    base: Any = None,
    processor: Any = None,
    *,
    prune: Pruner | None = None,
    deepen: Deepener | None = None,
) -> Routed:
    """Attaches what `save_pretrained` wrote.

    Args:
        folder: holds `mmroute.json` and `mmroute.safetensors`; or a Hub id.
        base: a loaded model, or a folder, hub id or bundled name; None is the id that was saved.
        processor: see `attach`.
        prune: for a pruner that the registry does not know: an instance built with the saved options.
        deepen: likewise.

    Raises:
        CheckpointMismatch: files are missing, broken or of another format, or they do not fit the model.
    """
    if not Path(folder).exists() and repository.is_hub_id(folder):
        folder = repository.fetched(str(folder), (MANIFEST, WEIGHTS), "routed.save_pretrained")
    folder = Path(folder)
    manifest = read_manifest(folder)
    saved = (("prune", manifest.prune, prune), ("deepen", manifest.deepen, deepen), ("think", manifest.think, None))
    parts = {kind: _part(folder, kind, method, given) for kind, method, given in saved}
    model = _base(folder, manifest, base)
    routed = attach(
        model,
        processor,
        prefix_tokens=manifest.prefix_tokens,
        strip_padding=manifest.strip_padding,
        executor=manifest.executor,
        **parts,
    )
    try:
        load(routed, folder)
    except BaseException:
        routed.detach()
        raise
    return routed


def load(routed: Routed, folder: str | Path) -> None:
    """Reads saved weights into a model that is attached with the same methods.

    Raises:
        CheckpointMismatch: as `from_pretrained`; nothing has been changed then.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    c = routed.controller
    _same(folder, "family", manifest.family, c.family.name)
    for size in _SIZES:
        _same(folder, size, manifest.shape.get(size), getattr(c.shape, size))
    for kind, method, part in (("prune", manifest.prune, c.pruner), ("deepen", manifest.deepen, c.deepener)):
        now = _method(kind, part, c.shape)
        _same(folder, kind, method and method.name, now and now.name)
        if method is not None and now is not None:
            free = part.adjustable if isinstance(part, Pruner) else frozenset()
            saved, here = ({k: v for k, v in m.config.items() if k not in free} for m in (method, now))
            _same(folder, f"{kind}.{method.name}", saved, here)
    tensors = _read_weights(folder, manifest)
    own = routed.parts.state_dict()
    of_thought = {name for name in tensors if name.startswith("think.")}
    if routed.parts.think is None:  # a control reasons in another way with the same weights
        tensors = {name: value for name, value in tensors.items() if name not in of_thought}
    elif not of_thought and not list(routed.parts.think.parameters()):  # latents on routers of another trainer
        own = {name: value for name, value in own.items() if not name.startswith("think.")}
    _warn_of_other_steps(folder, manifest, routed)
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or extra:
        raise CheckpointMismatch(
            f"{folder / WEIGHTS}: the attached parts have {_listed(missing) or 'nothing'} that the file lacks, and the "
            f"file has {_listed(extra) or 'nothing'} that they lack; another version of the method saved it"
        )
    for name, value in own.items():
        _same(folder, f"the shape of {name}", list(tensors[name].shape), list(value.shape))
    before = {name: value.clone() for name, value in own.items()}
    routed.parts.load_state_dict(tensors, strict=False)  # whether all is there has been seen
    now = _method("prune", c.pruner, c.shape)
    if now is not None and manifest.prune is not None and now.config == manifest.prune.config:
        try:
            _same_rates(folder, manifest.prune, now.rates or [])
        except CheckpointMismatch:
            routed.parts.load_state_dict(before, strict=False)
            raise


def _warn_of_other_steps(folder: Path, manifest: Manifest, routed: Routed) -> None:
    """Another number of latents than the trained one is an experiment, which nobody should run unaware."""
    if manifest.think is None or routed.think is None:
        return
    trained, now = manifest.think.config.get("num_latents"), routed.think.num_latents
    if trained is not None and routed.parts.think is not None and trained != now:
        log.warning("%s was trained with %d latent steps, this run takes %d", folder, trained, now)


def read_manifest(folder: Path) -> Manifest:
    """`mmroute.json`, checked.

    Raises:
        CheckpointMismatch: it is missing, not JSON, not ours, or of a newer format.
    """
    path = folder / MANIFEST
    if not path.is_file():
        hint = "give a folder that routed.save_pretrained wrote"
        if (folder / "config.json").is_file():
            hint = "it holds a model: pass it as base, with a folder that routed.save_pretrained wrote"
        elif (folder / "rater.json").is_file():
            hint = "it holds a rater of the gate prp: Prp.from_pretrained reads it"
        raise CheckpointMismatch(f"{folder}: {MANIFEST} is missing; {hint}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointMismatch(f"{path}: cannot be read ({error}); save it again") from None
    version = data.get("format") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise CheckpointMismatch(f"{path}: not written by mmroute: no format number in it; this reads format {FORMAT}")
    if version != FORMAT:
        raise CheckpointMismatch(
            f"{path}: format {version}, this version of mmroute ({mmroute.__version__}) reads {FORMAT}; "
            f"install the version that wrote it: {data.get('versions')}"
        )
    try:
        return parse(Manifest, data, str(path))
    except ConfigError as error:
        raise CheckpointMismatch(f"{error}; the file was altered: save it again") from None


def _read_weights(folder: Path, manifest: Manifest) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise CheckpointMismatch(f"{folder}: {WEIGHTS} is missing; copy both files of the folder")
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != manifest.weights:
        raise CheckpointMismatch(
            f"{path}: not the file that {MANIFEST} was saved with (SHA-256 {digest[:12]}, expected "
            f"{manifest.weights[:12]}): cut short, altered or of another save; copy both files again"
        )
    try:
        return read_tensors(data)
    except SafetensorError as error:
        raise CheckpointMismatch(f"{path}: cannot be read ({error}); save it again") from None


def _part(folder: Path, kind: str, method: Method | None, given: Any) -> Any:
    if method is None or given is not None:
        return given  # that it is the one that was saved is checked when the weights are loaded
    if ":" in method.name:
        raise CheckpointMismatch(
            f"{folder}: {kind} is {method.name}, which is neither in mmroute nor an entry point of it; pass "
            f"{kind}={method.name.rpartition(':')[2]}(...) with the options {method.config}"
        )
    try:
        return hub.load(kind, method.name, **method.config)
    except ConfigError as error:
        raise CheckpointMismatch(
            f"{folder}: {kind} {method.name!r} cannot be built as it was saved ({error}); install the versions that "
            "wrote it (see mmroute.json)"
        ) from None


def _base(folder: Path, manifest: Manifest, base: Any) -> Any:
    if base is None:
        base = manifest.base.get("id")
        if base is None:
            raise CheckpointMismatch(f"{folder}: no base model is named in {MANIFEST}; pass base=")
    if not isinstance(base, str | Path):
        return base
    from mmroute.backbones.load import load as load_base

    return load_base(base)


def _same(folder: Path, what: str, saved: Any, here: Any) -> None:
    if saved != here:
        raise CheckpointMismatch(f"{folder}: {what} was {saved} when it was saved, here it is {here}; use the same")


def _same_rates(folder: Path, method: Method, here: list[list[dict[str, float | None]]]) -> None:
    """A method whose code keeps other shares than the saved one did would be another method, silently."""
    for layer, (saved, now) in enumerate(zip(method.rates or [], here, strict=False)):
        for hop in range(max(len(saved), len(now))):
            one, other = saved[min(hop, len(saved) - 1)], now[min(hop, len(now) - 1)]
            for modality, share in one.items():
                a, b = (1.0 if s is None else s for s in (share, other.get(modality)))
                if abs(a - b) > 1e-6:
                    raise CheckpointMismatch(
                        f"{folder}: {method.name} kept {a} of {modality} in layer {layer} at hop {hop} when it was "
                        f"saved, and keeps {b} with mmroute {mmroute.__version__}; install the version that saved it"
                    )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
