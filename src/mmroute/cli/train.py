"""`mmroute train`: the trainers, each a folder that can be resumed."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mmroute.cli._model import Device, open_model

__all__ = ["app"]

_TOGETHER = ("vedas",)
"""Trainers that several processes can share; each other one would be as many whole trainings."""

_Board = Annotated[
    Path | None, typer.Option("--tensorboard", help="Folder for TensorBoard to read; nothing if not given.")
]

app = typer.Typer(help="Train models and their parts.", no_args_is_help=True)


@app.callback()
def root(context: typer.Context) -> None:
    """Train models and their parts."""
    from mmroute.processes import refuse_company

    if context.invoked_subcommand not in _TOGETHER:
        refuse_company(
            f"mmroute train {context.invoked_subcommand}",
            "of the trainers only `mmroute train vedas` is shared by processes; your own loop over a routed model is "
            "too (docs/extend.md)",
        )


@app.command()
def backbone(
    recipe: Annotated[str, typer.Option(help="Name of a shipped recipe (tiny, draw, boxes), or a YAML file.")] = "tiny",
    out: Annotated[Path, typer.Option(help="Folder of the run; the model comes to lie in its folder `model`.")] = Path(
        "runs/tiny"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stands.")] = False,
    device: Device = "cpu",
    tensorboard: _Board = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and data; the recipe's own if not given.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Recipe option, path=value; repeatable.")] = None,
) -> None:
    """Train a small stock model from scratch on generated worlds; killed at any moment, it goes on with --resume."""
    from mmroute.config import overrides
    from mmroute.train import boxes, pictures
    from mmroute.train.backbone import train_backbone
    from mmroute.train.follow import following
    from mmroute.train.recipe import load_recipe
    from mmroute.train.scratch import ScratchRun, family_of, train_scratch

    given = overrides(changes or [])
    if seed is not None:
        given["seed"] = seed
    beyond_words: dict[str | None, type[ScratchRun[Any]]] = {"chameleon": pictures.Run, "llava": boxes.Run}
    family = family_of(recipe)
    with following(tensorboard) as followers:
        if family in beyond_words:
            folder = train_scratch(beyond_words[family], recipe, given, out, device, resume, followers)
        else:
            folder = train_backbone(load_recipe(recipe, given), out, device, resume, followers)
    typer.echo(str(folder))


@app.command()
def vedas(
    recipe: Annotated[
        str, typer.Option(help="Name of a shipped recipe (latent, vedas, coconut, pause ...), or a YAML file.")
    ] = "latent",
    model: Annotated[str, typer.Option(help="Bundled name, checkpoint folder or Hub id.")] = "tiny",
    task: Annotated[list[str] | None, typer.Option(help="World, or world:preset; repeatable.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run, runs/RECIPE if not given; the result is its `latent`.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stands.")] = False,
    device: Device = "cpu",
    tensorboard: _Board = None,
    seed: Annotated[int | None, typer.Option(help="Of data; the recipe's own if not given.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Recipe option, path=value; repeatable.")] = None,
) -> None:
    """Teach a model to think in latents, in stages; killed at any moment, it goes on with --resume."""
    from mmroute.train.curriculum import read_recipe
    from mmroute.train.follow import following
    from mmroute.train.vedas import train_vedas

    settings = read_recipe(recipe, _chosen(changes, task, seed))
    loaded, run = open_model(model, device), out or Path("runs") / settings.name
    with following(tensorboard) as followers:
        folder = train_vedas(settings, loaded, run, resume, followers)
    typer.echo(str(folder))


def _chosen(changes: list[str] | None, task: list[str] | None, seed: int | None) -> list[str]:
    """`--task` and `--seed` as what they stand for."""
    chosen = list(changes or [])
    if task:
        chosen.append(f"train.tasks={{{', '.join(f'{name!r}: 1' for name in task)}}}")
    if seed is not None:
        chosen.append(f"train.seed={seed}")
    return chosen


@app.command()
def dare(
    recipe: Annotated[
        str, typer.Option(help="Name of a shipped recipe (dare-l, dare-lh), or a YAML file.")
    ] = "dare-lh",
    model: Annotated[str, typer.Option(help="Bundled name, checkpoint folder or Hub id.")] = "tiny",
    task: Annotated[list[str] | None, typer.Option(help="World, or world:preset; repeatable.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the run; the routers come to lie in its folder `router`.")
    ] = Path("runs/dare-lh"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stands.")] = False,
    device: Device = "cpu",
    tensorboard: _Board = None,
    seed: Annotated[int | None, typer.Option(help="Of data and noise; the recipe's own if not given.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Recipe option, path=value; repeatable.")] = None,
) -> None:
    """Train the routers of DARE, and the backbone with them; killed at any moment, it goes on with --resume."""
    from mmroute import recipe as recipes
    from mmroute.train.dare import train_dare
    from mmroute.train.follow import following

    settings, loaded = recipes.read(recipe, _chosen(changes, task, seed)), open_model(model, device)
    with following(tensorboard) as followers:
        folder = train_dare(settings, loaded, out, resume, followers)
    typer.echo(str(folder))


@app.command()
def prp(
    recipe: Annotated[str, typer.Option(help="Name of a shipped recipe with a gate (prp-small), or a YAML file.")] = (
        "prp-small"
    ),
    draft: Annotated[str, typer.Option(help="The small model; the recipe's own if not given.")] = "",
    target: Annotated[str, typer.Option(help="The large model; the recipe's own if not given.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the run; the rater comes to lie in its folder `rater`.")] = Path(
        "runs/prp-small"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the run in --out stands.")] = False,
    device: Device = "cpu",
    seed: Annotated[int | None, typer.Option(help="Of questions and weights; the recipe's own if not given.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Recipe option, path=value; repeatable.")] = None,
) -> None:
    """Train a draft to rate itself and the target before it answers; its own answers stay what they are."""
    from mmroute import recipe as recipes
    from mmroute.train.prp import train_prp
    from mmroute.train.prp_config import sections

    chosen = list(changes or [])
    if seed is not None:
        chosen.append(f"train.seed={seed}")
    read = recipes.read(recipe, chosen)
    gated, _ = sections(read)
    small = open_model(draft or gated.draft, device, gated.dtype)
    large = open_model(target or gated.target, device, gated.dtype)
    typer.echo(str(train_prp(read, small, large, out, resume)))
