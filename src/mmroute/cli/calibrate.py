"""`mmroute calibrate`: what a model tolerates, measured without training."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mmroute.cli._model import Device, Dtype, open_model

__all__ = ["app"]

app = typer.Typer(help="Measure what a model tolerates: its information cliff, and keep rates for a budget.")

Model = Annotated[str, typer.Option(help="Model folder, hub id, or the bundled `tiny`.")]
Tasks = Annotated[list[str], typer.Option("--task", help="Task, or task:preset; repeatable.")]
Items = Annotated[int, typer.Option("--n", help="Items of the validation split, in all.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="File to write.")]
AsJson = Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")]


@app.command()
def cliff(
    task: Tasks,
    model: Model = "tiny",
    n: Items = 64,
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Behind which layer is the image no longer needed? Writes the curve as JSON and, beside it, SVG."""
    from mmroute import calibrate  # torch costs seconds; --help must not pay them
    from mmroute.bench.schema import write_text

    loaded = open_model(model, device, dtype)
    batches = list(calibrate.gold(loaded, task, n))
    found = calibrate.measure_cliff(loaded, batches)
    result = {"model": model, "task": task, **found.to_dict()}
    if out is not None:
        write_text(out, json.dumps(result, indent=1) + "\n")
        write_text(out.with_suffix(".svg"), calibrate.cliff_svg(found, f"{model}, {', '.join(task)}"))
    if as_json:
        typer.echo(json.dumps(result))
        return
    typer.echo("layers that see the image   nll per token   exact chains")
    for c, (nll, exact) in enumerate(zip(found.nll, found.exact, strict=True)):
        typer.echo(f"{c:>25}{nll:>16.4f}{exact:>15.3f}{'   <- cliff' if c == found.cutoff_layer else ''}")
    typer.echo(f"--set prune.cutoff_layer={found.cutoff_layer}")


@app.command()
def schedule(
    task: Tasks,
    budget: Annotated[float, typer.Option(help="Mean share of vision positions that run a layer, in (0, 1].")],
    model: Model = "tiny",
    n: Items = 64,
    out: Out = None,
    as_json: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Which share of the image does each layer need, within a budget? Writes a recipe for `--recipe FILE`."""
    from mmroute import calibrate
    from mmroute.bench.schema import write_text

    loaded = open_model(model, device, dtype)
    batches = list(calibrate.gold(loaded, task, n))
    found = calibrate.measure_schedule(loaded, batches, budget)
    recipe = found.recipe(f"model {model}, {', '.join(task)}, budget {budget}")
    if out is not None:
        write_text(out, recipe)
    typer.echo(json.dumps({"model": model, "task": task, **found.to_dict()}) if as_json else recipe, nl=as_json)
