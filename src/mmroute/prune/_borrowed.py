"""Rates of another method, for controls that must keep as many positions as it does in every layer and hop.

Legend: L layers.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from mmroute.errors import ConfigError
from mmroute.tokens import Modality

__all__ = ["CountsOf", "Rates", "borrow"]

CountsOf = str | dict[str, Any]
"""`@FOLDER` of trained routers, or `name` and options of a pruner."""


class Rates(Protocol):
    """The part of a pruner that says how many positions run, not which."""

    action: Literal["skip", "drop", "kv_only"]

    def acts(self, layer: int, num_layers: int) -> bool: ...

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None: ...


class _Saved:
    """The rates that a folder of trained routers states."""

    def __init__(self, folder: str, action: Any, table: list[list[dict[str, float | None]]]) -> None:
        self.folder, self.action, self._table = folder, action, table

    def acts(self, layer: int, num_layers: int) -> bool:
        if num_layers != len(self._table):
            raise ConfigError(
                f"counts_of: @{self.folder} was trained on {len(self._table)} layers, this model has {num_layers}"
            )
        return any(share is not None for hop in self._table[layer] for share in hop.values())

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        hops = self._table[layer] if self.acts(layer, num_layers) else [{}]
        return hops[min(hop, len(hops) - 1)].get(modality.name.lower())


def borrow(given: CountsOf) -> Rates:
    """The rates that `counts_of` names.

    Raises:
        ConfigError: neither a folder of trained routers behind `@` nor the name and options of a pruner.
    """
    from mmroute import hub

    if isinstance(given, Mapping):
        if "name" not in given:
            raise ConfigError(f"counts_of: no name given; one of {', '.join(hub.names('prune'))}")
        return hub.load("prune", given["name"], **{k: v for k, v in given.items() if k != "name"})
    if not given.startswith("@"):
        raise ConfigError(f"counts_of: give '@FOLDER' of trained routers or {{name: ..., options}}, given {given!r}")
    from mmroute.engine.saving import read_manifest  # it imports the engine, which imports the pruners' contract
    from mmroute.recipe import trained_folder

    saved = read_manifest(trained_folder(given[1:])).prune
    if saved is None or saved.rates is None:
        raise ConfigError(f"counts_of: {given!r} holds no pruner with rates")
    return _Saved(given[1:], hub.find("prune", saved.name)(**saved.config).action, saved.rates)
