"""`mmroute diagnose`: whether latent steps, replay and depth do what they are for."""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from mmroute.cli._model import Device, Dtype, open_model

__all__ = ["app"]

app = typer.Typer(help="Find out what latent steps do.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Find out what latent steps do."""


Task = Annotated[str, typer.Option(help="Name, or name:preset; see `mmroute list tasks`.")]
Thinking = Annotated[str, typer.Option("--recipe", help="Name or .yaml file of a recipe that thinks in latents.")]
Model = Annotated[str, typer.Option(help="Bundled name, checkpoint folder or Hub id.")]
Items = Annotated[int, typer.Option("--n", help="Items.")]
Seed = Annotated[int, typer.Option(help="Which items: another seed, other items.")]
Batch = Annotated[int, typer.Option(help="Items asked at once.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="File to write, JSON; a picture goes beside it.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="path=value for --recipe; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]


@app.command()
def interventions(
    task: Task = "arrows",
    recipe: Thinking = "latent",
    model: Model = "tiny",
    n: Items = 200,
    seed: Seed = 0,
    batch: Batch = 32,
    only: Annotated[list[str] | None, typer.Option(help="One intervention; repeatable. All if not given.")] = None,
    out: Out = None,
    set_: Sets = None,
    json_: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Zero, shuffle, swap and replace latents: if answers do not care, the latents carry nothing."""
    from mmroute import recipe as recipes  # torch costs seconds; --help must not pay them
    from mmroute.bench import items, latents

    plan = items.Plan(task=task, n=n, seed=seed, batch=batch)
    report = latents.intervene(
        open_model(model, device, dtype), recipes.read(recipe, set_), plan, only or latents.CHANGES, _progress
    )
    _finish({**_origin("latents/1", model), **report.to_dict()}, latents.lines(report), out, json_)


@app.command("latents")
def survey(
    task: Task = "arrows",
    recipe: Thinking = "latent",
    model: Model = "tiny",
    n: Items = 200,
    seed: Seed = 0,
    batch: Batch = 32,
    plane: Annotated[str, typer.Option(help="How they are laid out: pca or tsne.")] = "pca",
    out: Out = None,
    set_: Sets = None,
    json_: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Where latents lie, what the model's head reads off them, and whether they have collapsed."""
    from mmroute import recipe as recipes
    from mmroute.bench import items, latent_space

    plan = items.Plan(task=task, n=n, seed=seed, batch=batch)
    collapse, points, near = latent_space.survey(
        open_model(model, device, dtype),
        recipes.read(recipe, set_),
        plan,
        progress=_progress,
        plane=plane,  # type: ignore[arg-type]
    )
    said: dict[int, Counter[str]] = defaultdict(Counter)
    for point in points:
        said[point.step][point.words[0]] += 1
    lines = [
        f"{task}, seed {seed}, {n} items, recipe {recipe}: {len(points)} latents",
        *(f"{name.replace('_', ' ')}: {value}" for name, value in asdict(collapse).items()),
        *(f"cosine to the closest of its {name} tokens: {value}" for name, value in asdict(near).items()),
        *(
            f"step {step}: the head reads {', '.join(f'{w} ({k})' for w, k in words.most_common(6))}"
            for step, words in sorted(said.items())
        ),
    ]
    _draw(out, lambda: latent_space.picture(points, f"{task}, {recipe}: latents by step, {plane}"))
    found = {**_origin("survey/1", model), "task": task, "recipe": recipe, "n": n, "seed": seed, "plane": plane}
    told = {"collapse": asdict(collapse), "near": asdict(near)}
    _finish({**found, **told, "points": [asdict(point) for point in points]}, lines, out, json_)


@app.command()
def gradients(
    task: Task = "arrows",
    recipe: Thinking = "latent",
    model: Model = "tiny",
    n: Items = 48,
    seed: Seed = 0,
    batch: Batch = 16,
    out: Out = None,
    set_: Sets = None,
    json_: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """How strongly the loss pulls at image tokens, words and latents, by layer and stage of the curriculum."""
    from mmroute import recipe as recipes
    from mmroute.bench import gradients, items

    plan = items.Plan(task=task, n=n, seed=seed, batch=batch)
    found = gradients.measure_gradients(open_model(model, device, dtype), recipes.read(recipe, set_), plan, _progress)
    _draw(out, lambda: gradients.picture(found))
    _finish({**_origin("gradients/1", model), **found.to_dict()}, gradients.lines(found), out, json_)


@app.command()
def nuclear(
    task: Task = "arrows",
    recipe: Annotated[str, typer.Option(help="Training recipe (latent, vedas ...), or a YAML file.")] = "latent",
    against: Annotated[str, typer.Option(help="A second one, on the same easy and hard items.")] = "",
    model: Model = "tiny",
    n: Items = 96,
    seed: Seed = 0,
    batch: Batch = 16,
    steps: Annotated[int, typer.Option(help="Updates of each stage.", min=1)] = 20,
    out: Out = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="path=value for both recipes; repeatable.")] = None,
    json_: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Nuclear norms of the attention's gradients and updates while latents are learned, of easy and of hard items."""
    from mmroute.bench import items, nuclear
    from mmroute.train.curriculum import read_recipe

    plan = items.Plan(task=task, n=n, seed=seed, batch=batch)
    recipes = [read_recipe(name, set_) for name in (recipe, against) if name]
    loaded, right, found = open_model(model, device, dtype), None, []
    for each in recipes:
        one, right = nuclear.measure_nuclear(loaded, each, plan, steps, right=right, progress=_progress)
        found.append(one)
    _draw(out, lambda: nuclear.picture(found))
    runs = [one.to_dict() for one in found]
    _finish({**_origin("nuclear/1", model), "runs": runs}, nuclear.lines(found), out, json_)


@app.command()
def router(
    task: Task = "arrows",
    recipe: Annotated[str, typer.Option(help="Name or .yaml file of a recipe with a deepener.")] = "latent-depth",
    model: Model = "tiny",
    n: Items = 100,
    seed: Seed = 0,
    batch: Batch = 32,
    out: Out = None,
    set_: Sets = None,
    json_: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """What depth routers send through a layer again, and whether it is what the question needs."""
    from mmroute import recipe as recipes
    from mmroute.bench import items, router

    plan = items.Plan(task=task, n=n, seed=seed, batch=batch)
    found = router.measure_router(open_model(model, device, dtype), recipes.read(recipe, set_), plan, _progress)
    _draw(out, lambda: router.picture(found))
    _finish({**_origin("router/1", model), **found.to_dict()}, router.lines(found), out, json_)


@app.command()
def crops(
    task: Task = "arrows",
    recipe: Annotated[str, typer.Option(help="Name or .yaml file of a recipe that copies image tokens.")] = "vedas",
    model: Model = "tiny",
    n: Items = 100,
    seed: Seed = 0,
    batch: Batch = 32,
    out: Out = None,
    set_: Sets = None,
    json_: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Where the window of the closer look falls at each latent step, and whether what is needed lies in it."""
    from mmroute import recipe as recipes
    from mmroute.bench import crops, items

    plan = items.Plan(task=task, n=n, seed=seed, batch=batch)
    found, shown = crops.measure_crops(open_model(model, device, dtype), recipes.read(recipe, set_), plan, _progress)
    _draw(out, lambda: crops.picture(shown, f"{task}, {recipe}: what is copied, and the window of the closer look"))
    _finish({**_origin("crops/1", model), **found.to_dict()}, crops.lines(found), out, json_)


def _draw(out: Path | None, made: Callable[[], str]) -> None:
    """The picture beside the file, where one is wanted."""
    from mmroute.bench.schema import write_text

    if out is not None:
        write_text(out.with_suffix(".svg"), made())


def _progress(name: str, done: int, total: int) -> None:
    sys.stderr.write(f"\r{name}: {done}/{total}" + ("\n" if done == total else ""))
    sys.stderr.flush()


def _origin(schema_name: str, model: str) -> dict[str, Any]:
    from mmroute.bench import schema

    return {"schema": schema_name, **schema.origin_here(), "model": model}


def _finish(found: dict[str, Any], lines: list[str], out: Path | None, as_json: bool) -> None:
    """Writes the file, says what a person wants to know, and ends with JSON if asked."""
    from mmroute.bench.schema import write_text

    if out is not None:
        write_text(out, json.dumps(found, indent=1) + "\n")
    for line in lines:
        typer.echo(line, err=as_json)
    if as_json:
        typer.echo(json.dumps(found))
