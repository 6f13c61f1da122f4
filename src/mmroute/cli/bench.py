"""`mmroute bench`: several methods on several tasks at equal budgets, one result file per run, one table, pictures."""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from mmroute.cli._model import Device, Dtype, open_model

__all__ = ["bench"]


def bench(
    recipe: Annotated[str, typer.Option(help="Name (bench-spatial, -ablate, -kv, -gate) or .yaml file.")],
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
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Compare methods at equal budgets on several tasks. Stop it at any time: it goes on where it was."""
    from mmroute.bench import gate, grid, report, suite  # torch costs seconds; --help must not pay them
    from mmroute.processes import device_named

    if gate.is_gate_bench(recipe):
        others: dict[str, object] = {
            "--model": model,
            "--tasks": tasks,
            "--methods": methods,
            "--budgets": budgets,
            "--jobs": jobs > 1,
            "--device": device != "cpu",
            "--dtype": dtype,
        }
        _bench_gates(recipe, [name for name, given in others.items() if given], seeds, n, out, dry, tables, set_, json_)
        return

    lists = {"tasks": tasks, "vision": budgets, "seeds": seeds}
    sets = [f"{name}=[{value}]" for name, value in lists.items() if value]
    sets += [f"model={json.dumps(model)}"] if model else []
    sets += [f"n={n}"] if n else []
    sets += [f"device={device_named(device).type}"] if device != "cpu" else []
    sets += [f"dtype={dtype}"] if dtype else []
    chosen = grid.read(recipe, [*sets, *(set_ or [])], [m for m in methods.split(",") if m])
    loaded = open_model(chosen.model, chosen.device, chosen.dtype)
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


def _bench_gates(
    recipe: str,
    foreign: list[str],
    seeds: str,
    n: int,
    out: Path,
    dry: bool,
    tables: bool,
    set_: list[str] | None,
    json_: bool,
) -> None:
    """Every gate on one pair of models."""
    from mmroute.bench import gate, gate_report, gate_schema, report, schema
    from mmroute.config import resolved
    from mmroute.errors import ConfigError

    if foreign:
        raise ConfigError(f"{recipe} compares gates on the pair of its own recipe; {', '.join(foreign)} mean nothing")
    chosen = gate.read(recipe, [*([f"seeds=[{seeds}]"] if seeds else []), *(set_ or [])], n)
    folder = out / chosen.name
    if tables:
        found = gate_schema.read_gate(folder / "gate.json")
        gate_report.write(found, folder)
    else:
        plan = gate.Plan.of(chosen)
        typer.echo(
            f"{chosen.name}: {chosen.n} questions of each seed of {', '.join(map(str, chosen.seeds))}, {chosen.train} "
            f"to fit on, {len(chosen.gates)} gates; answers are kept in {chosen.work}",
            err=True,
        )
        if dry:
            typer.echo(plan.expected())
            return
        command = shlex.join(["mmroute", *sys.argv[1:]])
        found = gate.run(plan, out=folder, command=command, progress=lambda text: typer.echo(text, err=True))
    schema.write_text(out / "README.md", report.page(out))
    for text in gate_report.section(found):
        typer.echo(text, err=json_)
    if json_:
        typer.echo(json.dumps({"bench": chosen.name, "n": found.pooled.n, **resolved(found.claims)}))
