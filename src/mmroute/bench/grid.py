"""A bench recipe: methods x budgets x tasks x seeds, resolved into single runs before any of them starts.

A budget is the mean share of vision positions that run a layer; what a method calls it, its `plan` says. Each method
that chooses gets a control: random positions at the same counts in every layer, hop and modality. Two methods with the
same counts share it.

Legend: L layers.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mmroute import hub
from mmroute import recipe as recipes
from mmroute.bench import schema
from mmroute.config import options, overrides, parse, read_yaml, resolved
from mmroute.errors import BudgetError, ConfigError, MmrouteError
from mmroute.prune._budget import constant
from mmroute.recipe import Recipe
from mmroute.tokens import Modality
from mmroute.trace import Shape

__all__ = ["Case", "Grid", "Method", "cases", "key_of", "path_of", "read"]

_SHIPPED = Path(__file__).parent.parent / "recipes" / "bench"
_Share = Annotated[float, Field(gt=0, le=1)]
_HOPS = 33


@options
class Method:
    """One method of a bench."""

    recipe: str = ""
    """Recipe by name or path; the method's own name unless given."""
    router: str = ""
    """Folder of trained routers, instead of what the recipe names."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Changes to the recipe, as `path: value`."""
    budget: Literal["plan", "own", ""] = ""
    """`own` runs it once, as it was trained; empty is what the bench says."""


@options
class Grid:
    """A bench recipe, resolved."""

    name: str
    model: str = "tiny"
    tasks: Annotated[list[str], Field(min_length=1)]
    """`name` or `name:preset`."""
    task: dict[str, Any] = Field(default_factory=dict)
    """Options of all tasks, such as `hop_images: observed`."""
    context: str = "accumulate"
    split: str = "test"
    n: Annotated[int, Field(ge=1)] = 1000
    """Items per task and seed."""
    min_hops: Annotated[int, Field(ge=0)] = 0
    """Items whose chain has fewer hops are passed over."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = Field(default_factory=lambda: [0])
    """Which items: another seed, other items; a table pools them."""
    vision: list[_Share] = Field(default_factory=lambda: [0.4])
    """Budgets: mean share of vision positions that run a layer."""
    text: list[_Share] = Field(default_factory=lambda: [1.0])
    """The same for text; below 1 only for methods that leave text out."""
    vision_share: _Share = 0.7
    """Share of vision among a prompt's positions: what one rate for both is worth, for `symmetric`."""
    budget: Literal["plan", "own"] = "plan"
    """Whether methods are run at these budgets, or each as it is."""
    controls: bool = True
    """Whether each method that chooses is run again with random positions at its counts."""
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    batch: Annotated[int, Field(ge=1)] = 64
    """Conversations answered at once; changes no answer."""
    forced: bool = False
    """Also ask for the answer behind the right chain, at about the same cost again."""
    device: Literal["cpu", "cuda"] = "cpu"
    """On CUDA each process takes a card, in turn."""
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""
    """The checkpoint's own if empty."""


@dataclass(frozen=True)
class Case:
    """A method at a budget."""

    row: str
    recipe: Recipe
    budget: schema.Budget
    control: "Case | None" = None
    """Random positions at its counts; None for what chooses nothing or is random."""
    infeasible: str = ""
    """Why the budget cannot be met, where it cannot."""

    @property
    def label(self) -> str:
        """Name and budget, as files are called."""
        if self.budget.vision == self.budget.text == 1:
            return self.row
        return f"{self.row}-v{round(100 * self.budget.vision):02d}-t{round(100 * self.budget.text):02d}"


def path_of(name: str) -> Path:
    """The file of a bench recipe, by its shipped name or its path.

    Raises:
        ConfigError: there is none.
    """
    shipped = {path.stem: path for path in sorted(_SHIPPED.glob("*.yaml"))}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ConfigError(f"no bench recipe {name!r}; one of {', '.join(shipped)}, or the path of a YAML file")
    return path


