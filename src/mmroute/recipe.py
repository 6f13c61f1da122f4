"""A recipe: how one run routes and thinks. A YAML delta on "the stock model, written chain of thought".

prune: {name: fastv, vision_keep: 0.5}
think: {name: direct}
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from mmroute import hub
from mmroute.config import options, overrides, parse, read_yaml
from mmroute.errors import ConfigError

__all__ = ["Recipe", "equip", "read"]


@options
class Recipe:
    """Resolved settings of one run."""

    name: str = "none"
    prune: dict[str, Any] | None = None
    """`name` and options of the pruner; None runs every token in every layer."""
    deepen: dict[str, Any] | None = None
    """`name` and options of the deepener; None is the stock depth."""
    think: dict[str, Any] | None = None
    """`name` and options of the way to think; written text unless named."""
    gate: dict[str, Any] | None = None
    """A draft, a target, what they are asked and who answers; see `train.prp.GateConfig`."""
    prefix_tokens: int = 2
    """Positions at the start of each hop that are never pruned."""
    trained: str | None = None
    """Folder, or bundled name, of what `mmroute train` wrote: routers, and the backbone's new weights."""
    train: dict[str, Any] | None = None
    """Options of the trainer that made it; read by `mmroute train` alone."""

    def build(self, kind: str) -> Any:
        """The method of one folder, or None."""
        given: Mapping[str, Any] | None = getattr(self, kind)
        if kind == "think":
            given = {"name": "text", **(given or {})}
        if given is None:
            return None
        if "name" not in given:
            raise ConfigError(f"{kind}: no name given; one of {', '.join(hub.names(kind))}")
        rest = {k: v for k, v in given.items() if k != "name"}
        return hub.load(kind, given["name"], **rest)


def read(name: str, sets: list[str] | None = None) -> Recipe:
    """A recipe by its shipped name or the path of a YAML file, with `--set` changes laid over it.

    Raises:
        ConfigError: no such recipe, or one that does not parse.
    """
    shipped = hub.recipes()
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ConfigError(f"no recipe {name!r}; one of {', '.join(shipped)}, or the path of a YAML file")
    data = read_yaml(path)
    for key, value in overrides(sets or []).items():
        before = data.get(key)
        data[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    recipe = parse(Recipe, {"name": path.stem, **data}, f"recipe {path.stem}")
    for kind in ("prune", "deepen", "think"):
        recipe.build(kind)  # a wrong option is reported before a model is loaded
    return recipe


@contextmanager
def equip(model: Any, recipe: Recipe) -> Iterator[Any]:
    """A model attached as the recipe says, detached when the block ends.

    Args:
        model: a loaded model, a folder, a hub id or the name of a bundled one.

    Yields:
        The `Routed` handle and the way to think.
    """
    from mmroute.backbones.load import load
    from mmroute.engine import saving
    from mmroute.engine.attach import attach
    from mmroute.train.delta import tuned

    loaded = load(model) if isinstance(model, str | Path) else model
    parts = {kind: recipe.build(kind) for kind in ("prune", "deepen", "think")}
    folder = None if recipe.trained is None else trained_folder(recipe.trained)
    with (
        nullcontext() if folder is None else tuned(loaded, folder),
        attach(loaded, prefix_tokens=recipe.prefix_tokens, **parts) as routed,
    ):
        if folder is not None:
            saving.load(routed, folder)
            loaded.eval()
        yield routed, parts["think"]


def trained_folder(name: str) -> Path:
    """The folder of trained routers by bundled name or path.

    Raises:
        ConfigError: there is none.
    """
    bundled = Path(__file__).parent / "assets" / name
    path = bundled if (bundled / "mmroute.json").is_file() else Path(name)
    if not (path / "mmroute.json").is_file():
        raise ConfigError(
            f"trained: no routers in {name!r}; train them with `mmroute train dare --recipe ... --out RUN` and add "
            "--set trained=RUN/router, or latents with `mmroute train vedas` and --set trained=RUN/latent"
        )
    return path
