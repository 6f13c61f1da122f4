"""`mmroute eval`: accuracy and cost of a recipe on a task, against another recipe on the same items."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["evaluate"]


def evaluate(
    task: Annotated[str, typer.Option(help="Name, or name:preset; see `mmroute list tasks`.")],
    recipe: Annotated[str, typer.Option(help="Name or .yaml file; see `mmroute list recipes`.")] = "none",
    n: Annotated[int, typer.Option(help="Items.")] = 100,
    seed: Annotated[int, typer.Option(help="Which items: another seed, other items.")] = 0,
    against: Annotated[str, typer.Option(help="Recipe to compare with, in the same run.")] = "",
    model: Annotated[str, typer.Option(help="Bundled name, checkpoint folder or Hub id.")] = "tiny",
    batch: Annotated[int, typer.Option(help="Conversations answered at once; changes no answer.")] = 16,
    split: Annotated[str, typer.Option(help="Split of the task.")] = "test",
    rounds: Annotated[int, typer.Option(help="Timed rounds.", min=1)] = 9,
    out: Annotated[Path | None, typer.Option(help="Result file; a baseline goes beside it.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="path=value for --recipe; task.OPTION=value for the task."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Score a recipe on a task, with its FLOPs, KV bytes and seconds."""
    from mmroute import recipe as recipes  # torch costs seconds; --help must not pay them
    from mmroute.backbones.load import load
    from mmroute.bench import run, schema
    from mmroute.config import overrides

    about = [text for text in set_ or [] if text.startswith(("task.", "context="))]
    asked = overrides(about)
    ours = recipes.read(recipe, [text for text in set_ or [] if text not in about])
    theirs = recipes.read(against) if against else None
    plan = run.Plan(
        task=task,
        n=n,
        seed=seed,
        split=split,
        settings=asked.get("task", {}),
        context=asked.get("context", "accumulate"),
        batch=batch,
        rounds=rounds,
    )
    run.draw(run.load_task(task, plan.settings), plan)  # what is wrong with them is reported before a model is loaded

    def progress(name: str, done: int, total: int) -> None:
        sys.stderr.write(f"\r{name}: {done}/{total}" + ("\n" if done == total else ""))
        sys.stderr.flush()

    found = run.evaluate(
        load(model),
        ours,
        plan,
        against=theirs,
        command=shlex.join(["mmroute", *sys.argv[1:]]),
        name=model,
        progress=progress,
    )
    if out is not None:
        schema.write_result(out, found.result)
        if theirs is not None and found.baseline is not None:
            schema.write_result(out.with_name(f"{out.stem}--against-{theirs.name}{out.suffix}"), found.baseline)
    for line in run.lines(found):
        typer.echo(line, err=json_)
    if json_:
        typer.echo(json.dumps(found.summary.to_dict()))
