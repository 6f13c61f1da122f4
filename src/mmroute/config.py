"""How options are declared, parsed and reported: frozen dataclasses in, one clear error out."""

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from mmroute.errors import ConfigError

__all__ = ["options", "overrides", "parse", "read_yaml", "resolved"]

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def options(cls: type[T]) -> type[T]:
    """Class decorator: a frozen, keyword-only dataclass that rejects unknown keys.

    Footgun: without `extra="forbid"` a TypeAdapter ignores unknown keys of standard dataclasses silently,
    so `vision_kep=0.3` would run with the default.
    """
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def parse(cls: type[T], given: Mapping[str, Any], where: str) -> T:
    """An instance of `cls` from plain values.

    Args:
        cls: a class made with `options`.
        given: option name to value, as read from YAML or keyword arguments.
        where: dotted path that names the place in messages, e.g. `prune.fastv`.

    Raises:
        ConfigError: unknown name, wrong type or value out of range; every fault in one message.
    """
    try:
        return _adapter(cls).validate_python(dict(given))  # type: ignore[arg-type]  # classes are hashable
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, where, cls) for e in error.errors())) from None


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    return TypeAdapter(cls)  # milliseconds, where validating takes microseconds


def _explain(error: Any, where: str, cls: type) -> str:
    path = ".".join([where, *(str(part) for part in error["loc"])])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = ", ".join(f.name for f in dataclasses.fields(cls)) or "none"
        return f"{path}: no such option; known: {known}"
    return f"{path}: {error['msg']} (given {error['input']!r})"


def resolved(config: Any) -> dict[str, Any]:
    """The plain dictionary that stands in results and checkpoints."""
    return dataclasses.asdict(config)


def overrides(assignments: list[str]) -> dict[str, Any]:
    """Nested dictionary from `a.b=value` strings; values are read as YAML.

    Raises:
        ConfigError: an assignment without `=`, or a value that is no YAML.

    Example:
        >>> overrides(["prune.vision_keep=0.3", "n=5"])
        {'prune': {'vision_keep': 0.3}, 'n': 5}
    """
    out: dict[str, Any] = {}
    for text in assignments:
        path, sign, value = text.partition("=")
        if not sign or not path:
            raise ConfigError(f"--set takes path=value, given {text!r}; write e.g. --set prune.vision_keep=0.3")
        at = out
        *parents, leaf = path.split(".")
        for part in parents:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise ConfigError(f"--set {path}: {part!r} has a value already and cannot hold {leaf!r} too")
        try:
            at[leaf] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {path}: {value!r} is not a YAML value; quote it") from None
    return out


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe file as a dictionary.

    Raises:
        ConfigError: not YAML, or not a mapping at the top.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of names to values, given {type(data).__name__}")
    return data
