"""`mmroute data`: make samples, hand them to other people's tools, read theirs, and check what can be guessed."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmroute.errors import ConfigError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mmroute.tasks.base import Sample, Score, Task

__all__ = ["app"]

LEAST_ITEMS = 48

app = typer.Typer(help="Make, export, import and check samples.", no_args_is_help=True)

_Out = Annotated[Path, typer.Option("-o", "--out", help="A directory that does not exist yet, or is empty.")]
_Json = Annotated[bool, typer.Option("--json", help="End with one line of JSON.")]
_Folder = Annotated[Path, typer.Argument(help="A folder that `mmroute data make` or `import` wrote.")]


@app.command()
def make(
    task: Annotated[str, typer.Option("--task", help="A task, or task:preset, e.g. maze:small.")],
    out: _Out,
    preset: Annotated[str | None, typer.Option("--preset", help="Named size, e.g. tiny, small, mvot.")] = None,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    n: Annotated[int | None, typer.Option("--n", min=1, help="How many; by default the whole split.")] = None,
    format: Annotated[str, typer.Option("--format", help="parquet, jsonl or spec (no pixels).")] = "parquet",
    set_: Annotated[list[str] | None, typer.Option("--set", help="An option: task.hop_images=observed.")] = None,
    as_json: _Json = False,
) -> None:
    """Write samples of a task as an mmhop folder."""
    from mmroute.tasks import _io
    from mmroute.tasks.base import Generated

    if format not in _io.FORMATS:
        raise ConfigError(f"--format is one of {', '.join(_io.FORMATS)} (given {format!r})")
    source = _task(task, preset, set_ or [])
    if format != "spec":
        count = _io.write(source.samples(split, n), out, format)
    elif isinstance(source, Generated):
        count = _io.write_specs(source, split, n, out)
    else:
        raise ConfigError(f"--format spec is for generated tasks; {source.name} is none, take parquet or jsonl")
    _done(out, count, as_json, task=source.name, format=format)


@app.command()
def export(
    folder: _Folder,
    to: Annotated[str, typer.Option("--to", help="trl, llava, sharegpt, mvot, vlmeval or lmms.")],
    out: _Out,
    as_json: _Json = False,
) -> None:
    """Rewrite an mmhop folder for another tool."""
    from mmroute.tasks import _export, _io

    _done(out, _export.export(_io.read(folder), to, out), as_json, to=to)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="The other tool's folder.")],
    source: Annotated[
        str,
        typer.Option("--from", help="mvot, mvot-dare (labels not trusted), vocot, m3cot, scienceqa, gqa, onethinker."),
    ],
    out: _Out,
    format: Annotated[str, typer.Option("--format", help="parquet or jsonl.")] = "parquet",
    as_json: _Json = False,
) -> None:
    """Read another tool's data into an mmhop folder."""
    from mmroute.tasks import _import, _io

    count = _io.write(_import.import_samples(folder, source), out, format)
    _done(out, count, as_json, source=source, format=format)


@app.command("lmms-path")
def lmms_path() -> None:
    """Print the folder of our lmms-eval tasks, for its --include_path."""
    from mmroute.bench.lmms_eval_entry import TASKS

    typer.echo(TASKS)


@app.command()
def gates(
    folder: _Folder,
    model: Annotated[
        str,
        typer.Option("--model", help="Also: does this model fall to chance with another item's picture?"),
    ] = "",
    as_json: _Json = False,
) -> None:
    """Check what solvers that do not look or do not read can guess; exit 1 if a gate fails."""
    from mmroute.tasks import _gates, _io

    answering = _answering(model) if model else None
    rows: list[dict[str, Any]] = []
    for task, split, specs in _io.read_worlds(folder):
        seen = [s for s in specs if not s.fog]  # what fog hides is there to be guessed
        if len(seen) < LEAST_ITEMS:
            raise InputError(
                f"{folder}: gates learn blind solvers from two thirds of the items and need {LEAST_ITEMS} or more, "
                f"given {len(seen)} of {task.name} {split}; better some thousands"
            )
        rows += [
            {"task": task.name, "preset": task.preset.name, "split": split, **asdict(g), "passed": g.passed}
            for g in [
                *_gates.run(task, seen),
                *(_gates.shuffled_image(task, seen, answering(task)) if answering else []),
            ]
        ]
    failed = [r for r in rows if not r["passed"]]
    for r in rows:
        sign = ">=" if r["is_floor"] else "<="
        word = "ok  " if r["passed"] else "FAIL"
        place = f"{r['task']}:{r['preset']} {r['split']}"
        typer.echo(f"{word} {place:<28} {r['name']:<18} {r['value']:.3f} {sign} {r['limit']:.3f}  n={r['num_items']}")
    if as_json:
        typer.echo(json.dumps({"passed": not failed, "gates": rows}))
    if failed:
        typer.echo(f"mmroute: {len(failed)} of {len(rows)} gates failed", err=True)
        raise typer.Exit(1)


def _answering(name: str) -> "Callable[[Task], Callable[[Sequence[Sample]], Sequence[Score]]]":
    """For a task, what a loaded model scores on samples with written hops."""
    from mmroute import recipe
    from mmroute.backbones.load import load
    from mmroute.bench.run import answer_items

    loaded, cot = load(name), recipe.read("cot")
    return lambda task: lambda samples: answer_items(loaded, cot, task, samples, batch=16).scores


def _task(name: str, preset: str | None, assignments: list[str]) -> "Task":
    from mmroute import hub
    from mmroute.config import overrides

    name, _, named = name.partition(":")
    if named and preset and named != preset:
        raise ConfigError(f"--task names the preset {named!r} and --preset {preset!r}; give one")
    given: dict[str, Any] = overrides(assignments)
    foreign = sorted(set(given) - {"task"})
    if foreign:
        raise ConfigError(f"--set {foreign[0]}: here options are the task's; write --set task.NAME=VALUE")
    chosen = named or preset
    options = {**({"preset": chosen} if chosen else {}), **given.get("task", {})}
    return hub.load("tasks", name, **options)


def _done(out: Path, count: int, as_json: bool, **facts: str) -> None:
    if as_json:
        typer.echo(json.dumps({"out": str(out), "n": count, **facts}))
    else:
        typer.echo(f"{count} samples in {out}")
