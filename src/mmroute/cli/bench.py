"""`mmroute bench`: several methods on several tasks at equal budgets, one result file per run, one table, pictures."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["bench"]


def bench(
    recipe: Annotated[str, typer.Option(help="Name (bench-spatial, bench-ablate, bench-kv) or .yaml file.")],
    model: Annotated[str, typer.Option(help="Bundled name, checkpoint folder or Hub id; the recipe's if empty.")] = "",
    tasks: Annotated[str, typer.Option(help="Tasks, comma-separated; the recipe's if empty.")] = "",
    methods: Annotated[str, typer.Option(help="Of the recipe's methods these, comma-separated.")] = "",
    budgets: Annotated[str, typer.Option(help="Shares of vision that run, comma-separated.")] = "",
    seeds: Annotated[str, typer.Option(help="Which items, comma-separated: another seed, other items.")] = "",
    n: Annotated[int, typer.Option(help="Items per task and seed; 0 is the recipe's.", min=0)] = 0,
    jobs: Annotated[int, typer.Option(help="Processes; a thread each.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder of result folders, the table and the pictures.")] = Path("results"),
    dry: Annotated[bool, typer.Option("--dry", help="Print the runs and stop.")] = False,
    tables: Annotated[bool, typer.Option("--tables", help="Draw anew from the files that are there; run nothing.")] = (
        False
    ),
    set_: Annotated[list[str] | None, typer.Option("--set", help="path=value for the recipe; repeatable.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Compare methods at equal budgets on several tasks. Stop it at any time: it goes on where it was."""
    from mmroute.backbones.load import load  # torch costs seconds; --help must not pay them
    from mmroute.bench import grid, report, suite

    lists = {"tasks": tasks, "vision": budgets, "seeds": seeds}
    sets = [f"{name}=[{value}]" for name, value in lists.items() if value]
    sets += [f"model={json.dumps(model)}"] if model else []
    sets += [f"n={n}"] if n else []
    chosen = grid.read(recipe, [*sets, *(set_ or [])], [m for m in methods.split(",") if m])
    loaded = load(chosen.model)
    plan = suite.Suite.plan(chosen, loaded, out / chosen.name)
    left = plan.left()
    typer.echo(
        f"{chosen.name}: {len(plan.jobs)} runs of {chosen.n} items, {len(left)} left; model {chosen.model}", err=True
    )
    for case in plan.infeasible:
        typer.echo(f"infeasible: {case.label}: {case.infeasible}", err=True)
    if dry:
        for job in plan.jobs:
            typer.echo(job.file)
        return

    def told(line: str, done: int, total: int) -> None:
        sys.stderr.write(f"[{done}/{total}] {line}\n")
        sys.stderr.flush()

    made = 0 if tables else suite.run(plan, loaded, shlex.join(["mmroute", *sys.argv[1:]]), jobs, told)
    card = report.write(out, chosen.name)
    for text in card.lines:
        typer.echo(text, err=json_)
    if json_:
        typer.echo(json.dumps({"bench": chosen.name, "runs": len(plan.jobs), "made": made, **card.summary}))
