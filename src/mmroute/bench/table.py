"""Markdown tables from result files only: `python -m mmroute.bench.table README.md [--check]`.

Fills every block `<!-- table:NAME -->` ... `<!-- /table -->` of a Markdown file from `results/NAME/*.json`, and the
block `<!-- headline -->` ... `<!-- /headline -->` from the files of the table `spatial`. A number that no committed
file holds cannot stand in such a block, a block without files stays empty, and `--check` says when one is out of date.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import typer

from mmroute.bench import engine_schema, schema
from mmroute.errors import ConfigError, InputError

__all__ = ["drawn_table", "engine_table", "fill", "headline", "kinds_of_check", "markdown", "result_table", "table_of"]

_BLOCK = re.compile(r"(<!-- table:([\w./-]+) -->\n)(.*?)(<!-- /table -->)", re.DOTALL)
_HEADLINE = re.compile(r"(<!-- headline -->\n)(.*?)(<!-- /headline -->)", re.DOTALL)
_UNCOMMITTED = "made from source that was not committed; commit, then run again"
HEADLINE_TABLE, HEADLINE_RECIPE = "spatial", "dare-lh"


def table_of(folder: Path, allow_dirty: bool = False) -> str:
    """The table of all result files in a folder, in Markdown.

    Raises:
        InputError: no result files, files of two kinds, or one whose source was not committed.
    """
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise InputError(f"{folder}: no result files; run the benchmark that fills it")
    kinds = {schema.kind_of(path) for path in paths}
    if kinds == {"engine/1"}:
        engine = [engine_schema.read_engine(path) for path in paths]
        _refuse_dirty(paths, engine, allow_dirty)
        return engine_table(engine)
    if kinds == {"result/1"}:
        return result_table(_read_results(paths, allow_dirty))
    if kinds == {"lmms/2"}:
        from mmroute.bench import lmms_schema  # it writes its table with this module

        runs = [lmms_schema.read_lmms(path) for path in paths]
        _refuse_dirty(paths, runs, allow_dirty)
        return lmms_schema.lmms_table(runs)
    if kinds in ({"gate/1"}, {"gate-eval/1"}, {"gateway/1"}):
        return _sections(paths, kinds.pop(), allow_dirty)
    if kinds == {"drawn/1"}:
        return drawn_table([schema.read_plain(path) for path in paths], allow_dirty)
    raise InputError(f"{folder}: files of {' and '.join(sorted(kinds))}; keep one kind in a folder")


def _sections(paths: list[Path], kind: str, allow_dirty: bool) -> str:
    """What results of gates and of the gateway say."""
    from mmroute.bench import gate_report, gate_schema, gateway_report  # they write their tables with this module

    texts: list[list[str]]
    if kind == "gate/1":
        gates = [gate_schema.read_gate(path) for path in paths]
        _refuse_dirty(paths, gates, allow_dirty)
        texts = [gate_report.section(each) for each in gates]
    elif kind == "gate-eval/1":
        evals = [gate_schema.read_gate_eval(path) for path in paths]
        _refuse_dirty(paths, evals, allow_dirty)
        texts = [gate_report.evaluations(evals)]
    else:
        runs = [gate_schema.read_gateway(path) for path in paths]
        _refuse_dirty(paths, runs, allow_dirty)
        texts = [gateway_report.section(each) for each in runs]
    return "\n\n".join("\n".join(lines) for lines in texts) + "\n"


def drawn_table(runs: list[dict[str, Any]], allow_dirty: bool = False) -> str:
    """What the pictures of drawn thoughts are worth, one line per recipe and task.

    Raises:
        InputError: one whose source was not committed.
    """
    if any(run["dirty"] for run in runs) and not allow_dirty:
        raise InputError(f"{', '.join(run['recipe'] for run in runs if run['dirty'])}: {_UNCOMMITTED}")
    rows = []
    for run in sorted(runs, key=lambda run: (run["prune"] is not None, run["recipe"])):
        for task, found in run["tasks"].items():
            rows.append(
                [
                    f"{task}:{run['preset']}",
                    run["recipe"],
                    " / ".join(f"{found['keep'][name]:.3f}" for name in ("vision", "text")),
                    _percent(found["drawn_right"], found["drawn_right_ci95"]),
                    *(f"{found[name]:.3f}" for name in ("v_acc", "v_red", "v_ratio")),
                    _percent(found["accuracy"], found["ci95"]),
                    str(found["n"]),
                ]
            )
    head = ["task", "recipe", "keep vision / text", "items drawn without a fault % [95 %]", "v_acc", "v_red", "v_ratio"]
    return markdown([*head, "accuracy % [95 %]", "n"], rows)


def _percent(share: float, bounds: Sequence[float]) -> str:
    return f"{100 * share:.1f} [{100 * bounds[0]:.1f}, {100 * bounds[1]:.1f}]"


def _read_results(paths: list[Path], allow_dirty: bool) -> list[schema.Result]:
    results = [schema.read_result(path) for path in paths]
    _refuse_dirty(paths, results, allow_dirty)
    return results


def headline(folder: Path, allow_dirty: bool = False) -> str:
    """The one sentence on top: what DARE-LH saves on all tasks of a folder, and what it costs; or ""."""
    results = _read_results(sorted(folder.glob("*.json")), allow_dirty)
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


def _refuse_dirty(paths: list[Path], results: Sequence[Any], allow: bool) -> None:
    dirty = [path.name for path, result in zip(paths, results, strict=True) if result.run.dirty]
    if dirty and not allow:
        raise InputError(f"{', '.join(dirty)}: {_UNCOMMITTED}")


def engine_table(results: list[engine_schema.EngineResult]) -> str:
    """Time against arithmetic, one line per case."""
    rows = [
        [
            r.case,
            f"{r.ratio['median']:.3f} [{r.ratio['p10']:.3f}, {r.ratio['p90']:.3f}]",
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
    ratio = result.time.ratio[part]
    return f"{ratio['median']:.3f} [{ratio['p10']:.3f}, {ratio['p90']:.3f}]"


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
