"""`mmroute eval`: accuracy and cost of a recipe on a task, against another recipe on the same items; of a recipe with a
gate, on its own mixture; or of every ranking that a table of outcomes allows."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmroute.cli._model import Device, Dtype, open_model

__all__ = ["evaluate"]


def evaluate(
    task: Annotated[str, typer.Option(help="Name, or name:preset; see `mmroute list tasks`. A gate has its own.")] = "",
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
    budget: Annotated[
        float | None, typer.Option(help="With a gate: share of questions the target answers.", min=0, max=1)
    ] = None,
    outcomes: Annotated[
        Path | None, typer.Option(help="Judge rankings on this table of answers; no model runs.")
    ] = None,
    from_: Annotated[
        str, typer.Option("--from", help="Its format: mmr-bench, vl-routerbench, routerbench, routellm, table.")
    ] = "",
    draft: Annotated[str, typer.Option(help="The small model: a gate's, or by its name in the table.")] = "",
    ray: Annotated[
        int | None, typer.Option(help="Answer on a Ray cluster, with this many actors; needs --parts.", min=1)
    ] = None,
    parts: Annotated[
        Path | None, typer.Option(help="With --ray: folder of answered items; started again, it goes on with them.")
    ] = None,
    target: Annotated[str, typer.Option(help="The large one, likewise.")] = "",
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Score a recipe on a task, with its FLOPs, KV bytes and seconds."""
    from mmroute.errors import ConfigError

    if outcomes is not None:
        _judge_table(outcomes, from_, draft, target, out, json_)
        return
    from mmroute import recipe as recipes  # torch costs seconds; --help must not pay them
    from mmroute.config import overrides
    from mmroute.processes import num_processes, refuse_company

    about = [text for text in set_ or [] if text.startswith(("task.", "context="))]
    asked = overrides(about)
    chosen = recipes.read(recipe, [text for text in set_ or [] if text not in about])
    if chosen.gate is not None:
        refuse_company(f"mmroute eval --recipe {chosen.name}", "a recipe without a gate is shared by processes")
        _score_gate(chosen, draft, target, n, seed, budget, out, json_, device, dtype)
        return
    if not task:
        raise ConfigError("--task is missing; `mmroute list tasks` shows what there is")
    if budget is not None:
        raise ConfigError(f"--budget is a gate's share of target calls; {chosen.name} has no gate, prp-small has one")
    if (ray is None) != (parts is None):
        raise ConfigError("--ray N and --parts DIR go together: actors write what they answered there")
    from mmroute.bench import run, schema, spread

    ours, theirs = chosen, recipes.read(against) if against else None
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

    loaded, answered = open_model(model, device, dtype), None
    sides = [ours] if theirs is None else [ours, theirs]
    if ray is not None and parts is not None:
        where = {"device": loaded.device.type, "dtype": dtype}  # actors compute as this process does
        answered = [
            spread.on_ray(model, side, plan, parts / f"{side.name}.jsonl", ray, progress, **where) for side in sides
        ]
    elif num_processes() > 1:
        answered = spread.over_ranks(loaded, sides, plan, progress)
        if answered is None:
            return
    found = run.evaluate(
        loaded,
        ours,
        plan,
        against=theirs,
        command=shlex.join(["mmroute", *sys.argv[1:]]),
        name=model,
        progress=progress,
        outcomes=answered,
    )
    if out is not None:
        schema.write_result(out, found.result)
        if theirs is not None and found.baseline is not None:
            schema.write_result(out.with_name(f"{out.stem}--against-{theirs.name}{out.suffix}"), found.baseline)
    for line in run.lines(found):
        typer.echo(line, err=json_)
    if json_:
        typer.echo(json.dumps(found.summary.to_dict()))


def _score_gate(
    recipe: Any,
    draft: str,
    target: str,
    n: int,
    seed: int,
    budget: float | None,
    out: Path | None,
    as_json: bool,
    device: str,
    dtype: str,
) -> None:
    """One policy on the recipe's own mixture."""
    import time
    from datetime import UTC, datetime

    from mmroute.bench import schema
    from mmroute.bench.gate_pair import evaluate, open_pair
    from mmroute.bench.gate_schema import GateEval
    from mmroute.config import resolved
    from mmroute.train.prp_config import sections

    origin, began = schema.commit_of_source(), time.perf_counter()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    gated, _ = sections(recipe)
    named = dataclasses.replace(gated, draft=draft or gated.draft, target=target or gated.target)
    small, large = (open_model(name, device, dtype or gated.dtype) for name in (named.draft, named.target))
    found = evaluate(recipe, *open_pair(named, small, large), n=n, seed=seed, budget=budget)
    if out is not None:
        command = shlex.join(["mmroute", *sys.argv[1:]])
        run = schema.run_here(command, *origin, started_at, time.perf_counter() - began)
        machine = schema.machine_here(small.device.type, dtype or str(named.dtype or "checkpoint"), "sdpa")
        schema.write_result(out, GateEval(run=run, machine=machine, summary=found))
    for name, value in resolved(found).items():
        typer.echo(f"{name}: {value}", err=as_json)
    if as_json:
        typer.echo(json.dumps(resolved(found)))


def _judge_table(path: Path, source: str, draft: str, target: str, out: Path | None, as_json: bool) -> None:
    """Every ranking that a table of outcomes has evidence for; needs no model and no torch."""
    from mmroute.bench import gate_report, schema
    from mmroute.bench.gate_judge import judge_table
    from mmroute.bench.outcomes.load import load_outcomes

    table = load_outcomes(path, source, draft, target)
    judged = {each.title: each for each in judge_table(table)}
    found = {
        "schema": "gate-table/1",
        "draft": table.draft_model,
        "target": table.target_model,
        "unit": table.unit,
        "n": len(table),
        "accuracy_draft": float(table.draft.mean()),
        "accuracy_target": float(table.target.mean()),
        "gates": {title: dataclasses.asdict(each) for title, each in judged.items()},
    }
    if out is not None:
        schema.write_json(out, found)
    for line in gate_report.lines(judged):
        typer.echo(line, err=as_json)
    if as_json:
        typer.echo(json.dumps(found))
