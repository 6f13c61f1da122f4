"""What a training recipe may say: the model's sizes, the tasks, and the phases that run one after the other."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from mmroute.config import options, parse, read_yaml
from mmroute.errors import ConfigError
from mmroute.train.small_model import Shape

__all__ = ["SHIPPED", "Phase", "Recipe", "as_yaml", "at", "find_recipe", "load_recipe", "merge"]

SHIPPED = Path(__file__).parent.parent / "recipes" / "train"
"""Folder of the recipes that come with the package."""

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Ramp = tuple[tuple[Share, float], ...]
"""Points (share of the phase done, value), straight lines between them."""


@options
class Phase:
    """One stretch of training with one learning-rate schedule."""

    name: str
    steps: Annotated[int, Field(ge=1)]
    batch: Annotated[int, Field(ge=1)] = 32
    muon: Rate = 6e-3
    """Peak rate of Muon, which trains the matrices."""
    adamw: Rate = 1.5e-3
    """Peak rate of AdamW, which trains embeddings, the patch projection, norms and biases."""
    warmup: Annotated[int, Field(ge=1)] = 40
    """Steps over which the rates rise to their peak."""
    floor: Share = 0.05
    """Share of the peak at the end of the cosine."""
    canvas: Ramp = ((0.0, 99),)
    """Largest side of the picture in tiles; the preset's own side is never exceeded."""
    smaller: Annotated[int, Field(ge=3)] | None = None
    """Least side of the smaller pictures that come beside; None: all have the largest side of the moment."""
    size: Ramp = ((0.0, 99),)
    """Largest board; smaller ones keep coming."""
    probe: Ramp = ((0.0, 0.2),)
    """Share of random read-outs of the picture among the items; the rest are written chains."""
    place: Ramp = ((0.0, 0.0),)
    """Weight of a second loss: each vision token names its own coordinate."""
    tasks: dict[str, Annotated[float, Field(ge=0)]] = dataclasses.field(default_factory=dict)
    """Weights of the tasks; those of the recipe that are not named have weight 1."""
    until_probe: Share | None = None
    """The phase ends as soon as held-out read-outs are this accurate on every task."""
    until_chain: Share | None = None
    """The phase ends as soon as this share of held-out chains is exact on every task."""


@options
class Recipe:
    """All that decides the weights, but for the seed."""

    preset: str = "small"
    tasks: list[str]
    model: Shape = Shape()
    start: str | None = None
    """Bundled name or folder of a checkpoint of the same shape, to begin with its weights; fresh ones if not given."""
    place_layer: Annotated[int, Field(ge=1)] = 2
    """Layers after which the second loss reads the vision tokens."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """What the forward pass computes in; weights and optimiser states are fp32."""
    clip: Rate = 1.0
    """Largest norm of the gradient."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    seed: Annotated[int, Field(ge=0)] = 0
    phases: Annotated[list[Phase], Field(min_length=1)]
    save_every: Annotated[int, Field(ge=1)] = 100
    """Steps between checkpoints."""
    eval_every: Annotated[int, Field(ge=1)] = 200
    """Steps between looks at held-out items."""
    eval_items: Annotated[int, Field(ge=1)] = 48
    """Held-out items per task at each look."""
    exam_items: Annotated[int, Field(ge=1)] = 500
    """Items of the split test per task at the end."""
    exam_blank: Annotated[int, Field(ge=1)] = 200
    """Of these, how many are asked again with the picture blanked."""


def at(ramp: Ramp, done: float) -> float:
    """The ramp's value when the share `done` of the phase is over.

    Example:
        >>> at([(0.0, 4), (0.5, 10)], 0.25), at([(0.0, 4), (0.5, 10)], 1.0)
        (7.0, 10.0)
    """
    before = ramp[0]
    for point in ramp:
        if point[0] > done:
            share = (done - before[0]) / (point[0] - before[0]) if point[0] > before[0] else 1.0
            return float(before[1] + (point[1] - before[1]) * max(share, 0.0))
        before = point
    return float(before[1])


def find_recipe(name: str, shipped: Path = SHIPPED) -> Path:
    """The file of a shipped recipe, or of a path.

    Args:
        name: without its ending, or a path.
        shipped: folder of the trainer's own recipes.

    Raises:
        ConfigError: neither a shipped name nor a file.
    """
    for path in (shipped / f"{name}.yaml", Path(name)):
        if path.is_file():
            return path
    known = ", ".join(sorted(p.stem for p in shipped.glob("*.yaml")))
    raise ConfigError(f"no training recipe {name!r}; one of {known}, or the path of a YAML file")


def load_recipe(name: str, changes: dict[str, Any]) -> Recipe:
    """A recipe by name or path, with `--set` changes laid over it.

    Raises:
        ConfigError: no such recipe, or a value that the recipe does not allow.
    """
    recipe = parse(Recipe, merge(read_yaml(find_recipe(name)), changes), "recipe")
    for phase in recipe.phases:
        unknown = sorted(set(phase.tasks) - set(recipe.tasks))
        if unknown:
            raise ConfigError(f"phase {phase.name}: weights for {', '.join(unknown)}; tasks are {recipe.tasks}")
    return recipe


def merge(base: Any, changes: Any) -> Any:
    """`base` with `changes` laid over it; lists are addressed by index (`phases.0.steps`)."""
    if isinstance(base, dict) and isinstance(changes, dict):
        return {**base, **{k: merge(base.get(k), v) for k, v in changes.items()}}
    if isinstance(base, list) and isinstance(changes, dict):
        out = list(base)
        for key, value in changes.items():
            if not str(key).isdigit() or int(key) >= len(out):
                raise ConfigError(f"--set: {key!r} is no index of a list of {len(out)}; write e.g. phases.0.steps=10")
            out[int(key)] = merge(out[int(key)], value)
        return out
    return changes


def as_yaml(data: dict[str, Any]) -> str:
    """A plain dictionary as the text of a recipe file."""
    return yaml.safe_dump(data, sort_keys=False)