def read(name: str, sets: Sequence[str] = (), methods: Sequence[str] = ()) -> Grid:
    """A bench recipe by its shipped name or the path of a YAML file.

    Args:
        name: shipped name, or path.
        sets: changes as `path=value`.
        methods: the methods that are run, of those the recipe names.

    Raises:
        ConfigError: no such recipe or method, or one that does not parse.
    """
    path = path_of(name)
    data = {"name": path.stem, **read_yaml(path)}
    for key, value in overrides(list(sets)).items():
        before = data.get(key)
        data[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    grid = parse(Grid, data, f"bench {path.stem}")
    unknown = sorted(set(methods) - set(grid.methods))
    if unknown:
        raise ConfigError(f"bench {grid.name} has no method {', '.join(unknown)}; it has {', '.join(grid.methods)}")
    return replace(grid, methods={m: o for m, o in grid.methods.items() if not methods or m in methods})


def cases(grid: Grid, shape: Shape) -> list[Case]:
    """Every method at every budget, `none` first, for a model of this shape.

    Raises:
        ConfigError: a recipe does not parse, or a folder of trained routers is not there.
    """
    found = [case for name, method in grid.methods.items() for case in _of_method(grid, name, method, shape)]
    found.sort(key=lambda case: case.recipe.prune is not None)
    shared: dict[str, Case] = {_counts(c.recipe, shape): c for c in found if _is_random(c.recipe) and not c.infeasible}
    out = []
    for case in found:
        if not grid.controls or case.recipe.prune is None or case.infeasible or _is_random(case.recipe):
            out.append(case)
            continue
        control = _control(case)
        counts = _counts(control.recipe, shape)
        out.append(replace(case, control=shared.setdefault(counts, control)))
    return out


def _of_method(grid: Grid, name: str, method: Method, shape: Shape) -> Iterator[Case]:
    sets = [f"{path}={json.dumps(value)}" for path, value in method.set.items()]
    if method.router:
        sets.append(f"trained={json.dumps(method.router)}")
    recipe = replace(recipes.read(method.recipe or name, sets), name=name)
    if recipe.trained is not None:
        try:
            recipes.trained_folder(recipe.trained)
        except ConfigError as error:
            raise ConfigError(f"method {name}: {error}; or leave it out with --methods") from None
    if recipe.prune is None or recipe.prune["name"] == "none":
        yield Case(name, recipe, schema.Budget(unit="v_eff_share", vision=1.0, text=1.0))
        return
    if (method.budget or grid.budget) == "own":
        yield _own(name, recipe, shape)
        return
    for text in grid.text:
        for vision in grid.vision:
            if text == 1 or _routes_text(recipe):
                yield _at_budget(name, recipe, vision, text, grid.vision_share, shape)


def _own(name: str, recipe: Recipe, shape: Shape) -> Case:
    pruner = recipe.build("prune")
    pruner.fit(shape)
    shares = {}
    for modality in (Modality.VISION, Modality.TEXT):
        asked = getattr(pruner.config, f"{modality.name.lower()}_keep", None)
        rates = [pruner.rate(i, shape.layers, 0, modality) if pruner.acts(i, shape.layers) else None
                 for i in range(shape.layers)]  # fmt: skip
        shares[modality] = sum(1.0 if r is None else r for r in rates) / shape.layers if asked is None else asked
    return Case(name, recipe, _budget(recipe, shares[Modality.VISION], shares[Modality.TEXT]))


def _at_budget(name: str, recipe: Recipe, vision: float, text: float, vision_share: float, shape: Shape) -> Case:
    assert recipe.prune is not None
    budget = _budget(recipe, vision, text)
    try:
        planned = replace(recipe, prune=_planned(recipe.prune, vision, text, vision_share, shape.layers))
        planned.build("prune").fit(shape)  # what a mean over these layers cannot be is said when rates are made
    except BudgetError as error:
        return Case(name, recipe, budget, infeasible=str(error))
    return Case(name, planned, budget)


def _planned(prune: dict[str, Any], vision: float, text: float, vision_share: float, layers: int) -> dict[str, Any]:
    """The pruner's options at a budget."""
    cls: Any = hub.find("prune", prune["name"])
    names = {f.name for f in fields(cls.Config)}
    if "keep" in names:  # one rate for both modalities
        vision = vision_share * vision + (1 - vision_share) * text
    out = dict(prune)
    if hasattr(cls, "plan"):
        known = {key: prune[key] for key in signature(cls.plan).parameters if key in prune}
        out |= cls.plan(vision, layers, **known)
    else:
        out["vision_keep"] = vision
    if "text_keep" in names:
        out["text_keep"] = text
        if out.get("rates") == "fixed" and text < 1:  # a flat schedule leaves the first layers out of its mean
            first = cls(**{k: v for k, v in out.items() if k != "name"}).config.first_layer
            out["text_schedule"] = [1.0] * first + [constant(text, layers, first)] * (layers - first)
    elif "text" in names:  # a list by layer; a row of attention needs a layer before it
        first = 1.0 if out.get("scorer", "row") == "row" else text
        rest = text if first == text else (text * layers - 1) / max(layers - 1, 1)
        out["text"] = (first, *[max(rest, 0.0)] * (layers - 1))
    return out


def _routes_text(recipe: Recipe) -> bool:
    assert recipe.prune is not None
    cls: Any = hub.find("prune", recipe.prune["name"])
    return bool({f.name for f in fields(cls.Config)} & {"text_keep", "text", "keep"})


def _budget(recipe: Recipe, vision: float, text: float) -> schema.Budget:
    forgets = recipe.build("prune").action == "kv_only"
    return schema.Budget(unit="kv_share" if forgets else "v_eff_share", vision=vision, text=text)


# ---------------------------------------------------------------------- controls


def _is_random(recipe: Recipe) -> bool:
    return recipe.prune is not None and (recipe.prune["name"] == "random" or recipe.prune.get("scorer") == "random")


def _control(case: Case) -> Case:
    """Random positions at the case's own counts; a trained method keeps its backbone and its hop closes."""
    prune = copy.deepcopy(case.recipe.prune)
    assert prune is not None
    scorers = {f.name: f.type for f in fields(hub.find("prune", prune["name"]).Config)}  # type: ignore[attr-defined]
    trained = case.recipe.trained
    if "scorer" in scorers:
        options_: dict[str, Any] = {**prune, "scorer": "random"}
    elif trained is not None:
        options_, trained = {"name": "random", "counts_of": f"@{trained}"}, None
    else:
        options_ = {"name": "random", "counts_of": prune}
    name = f"random@{case.row}"
    recipe = replace(case.recipe, name=name, prune=options_, trained=trained)
    return Case(name, recipe, case.budget)


def _counts(recipe: Recipe, shape: Shape) -> str:
    """What decides how many run: two random recipes that agree in it keep the same positions."""
    pruner = recipe.build("prune")
    pruner.fit(shape)
    if recipe.trained is not None or (recipe.prune is not None and recipe.prune["name"] == "dare"):
        return json.dumps(_identity(recipe), sort_keys=True, default=str)
    table = [
        [pruner.rate(i, shape.layers, hop, m) if pruner.acts(i, shape.layers) else None for m in Modality]
        for i in range(shape.layers)
        for hop in (0, 1, _HOPS)
    ]
    whole = [[1.0 if rate is None else round(rate, 9) for rate in row] for row in table]
    return json.dumps([pruner.action, recipe.prefix_tokens, recipe.think, recipe.deepen, whole])


# ---------------------------------------------------------------------- identity


def _identity(recipe: Recipe) -> dict[str, Any]:
    """Everything that decides what a recipe does; trained parts by their weights."""
    parts = {kind: recipe.build(kind) for kind in ("prune", "deepen", "think")}
    found: dict[str, Any] = {
        kind: {"name": (getattr(recipe, kind) or {}).get("name"), **resolved(part.config)}
        for kind, part in parts.items()
        if part is not None
    }
    found["prefix_tokens"] = recipe.prefix_tokens
    if recipe.trained is not None:
        folder = recipes.trained_folder(recipe.trained)
        found["trained"] = {file.name: _sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    return found


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise MmrouteError(f"{path}: cannot be read ({error})") from None


def key_of(recipe: Recipe, about: Mapping[str, Any]) -> str:
    """Eight hex digits that name a run: another setting, model, task or item, another name."""
    text = json.dumps({**_identity(recipe), **about}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
