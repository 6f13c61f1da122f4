"""`mmroute diagnose`: whether latent steps do what they are for."""

import json
import shlex
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

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
) -> None:
    """Zero, shuffle, swap and replace latents: if answers do not care, the latents carry nothing."""
    from mmroute import recipe as recipes  # torch costs seconds; --help must not pay them
    from mmroute.bench import items, latents

    plan = items.Plan(task=task, n=n, seed=seed, batch=batch)
    report = latents.intervene(model, recipes.read(recipe, set_), plan, only or latents.CHANGES, _progress)
    _finish({**_origin("latents/1", model), **report.to_dict()}, latents.lines(report), out, json_)


@app.command("latents")
def survey(
    task: Task = "arrows",
    recipe: Thinking = "latent",
    model: Model = "tiny",
    n: Items = 200,
    seed: Seed = 0,
    batch: Batch = 32,
    out: Out = None,
    set_: Sets = None,
    json_: AsJson = False,
) -> None:
    """Where latents lie, what the model's head reads off them, and whether they have collapsed."""
    from mmroute import recipe as recipes
    from mmroute.bench import items, latents
    from mmroute.train.loop import replacing

    plan = items.Plan(task=task, n=n, seed=seed, batch=batch)
    collapse, points = latents.survey(model, recipes.read(recipe, set_), plan, progress=_progress)
    said: dict[int, Counter[str]] = defaultdict(Counter)
    for point in points:
        said[point.step][point.words[0]] += 1
    lines = [
        f"{task}, seed {seed}, {n} items, recipe {recipe}: {len(points)} latents",
        *(f"{name.replace('_', ' ')}: {value}" for name, value in asdict(collapse).items()),
        *(
            f"step {step}: the head reads {', '.join(f'{w} ({k})' for w, k in words.most_common(6))}"
            for step, words in sorted(said.items())
        ),
    ]
    if out is not None:
        with replacing(out.with_suffix(".svg")) as beside:
            beside.write_text(latents.picture(points, f"{task}, {recipe}: latents by step, two principal components"))
    found = {**_origin("survey/1", model), "task": task, "recipe": recipe, "n": n, "seed": seed}
    _finish({**found, "collapse": asdict(collapse), "points": [asdict(point) for point in points]}, lines, out, json_)


def _progress(name: str, done: int, total: int) -> None:
    sys.stderr.write(f"\r{name}: {done}/{total}" + ("\n" if done == total else ""))
    sys.stderr.flush()


def _origin(schema_name: str, model: str) -> dict[str, Any]:
    from mmroute.bench import schema

    commit, dirty = schema.commit_of_source()
    command = shlex.join(["mmroute", *sys.argv[1:]])
    return {"schema": schema_name, "command": command, "commit": commit, "dirty": dirty, "model": model}


def _finish(found: dict[str, Any], lines: list[str], out: Path | None, as_json: bool) -> None:
    """Writes the file, says what a person wants to know, and ends with JSON if asked."""
    from mmroute.train.loop import replacing

    if out is not None:
        with replacing(out) as beside:
            beside.write_text(json.dumps(found, indent=1) + "\n")
    for line in lines:
        typer.echo(line, err=as_json)
    if as_json:
        typer.echo(json.dumps(found))
