"""What a bench tells: `results/README.md`, pictures beside the result files, and a card for the terminal.

    mmroute bench --recipe bench-spatial --tables       # of one bench, with its pictures
    python -m mmroute.bench.report results              # the page alone

All of it is made from result files; what no file holds cannot stand there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from mmroute.bench import plot, schema, table
from mmroute.bench.compare import Line, Sheet, read_sheet
from mmroute.bench.stats import Difference

__all__ = ["Card", "page", "write"]

MARGIN = 0.01
"""Accuracy counts as kept if the paired interval ends above minus this."""


@dataclass(frozen=True)
class Card:
    """What the command prints."""

    lines: list[str]
    summary: dict[str, Any]


def write(out: Path, name: str) -> Card:
    """Draws a bench's pictures and the page of all folders of `out`.

    Raises:
        InputError: the bench's folder has no result files.
        MissingExtra: matplotlib is not installed.
    """
    sheet = read_sheet(out / name)
    plot.draw(sheet, out / name)
    schema.write_text(out / "README.md", page(out))
    return Card(list(_card(sheet)), _summary(sheet))


def page(out: Path) -> str:
    """One section for each folder that holds results."""
    parts = ["# Results\n\nMade from the files in these folders by `mmroute bench --tables`; not edited by hand.\n"]
    for folder in _folders(out):
        name = folder.relative_to(out).as_posix()
        kinds = {schema.kind_of(path) for path in folder.glob("*.json")}
        if "result/1" in kinds and any(_is_bench(path) for path in folder.glob("*.json")):
            parts.append(_section(read_sheet(folder), folder, name))
        elif len(kinds) == 1 and kinds <= table.KINDS:
            gates = sorted(folder.glob("*.svg")) if kinds == {"gate/1"} else []
            pictures = "".join(f"\n![{p.stem}]({name}/{p.name})\n" for p in gates)
            parts.append(f"## {name}\n\n{table.table_of(folder, allow_dirty=True)}{pictures}")
    return "\n".join(parts)


def _folders(out: Path) -> Iterator[Path]:
    """Folders with results and folders with results inside those; into others (answers, weights) nobody looks."""
    for folder in sorted(path for path in out.iterdir() if path.is_dir() and any(path.glob("*.json"))):
        yield folder
        yield from _folders(folder)


def _is_bench(path: Path) -> bool:
    return schema.kind_of(path) == "result/1" and bool(schema.read_result(path).method.row)


def _section(sheet: Sheet, folder: Path, name: str) -> str:
    first = sheet.lines[0].results[0]
    seeds = sorted({r.task.seed for line in sheet.lines for r in line.results})
    long = f" of {first.task.min_hops} hops or more" if first.task.min_hops else ""
    said = (
        f"## {name}\n\n"
        f"Model {first.model.id} ({first.model.layers} layers), {first.task.n} items{long} per task and seed "
        f"({', '.join(map(str, seeds))}), split {first.task.split}, greedy, {first.machine.dtype}. "
        "Asked: mean share of vision (and text) positions that run a layer, or (kv) whose keys stay. FLOPs and KV: "
        "whole answers, what choosing costs included, over `none`. AR steps: latents and generated tokens. Chains: "
        "right word for word. Differences in points of accuracy, paired on the same items, 95 %; random keeps as many "
        "positions in every layer, hop and modality. "
        "Loyalty: answered as `none` answers.\n"
    )
    if sheet.dirty:
        said += "\n**Made from source that was not committed: not for publication.**\n"
    if sheet.left_out:
        said += f"\n{sheet.left_out} files of other weights or another number of items are left out.\n"
    pictures = "\n".join(f"![{p.stem}]({name}/{p.name})" for p in sorted(folder.glob("*.svg")))
    blocks = [f"### {task}\n\n{_table(sheet, task)}" for task in sheet.tasks]
    return "\n".join([said, pictures + "\n" if pictures else "", *blocks])


def _table(sheet: Sheet, task: str) -> str:
    head = ["method", "checked", "asked", "vision", "text", "FLOPs", "KV", "AR steps", "accuracy % [95 %]"]
    forced = any(line.forced is not None for line in sheet.of(task))
    head += ["chains %", "forced %"] if forced else ["chains %"]
    head += ["to none", "to random at its counts", "loyalty %", "n"]
    rows = []
    for line in sheet.of(task):
        low, high = line.ci95
        row = [
            line.row,
            table.kinds_of_check(line.results[0].method.checked),
            _asked(line.budget),
            f"{line.share('vision'):.2f}",
            f"{line.share('text'):.2f}",
            _number(line.flops, 1, 3),
            _number(line.kv, 1, 3),
            f"{line.ar_steps:.1f}",
            f"{100 * line.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
            _number(line.exact, 100, 1),
        ]
        row += [_number(line.forced, 100, 1)] if forced else []
        row += [_points(line.to_none), _points(line.to_random), _number(line.loyalty, 100, 1), str(line.n)]
        rows.append(row)
    cannot = sorted(sheet.infeasible, key=lambda i: (-i.budget.text, -i.budget.vision, i.row))
    rows += [[each.row, "", _asked(each.budget), "infeasible", *[""] * (len(head) - 4)] for each in cannot]
    return table.markdown(head, rows)


def _asked(budget: schema.Budget) -> str:
    share = f"{budget.vision:.2f}" + (f" / {budget.text:.2f}" if budget.text < 1 else "")
    return f"kv {share}" if budget.unit == "kv_share" else share


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def _points(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return f"{100 * difference.diff:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _card(sheet: Sheet) -> Any:
    for task in sheet.tasks:
        lines = sheet.of(task)
        base = next((line for line in lines if line.row == "none"), None)
        yield f"{sheet.name}, {task}, n {lines[0].n}" + (f": none {base.accuracy:.3f}" if base else "")
        kept = [line for line in lines if line.to_none is not None and line.to_none.is_not_worse(MARGIN)]
        for line in sorted(kept, key=lambda line: line.flops or 1.0)[:3]:
            yield f"  accuracy kept: {_said(line)}"
        if not kept and base:
            near = max((line for line in lines if line is not base), key=lambda line: line.accuracy, default=None)
            yield "  accuracy kept by none of them" + (f"; nearest {_said(near)}" if near else "")
        worse = [line for line in lines if line.to_random is not None and not line.to_random.is_better]
        if worse:
            yield "  not above random: " + ", ".join(f"{line.row} {_asked(line.budget)}" for line in worse)


def _said(line: Line) -> str:
    return (
        f"{line.row} {_asked(line.budget)}: accuracy {line.accuracy:.3f}, {_points(line.to_none)} points, "
        f"FLOPs {_number(line.flops, 1, 3)}, KV {_number(line.kv, 1, 3)}"
    )


def _summary(sheet: Sheet) -> dict[str, Any]:
    return {
        "tasks": {
            task: [
                {
                    "method": line.row,
                    "vision": line.budget.vision,
                    "text": line.budget.text,
                    "unit": line.budget.unit,
                    "accuracy": line.accuracy,
                    "exact": line.exact,
                    "flops": line.flops,
                    "kv": line.kv,
                    "ar_steps": line.ar_steps,
                    "to_none": line.to_none and [line.to_none.diff, line.to_none.low, line.to_none.high],
                    "to_random": line.to_random and [line.to_random.diff, line.to_random.low, line.to_random.high],
                    "loyalty": line.loyalty,
                    "n": line.n,
                }
                for line in sheet.of(task)
            ]
            for task in sheet.tasks
        },
        "infeasible": [f"{row.row} {_asked(row.budget)}" for row in sheet.infeasible],
    }


def main(out: Path) -> None:
    """Writes the page of a folder of result folders."""
    schema.write_text(out / "README.md", page(out))


if __name__ == "__main__":
    typer.run(main)
