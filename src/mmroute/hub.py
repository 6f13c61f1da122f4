"""The folders are the registry: `prune/fastv.py` is the pruner `fastv` everywhere.

A folder's methods are its files except `base` and those with a leading underscore; each exports one class in `__all__`.
Public benchmarks are tasks too and have a folder of their own, `tasks/hub`.
Outsiders add methods by the entry point groups `mmroute.prune`, `mmroute.deepen`, `mmroute.think`, `mmroute.gate`,
`mmroute.tasks`.
"""

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from mmroute.errors import ConfigError

__all__ = [
    "KINDS",
    "Description",
    "Option",
    "by_class",
    "describe",
    "describe_file",
    "find",
    "load",
    "name_of",
    "names",
    "recipes",
]

KINDS = ("prune", "deepen", "think", "gate", "tasks")
_ROOT = Path(__file__).parent
_FOLDERS = {"tasks": ("tasks", "tasks/hub")}
"""Where the files of a kind lie, if not in the folder of its name alone."""
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
        module = importlib.import_module(_module(kind, name))
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


def by_class(kind: str, name: str) -> type:
    """The method whose class has this name: `mmroute.prune.FastV` is the class in `prune/fastv.py`.

    Raises:
        AttributeError: no file of the folder exports it.
    """
    if name in _by_class(kind):
        return find(kind, _by_class(kind)[name])
    raise AttributeError(f"no method in mmroute.{kind} has the class {name!r}; files: {', '.join(_files(kind))}")


@cache
def _by_class(kind: str) -> dict[str, str]:
    """File by the name of each class in it."""
    trees = {file: ast.parse(path.read_text(encoding="utf-8")) for file, path in _files(kind).items()}
    return {node.name: file for file, tree in trees.items() for node in tree.body if isinstance(node, ast.ClassDef)}


def name_of(kind: str, cls: type) -> str | None:
    """The name by which `find` gives this class; None for a class the registry does not know."""
    file = cls.__module__.rpartition(".")[2]
    if file in _files(kind) and cls.__module__ == _module(kind, file):
        return file
    return next((name for name, point in _outsiders(kind).items() if point.load() is cls), None)


@cache
def _files(kind: str) -> dict[str, Path]:
    if kind not in KINDS:
        raise ConfigError(f"no kind of method named {kind!r}; one of {', '.join(KINDS)}")
    paths = (path for folder in _FOLDERS.get(kind, (kind,)) for path in (_ROOT / folder).glob("*.py"))
    return {p.stem: p for p in paths if p.stem != "base" and not p.stem.startswith("_")}


def _module(kind: str, name: str) -> str:
    return ".".join(["mmroute", *_files(kind)[name].relative_to(_ROOT).with_suffix("").parts])


def _outsiders(kind: str) -> dict[str, Any]:
    return _named(entry_points, f"mmroute.{kind}")


@cache
def _named(read: Callable[..., Any], group: str) -> dict[str, Any]:
    """Entry points by name, read once a process: every installed package is looked into."""
    return {e.name: e for e in read(group=group)}


@dataclass(frozen=True)
class Option:
    """One option of a method, as its source says it."""

    name: str
    type: str
    default: str | None
    """Python text; None where the option must be given."""
    doc: str


@dataclass(frozen=True)
class Description:
    """What a method says about itself, read without running it."""

    name: str
    summary: str
    """First paragraph of the module docstring."""
    source: str
    deviates: str
    checked: str
    options: list[Option]


def describe(kind: str, name: str) -> Description:
    """What the file of a method says about itself; parsed, never imported, so it costs no torch.

    Raises:
        ConfigError: no such method, or its file cannot be found or parsed.
    """
    if name not in names(kind):
        find(kind, name)  # raises, with the nearest name
    return describe_file(_source_file(kind, name), name)


def describe_file(path: Path, name: str) -> Description:
    """`describe` for a file anywhere, or for one that is no method (a backbone)."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ConfigError(f"{path}: not Python: {error}") from None
    doc = ast.get_docstring(tree) or ""
    said = _sections(doc)
    summary = " ".join(doc.partition("\n\n")[0].split())
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == "Config"]
    options = [option for config in classes[:1] for option in _options(config)]
    return Description(name, summary, said["Source"], said["Deviates"], said["Checked"], options)


def recipes() -> dict[str, Path]:
    """Name to file of the recipes that come with the package, sorted."""
    return {path.stem: path for path in sorted((_ROOT / "recipes").glob("*.yaml"))}


def _source_file(kind: str, name: str) -> Path:
    if name in _files(kind):
        return _files(kind)[name]
    spec = importlib.util.find_spec(_outsiders(kind)[name].module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"entry point mmroute.{kind}: the file of {name!r} is not found; reinstall its package")
    return Path(spec.origin)


def _sections(doc: str) -> dict[str, str]:
    """`Source:`, `Deviates:`, `Checked:` of a module docstring; a section runs until the next one or a blank line."""
    said = dict.fromkeys(("Source", "Deviates", "Checked"), "")
    section = ""
    for line in doc.splitlines():
        head, colon, rest = line.partition(":")
        if colon and head in said:
            section, line = head, rest
        elif not line.strip() or not line.startswith(" "):
            section = ""
        if section:
            said[section] = f"{said[section]} {line.strip()}".strip()
    return said


def _options(config: ast.ClassDef) -> list[Option]:
    out = []
    for node, after in zip(config.body, [*config.body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        doc = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            doc = " ".join(after.value.value.split())
        default = None if node.value is None else ast.unparse(node.value)
        out.append(Option(node.target.id, ast.unparse(node.annotation), default, doc))
    return out
