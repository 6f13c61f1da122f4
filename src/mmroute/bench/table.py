"""Markdown tables from result files only: `python -m mmroute.bench.table README.md [--check]`.

Fills every block `<!-- table:NAME -->` ... `<!-- /table -->` of a Markdown file from `results/NAME/*.json`, and the
block `<!-- headline -->` ... `<!-- /headline -->` from the files of the table `spatial`. A number that no committed
file holds cannot stand in such a block, a block without files stays empty, and `--check` says when one is out of date.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from mmroute.bench import engine_schema, schema
from mmroute.errors import ConfigError, InputError

__all__ = [
    "KINDS",
    "drawn_table",
    "engine_table",
    "fill",
    "headline",
    "kinds_of_check",
    "latent_time_table",
    "markdown",
    "result_table",
    "table_of",
]

_BLOCK = re.compile(r"(<!-- table:([\w./-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
_HEADLINE = re.compile(r"(<!-- headline -->\n)(.*?)(<!-- /headline -->)", re.DOTALL)
_UNCOMMITTED = "made from source that was not committed; commit, then run again"
HEADLINE_TABLE, HEADLINE_RECIPE = "spatial", "dare-lh"


def table_of(folder: Path, allow_dirty: bool = False) -> str:
    """The table of all result files in a folder, in Markdown.

    Raises:
        InputError: no result files, files of two kinds or of one without a table, or one whose source was not
            committed.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"{folder}: no result files; run the benchmark that fills it")
    kinds = sorted({schema.kind_of(path) for path in paths})
    if len(kinds) > 1:
        raise InputError(f"{folder}: files of {' and '.join(kinds)}; keep one kind in a folder")
    if kinds[0] not in _TABLES:
        raise InputError(f"{folder}: {kinds[0]} has no table; kinds that have one are {', '.join(sorted(KINDS))}")
    return _TABLES[kinds[0]](paths, allow_dirty)


def _read(paths: list[Path], read: Callable[[Path], Any], allow_dirty: bool) -> list[Any]:
    """What the files hold.

    Raises:
        InputError: one whose source was not committed.
    """
    found = [read(path) for path in paths]
    dirty = [path.name for path, each in zip(paths, found, strict=True) if each.run.dirty]
    if dirty and not allow_dirty:
        raise InputError(f"{', '.join(dirty)}: {_UNCOMMITTED}")
    return found


def _engines(paths: list[Path], allow_dirty: bool) -> str:
    return engine_table(_read(paths, engine_schema.read_engine, allow_dirty))


def _results(paths: list[Path], allow_dirty: bool) -> str:
    return result_table(_read(paths, schema.read_result, allow_dirty))


def _drawn(paths: list[Path], allow_dirty: bool) -> str:
    return drawn_table([schema.read_plain(path) for path in paths], allow_dirty)


def _latent_times(paths: list[Path], allow_dirty: bool) -> str:
    return latent_time_table([schema.read_plain(path) for path in paths], allow_dirty)


# Those below write their tables with this module, so they are imported when there is one to write.


def _lmms(paths: list[Path], allow_dirty: bool) -> str:
    from mmroute.bench import lmms_schema

    return lmms_schema.lmms_table(_read(paths, lmms_schema.read_lmms, allow_dirty))


def _gates(paths: list[Path], allow_dirty: bool) -> str:
    from mmroute.bench import gate_report, gate_schema

    return _joined(gate_report.section(each) for each in _read(paths, gate_schema.read_gate, allow_dirty))


def _gate_evals(paths: list[Path], allow_dirty: bool) -> str:
    from mmroute.bench import gate_report, gate_schema

    return _joined([gate_report.evaluations(_read(paths, gate_schema.read_gate_eval, allow_dirty))])


def _gateways(paths: list[Path], allow_dirty: bool) -> str:
    from mmroute.bench import gate_schema, gateway_report

    return _joined(gateway_report.section(each) for each in _read(paths, gate_schema.read_gateway, allow_dirty))


def _joined(texts: Iterable[list[str]]) -> str:
    return "\n\n".join("\n".join(lines) for lines in texts) + "\n"


_TABLES: dict[str, Callable[[list[Path], bool], str]] = {
    "drawn/1": _drawn,
    "engine/1": _engines,
    "gate/1": _gates,
    "gate-eval/1": _gate_evals,
    "gateway/1": _gateways,
    "latent-time/1": _latent_times,
    "lmms/2": _lmms,
    "result/1": _results,
}
KINDS = frozenset(_TABLES)
"""Kinds of result files that have a table."""


