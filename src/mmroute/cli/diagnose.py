"""`mmroute diagnose`: whether latent steps do what they are for."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Find out what latent steps do.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Find out what latent steps do."""


@app.command()
def interventions(
    task: Annotated[str, typer.Option(help="Name, or name:preset; see `mmroute list tasks`.")] = "arrows",
    recipe: Annotated[str, typer.Option(help="Name or .yaml file of a recipe that thinks in latents.")] = "latent",
    model: Annotated[str, typer.Option(help="Bundled name, checkpoint folder or Hub id.")] = "tiny",
    n: Annotated[int, typer.Option(help="Items.")] = 200,
    seed: Annotated[int, typer.Option(help="Which items: another seed, other items.")] = 0,
    batch: Annotated[int, typer.Option(help="Items asked at once.")] = 32,
    only: Annotated[list[str] | None, typer.Option(help="One intervention; repeatable. All if not given.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write, JSON.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="path=value for --recipe; repeatable.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Zero, shuffle, swap and replace latents: if answers do not care, the latents carry nothing."""
    from mmroute import recipe as recipes  # torch costs seconds; --help must not pay them
    from mmroute.bench import latents, run, schema
    from mmroute.train.loop import replacing

    settings = recipes.read(recipe, set_)
    plan = items.Plan(task=task, n=n, seed=seed, batch=batch)

    def progress(name: str, done: int, total: int) -> None:
        sys.stderr.write(f"\r{name}: {done}/{total}" + ("\n" if done == total else ""))
        sys.stderr.flush()

    report = latents.intervene(model, settings, plan, only or latents.CHANGES, progress)
    commit, dirty = schema.commit_of_source()
    found = {
        "schema": "latents/1",
        "command": shlex.join(["mmroute", *sys.argv[1:]]),
        "commit": commit,
        "dirty": dirty,
        "model": model,
        **report.to_dict(),
    }
    if out is not None:
        with replacing(out) as beside:
            beside.write_text(json.dumps(found, indent=1) + "\n")
    for line in latents.lines(report):
        typer.echo(line, err=json_)
    if json_:
        typer.echo(json.dumps(found))
