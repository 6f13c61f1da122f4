"""The folders are the registry: `prune/fastv.py` is the pruner `fastv` everywhere.

A folder's methods are its files except `base` and those with a leading underscore; each exports one class in `__all__`.
Outsiders add methods by the entry point groups `mmroute.prune`, `mmroute.deepen`, `mmroute.think`, `mmroute.gate`,
`mmroute.tasks`.
"""

import difflib
import importlib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from mmroute.errors import ConfigError

__all__ = ["KINDS", "find", "load", "names"]

KINDS = ("prune", "deepen", "think", "gate", "tasks")
_ROOT = Path(__file__).parent
_NOUN = {"prune": "pruner", "deepen": "deepener", "think": "way to think", "gate": "gate", "tasks": "task"}


def names(kind: str) -> list[str]:
    """Names of all methods of one folder, ours and those of entry points, sorted."""
    return sorted({*_files(kind), *_outsiders(kind)})


def find(kind: str, name: str) -> type:
    """The class behind a name; imports that one file only.

    Raises:
        ConfigError: no such name (with the nearest one), or an outsider clashes with ours.
    """
    outsiders = _outsiders(kind)
    if name in _files(kind):
        if name in outsiders:
            raise ConfigError(f"entry point mmroute.{kind}: {name!r} is the name of a built-in file; rename it")
        module = importlib.import_module(f"mmroute.{kind}.{name}")
        (public,) = module.__all__
        return getattr(module, public)
    if name in outsiders:
        return outsiders[name].load()
    known = names(kind)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"no {_NOUN[kind]} named {name!r}; one of {', '.join(known)}{hint}")


def load(kind: str, name: str, **options: Any) -> Any:
    """An instance of the method, its options parsed: `load("prune", "fastv", vision_keep=0.3)`."""
    return find(kind, name)(**options)


def _files(kind: str) -> list[str]:
    if kind not in KINDS:
        raise ConfigError(f"no kind of method named {kind!r}; one of {', '.join(KINDS)}")
    return [p.stem for p in (_ROOT / kind).glob("*.py") if p.stem != "base" and not p.stem.startswith("_")]


def _outsiders(kind: str) -> dict[str, Any]:
    return {e.name: e for e in entry_points(group=f"mmroute.{kind}")}