def drawn_table(runs: list[dict[str, Any]], allow_dirty: bool = False) -> str:
    """What the pictures of drawn thoughts are worth, one line per recipe and task.

    Raises:
        InputError: one whose source was not committed.
    """
    if any(run["dirty"] for run in runs) and not allow_dirty:
        raise InputError(f"{', '.join(run['recipe'] for run in runs if run['dirty'])}: {_UNCOMMITTED}")
    rows = []
    for run in sorted(runs, key=lambda run: (run["prune"] is not None, run["recipe"], run["context"])):
        for task, found in run["tasks"].items():
            rows.append(
                [
                    f"{task}:{run['preset']}",
                    run["recipe"],
                    run["context"],
                    " / ".join(f"{found['keep'][name]:.3f}" for name in ("vision", "text")),
                    _percent(found["drawn_right"], found["drawn_right_ci95"]),
                    *(f"{found[name]:.3f}" for name in ("v_acc", "v_red", "v_ratio")),
                    _percent(found["accuracy"], found["ci95"]),
                    str(found["n"]),
                ]
            )
    head = ["task", "recipe", "context", "keep vision / text", "items drawn without a fault % [95 %]"]
    return markdown([*head, "v_acc", "v_red", "v_ratio", "accuracy % [95 %]", "n"], rows)


def _percent(share: float, bounds: Sequence[float]) -> str:
    return f"{100 * share:.1f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def latent_time_table(runs: list[dict[str, Any]], allow_dirty: bool = False) -> str:
    """What latent steps cost, one line per way and machine; a way without a pair was not compared.

    Raises:
        InputError: one whose source was not committed.
    """
    if any(run["run"]["dirty"] for run in runs) and not allow_dirty:
        raise InputError(f"latent-time: {_UNCOMMITTED}")
    rows = []
    for run in runs:
        # Of Vedas two pairs are measured; the one with stock is the one with a goal.
        pairs = dict(pair.split("/") for pair in run["ratio"] if pair != "vedas/ivtlr")
        for way, seconds in run["time_s"].items():
            other, peak = pairs.get(way), run["peak_memory_bytes"].get(way)
            rows.append(
                [
                    way,
                    run["machine"]["device"],
                    str(run["token_forwards"][way]),
                    _spread(seconds, 1000, 0),
                    "-" if other is None else f"{_spread(run['ratio'][f'{way}/{other}'])} to {other}",
                    "n/a" if peak is None else f"{peak / 1e6:.1f}",
                ]
            )
    head = ["way", "device", "positions entered", "ms [p10, p90]", "time ratio [p10, p90]", "peak MB"]
    return markdown(head, rows)


def headline(folder: Path, allow_dirty: bool = False) -> str:
    """The one sentence on top: what DARE-LH saves on all tasks of a folder, and what it costs; or ""."""
    results = _read(sorted(folder.glob("*.json")), schema.read_result, allow_dirty)
    pairs = [(r, _baseline_of(r, results)) for r in results if r.method.recipe == HEADLINE_RECIPE]
    whole = [(r, base) for r, base in pairs if base is not None and base is not r]
    if not whole:
        return ""
    ours, theirs = (
        {
            "accuracy": fmean(side.quality.accuracy for side in sides),
            "flops": sum(side.cost.flops_answer for side in sides),
            "kv": sum(side.cost.kv_bytes_end for side in sides),
        }
        for sides in zip(*whole, strict=True)
    )
    names = sorted(r.task.name.partition("-v")[0] for r, _ in whole)
    tasks = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    flops, kv = (1 - ours[key] / theirs[key] for key in ("flops", "kv"))
    return (
        f"**{flops:.0%} fewer FLOPs and {kv:.0%} less KV cache** on held-out {tasks}: the bundled model answers "
        f"{ours['accuracy']:.1%} right with the recipe `{HEADLINE_RECIPE}` and {theirs['accuracy']:.1%} unrouted "
        f"([results/{folder.name}](results/{folder.name})).\n"
    )


def engine_table(results: list[engine_schema.EngineResult]) -> str:
    """Time against arithmetic, one line per case."""
    rows = [
        [
            r.case,
            _spread(r.ratio),
            f"{r.flop_ratio:.3f}",
            f"{r.goal:.3f}",
            "yes" if r.reached else "**no**",
            "n/a" if r.realised_saving is None else f"{r.realised_saving:.2f}",
            f"{r.kv_bytes / r.stock_kv_bytes:.3f}" if r.stock_kv_bytes else "n/a",  # training caches nothing
            _megabytes(r.peak_memory_bytes, r.stock_peak_memory_bytes),
        ]
        for r in results
    ]
    head = ["case", "time ratio [p10, p90]", "FLOP ratio", "goal", "reached", "realised saving", "KV ratio"]
    return markdown([*head, "peak MB (stock)"], rows)


def _megabytes(ours: int | None, stock: int | None) -> str:
    return "n/a" if ours is None or stock is None else f"{ours / 1e6:.0f} ({stock / 1e6:.0f})"


