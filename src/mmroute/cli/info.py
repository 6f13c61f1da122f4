"""`mmroute list`, `mmroute env`, `mmroute check`: what is there, what it runs on, whether a file keeps its contract."""

import dataclasses
import importlib
import importlib.util
import json
import platform
import re
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any

import typer

from mmroute import config, hub, recipe
from mmroute.errors import ConfigError, InputError
from mmroute.trace import Trace

__all__ = ["check", "env", "list_methods"]

_CORE = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "numpy",
    "pillow",
    "pydantic",
    "typer",
)

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]


def list_methods(
    kind: Annotated[str, typer.Argument(help="prune, deepen, think, gate, tasks, backbones or recipes.")],
    as_json: AsJson = False,
) -> None:
    """What there is of a kind, with its source and options."""
    rows = _rows(kind)
    if as_json:
        typer.echo(json.dumps({kind: rows}))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        typer.echo(f"{row['name']:<{width}}  {row['summary']}")
        for option in row.get("options", []):
            default = "required" if option["default"] is None else f"= {option['default']}"
            typer.echo(f"{'':<{width}}    {option['name']} {default}  {option['doc']}")


def _rows(kind: str) -> list[dict[str, Any]]:
    if kind == "recipes":
        return [{"name": name, "summary": _first_comment(path)} for name, path in hub.recipes().items()]
    if kind == "backbones":
        folder = Path(hub.__file__).parent / "backbones"
        files = [p for p in sorted(folder.glob("*.py")) if p.stem != "base" and not p.stem.startswith("_")]
        return [dataclasses.asdict(hub.describe_file(path, path.stem)) for path in files]
    if kind not in hub.KINDS:
        raise ConfigError(f"nothing to list under {kind!r}; one of {', '.join(hub.KINDS)}, backbones, recipes")
    return [dataclasses.asdict(hub.describe(kind, name)) for name in hub.names(kind)]


def _first_comment(path: Path) -> str:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    return " ".join(lines)


def env(as_json: AsJson = False) -> None:
    """Versions, extras, device and threads: what to paste into a bug report."""
    facts = _facts()
    if as_json:
        typer.echo(json.dumps(facts))
        return
    for name, value in facts.items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            typer.echo(f"{f'{name} {key}'.strip():<28} {inner}")


def _facts() -> dict[str, Any]:
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return {
        "mmroute": version("mmroute"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "package": {name: _installed(name) for name in _CORE},
        "torchvision": _torchvision(),
        "extra": _extras(),
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _torchvision() -> str:
    """A torchvision that does not fit torch is worse than none: processors of Transformers cannot be imported then."""
    installed = _installed("torchvision")
    if installed == "missing":
        return "not installed (fine: images are read with Pillow)"
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"{installed} does NOT fit torch {_installed('torch')} ({reason}); pip uninstall torchvision"
    return installed


def _extras() -> dict[str, str]:
    """Per extra: ok, or what is missing of it."""
    members: dict[str, list[str]] = {}
    for requirement in requires("mmroute") or []:
        found = re.match(r"([A-Za-z0-9_.-]+).*extra == ['\"](\w+)['\"]", requirement)
        if found and found[1] != "mmroute":
            members.setdefault(found[2], []).append(found[1])
    out = {}
    for extra, packages in sorted(members.items()):
        missing = [name for name in packages if _installed(name) == "missing"]
        out[extra] = f'missing {", ".join(missing)}; pip install "mmroute[{extra}]"' if missing else "ok"
    return out


def check(
    file: Annotated[Path, typer.Argument(help="A method's .py, a recipe's .yaml or a trace's .json.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="Option of the method, name=value.")] = None,
) -> None:
    """Whether a file keeps its contract; says the first thing that is broken."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; give a .py, .yaml or .json")
    match file.suffix:
        case ".py":
            _check_method(file, config.overrides(settings or []))
        case ".yaml" | ".yml":
            recipe.read(str(file))
        case ".json":
            Trace.load(file)
        case other:
            raise ConfigError(f"{file}: cannot check {other or 'a file without ending'}; give a .py, .yaml or .json")
    typer.echo(f"{file}: ok")


def _check_method(file: Path, options: dict[str, Any]) -> None:
    from mmroute.checks import check_pruner
    from mmroute.prune.base import Pruner

    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    public = getattr(module, "__all__", [])
    if len(public) != 1:
        raise InputError(f"{file}: __all__ names {len(public)} objects; a method's file exports exactly one class")
    method = getattr(module, public[0], None)
    if not (isinstance(method, type) and issubclass(method, Pruner)):
        raise InputError(f"{file}: {public[0]} is not a Pruner; subclass mmroute.prune.base.Pruner")
    try:
        check_pruner(method(**options))
    except AssertionError as broken:
        raise InputError(f"{file}: {broken}") from None
