"""`mmroute train`: the trainers, each a folder that can be resumed."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Train models and their parts.", no_args_is_help=True)


@app.callback()
def root() -> None:
    """Train models and their parts."""


@app.command()
def backbone(
    recipe: Annotated[str, typer.Option(help="Name of a shipped recipe (tiny), or a YAML file.")] = "tiny",
    out: Annotated[Path, typer.Option(help="Folder of the run; the model comes to lie in its folder `model`.")] = Path(
        "runs/tiny"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stands.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int | None, typer.Option(help="Of weights and data; the recipe's own if not given.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Recipe option, path=value; repeatable.")] = None,
) -> None:
    """Train a small stock model from scratch on generated worlds; killed at any moment, it goes on with --resume."""
    from mmroute.config import overrides
    from mmroute.train.backbone import train_backbone
    from mmroute.train.recipe import load_recipe

    given = overrides(changes or [])
    if seed is not None:
        given["seed"] = seed
    folder = train_backbone(load_recipe(recipe, given), out, device, resume)
    typer.echo(str(folder))