def result_table(results: list[schema.Result]) -> str:
    """Accuracy and cost, one line per recipe and task; ratios are to the baseline in the same folder."""
    order = sorted(results, key=lambda r: (r.task.name, r.task.preset, r.baseline is not None, r.method.recipe))
    rows, shown = [], set()
    for r in order:
        same = (r.task.name, r.task.preset, r.task.ids_sha256, r.model.id, r.method.recipe)
        if r.baseline is None and same in shown:  # the same baseline, run again beside another recipe
            continue
        shown.add(same)
        base = _baseline_of(r, results)
        low, high = r.quality.wilson95
        rows.append(
            [
                f"{r.task.name}:{r.task.preset}" if r.task.preset else r.task.name,
                r.method.recipe,
                kinds_of_check(r.method.checked),
                f"{r.cost.v_eff:.1f}",
                f"{r.cost.t_eff:.1f}",
                "n/a" if base is None else f"{r.cost.flops_answer / base.cost.flops_answer:.3f}",
                "n/a" if base is None else f"{r.cost.kv_bytes_end / base.cost.kv_bytes_end:.3f}",
                _time_ratio(r, "prefill"),
                _time_ratio(r, "decode"),
                f"{100 * r.quality.accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
                _difference(r),
                f"{r.cost.ar_steps:.1f}",
                str(r.task.n),
            ]
        )
    head = ["task", "recipe", "checked", "V_eff", "T_eff", "FLOP ratio", "KV ratio", "prefill time [p10, p90]"]
    head += ["decode time [p10, p90]", "accuracy % [95 %]", "difference [paired 95 %]", "AR steps", "n"]
    return markdown(head, rows)


def _baseline_of(result: schema.Result, results: list[schema.Result]) -> schema.Result | None:
    """The result file this one was compared with; a baseline is compared with itself."""
    if result.baseline is None:
        return result
    for other in results:
        # Two tasks may be run side by side and start in the same second.
        same_run = (other.run.commit, other.run.started_at, other.task.name, other.task.preset) == (
            result.run.commit,
            result.run.started_at,
            result.task.name,
            result.task.preset,
        )
        if other.baseline is None and other.method.recipe == result.baseline.recipe and same_run:
            return other
    return None


def kinds_of_check(checked: str) -> str:
    """The kinds of check that a method's file names; how each was made stands there."""
    words = ("twin", "arithmetic", "traces", "score", "paper only")
    kinds = [word for word in words if re.search(rf"\b{word}\b", checked)]
    return ", ".join(kinds) or "-"


def _time_ratio(result: schema.Result, part: str) -> str:
    if result.baseline is None:
        return "1"
    if result.time is None or part not in result.time.ratio:
        return "n/a"
    return _spread(result.time.ratio[part])


def _spread(values: dict[str, Any], scale: float = 1, digits: int = 3) -> str:
    median, low, high = (f"{scale * values[name]:.{digits}f}" for name in ("median", "p10", "p90"))
    return f"{median} [{low}, {high}]"


def _difference(result: schema.Result) -> str:
    if result.baseline is None:
        return "-"
    low, high = result.baseline.ci95
    return f"{100 * result.baseline.diff:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def fill(text: str, results: Path, allow_dirty: bool = False) -> str:
    """A Markdown text with every table block filled from `results/NAME`.

    Raises:
        ConfigError: a block that is opened and never closed.
    """
    opened, closed = text.count("<!-- table:"), len(_BLOCK.findall(text))
    if opened != closed:
        raise ConfigError(
            f"{opened} table blocks are opened and {closed} are whole; write '<!-- table:NAME -->', a line break, and "
            "'<!-- /table -->'"
        )

    def filled(folder: Path, make: Callable[[Path, bool], str]) -> str:
        return make(folder, allow_dirty) if any(folder.glob("*.json")) else ""

    text = _BLOCK.sub(lambda found: found[1] + filled(results / found[2], table_of) + found[4], text)
    return _HEADLINE.sub(lambda found: found[1] + filled(results / HEADLINE_TABLE, headline) + found[3], text)


def main(
    file: Path,
    results: Annotated[Path, typer.Option(help="Folder of result folders.")] = Path("results"),
    check: Annotated[bool, typer.Option(help="Write nothing; exit 1 if the file is out of date.")] = False,
) -> None:
    """Fills the tables of a Markdown file from result files."""
    before = file.read_text()
    after = fill(before, results)
    if check and after != before:
        typer.echo(f"{file} is out of date; run: python -m mmroute.bench.table {file}", err=True)
        raise typer.Exit(1)
    if after != before:
        schema.write_text(file, after)


if __name__ == "__main__":
    typer.run(main)
