"""Pictures of a bench, as SVG, from its lines alone: what accuracy costs, what layers keep, how KV grows over hops.

The same files give the same bytes: no date, no random ids.
"""

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmroute.bench import schema
from mmroute.bench.compare import Line, Sheet
from mmroute.errors import MissingExtra

__all__ = ["HEADLINE", "draw"]

HEADLINE = 0.4
"""Budget at which maps and curves over hops are drawn, or the nearest there is."""
_MAPS = 12
"""Methods in a picture of maps, at most; the cheapest ones of the headline budget."""


def draw(sheet: Sheet, folder: Path) -> list[Path]:
    """Writes the pictures of a bench beside its files.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    thinks = len({r.method.think for line in sheet.lines for r in line.results}) > 1
    with _style() as plt:
        made = {
            "accuracy-over-flops": _curves(plt, sheet, "FLOPs, of unrouted", lambda line: line.flops),
            "accuracy-over-kv": _curves(plt, sheet, "KV bytes at the end, of unrouted", lambda line: line.kv),
            "accuracy-over-steps": _curves(plt, sheet, "sequential steps of an answer", _steps) if thinks else None,
            "kv-over-hops": _hops(plt, sheet),
            **{f"keep-{name}": _maps(plt, sheet, name) for name in ("vision", "text", "kv")},
        }
        paths = []
        for name, figure in made.items():
            if figure is not None:
                paths.append(folder / f"{name}.svg")
                _write(figure, paths[-1], sheet)
        plt.close("all")
    return paths


@contextmanager
def _style() -> Iterator[Any]:
    try:
        import matplotlib
        from matplotlib import pyplot as plt
    except ImportError:
        raise MissingExtra("drawing a bench", "matplotlib", "bench") from None
    matplotlib.use("svg")
    with plt.rc_context({"svg.hashsalt": "mmroute", "font.size": 8, "axes.spines.top": False,
                         "axes.spines.right": False, "legend.frameon": False}):  # fmt: skip
        yield plt


def _write(figure: Any, path: Path, sheet: Sheet) -> None:
    text = io.StringIO()
    about = f"Made by mmroute from the {len(sheet.lines)} lines of results/{sheet.name}"
    figure.savefig(text, format="svg", metadata={"Date": None, "Description": about}, bbox_inches="tight")
    # matplotlib ends some lines with blanks, which a repository is better without.
    schema.write_text(path, "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def _panels(plt: Any, count: int, width: float = 4.2, height: float = 3.2) -> tuple[Any, list[Any]]:
    figure, axes = plt.subplots(1, count, figsize=(width * count, height), squeeze=False)
    return figure, list(axes[0])


def _methods(sheet: Sheet) -> list[str]:
    return sorted({line.row for line in sheet.lines} - {"none"})


def _colour(plt: Any, name: str, names: list[str]) -> Any:
    map_ = plt.get_cmap("tab20")
    return map_(names.index(name) % 20)


def _curves(plt: Any, sheet: Sheet, label: str, of: Callable[[Line], float | None]) -> Any:
    """Accuracy over a cost, a curve per method over its budgets; dashed where text is left out too."""
    if not any(of(line) is not None for line in sheet.lines):
        return None
    names = _methods(sheet)
    figure, panels = _panels(plt, len(sheet.tasks))
    for axis, task in zip(panels, sheet.tasks, strict=True):
        lines = [line for line in sheet.of(task) if of(line) is not None]
        for name in names:
            for whole in (True, False):
                own = [line for line in lines if line.row == name and (line.budget.text == 1) == whole]
                own.sort(key=lambda line: of(line) or 0.0)
                if not own:
                    continue
                x, y = [of(line) for line in own], [line.accuracy for line in own]
                spread = [
                    [line.accuracy - line.ci95[0] for line in own],
                    [line.ci95[1] - line.accuracy for line in own],
                ]
                axis.errorbar(
                    x, y, yerr=spread, color=_colour(plt, name, names), linestyle="-" if whole else "--",
                    marker="o" if whole else "s", markersize=3, linewidth=1, elinewidth=0.5,
                    label=name if whole or not any(o.row == name and o.budget.text == 1 for o in lines) else None,
                )  # fmt: skip
        for line in (line for line in lines if line.row == "none"):
            axis.axhspan(*line.ci95, color="0.9", zorder=0)
            axis.axhline(line.accuracy, color="0.5", linewidth=0.8, label="none")
        axis.set(title=task, xlabel=label, ylabel="accuracy", ylim=(0, 1.02))
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure


def _steps(line: Line) -> float:
    return line.ar_steps


def _headline(sheet: Sheet, task: str) -> list[Line]:
    """`none`, and each method at the budget nearest the headline's, at the lowest share of text it was run with."""
    lines = sheet.of(task)
    chosen = [line for line in lines if line.row == "none"]
    for name in _methods(sheet):
        own = [line for line in lines if line.row == name]
        if own:
            chosen.append(min(own, key=lambda line: (abs(line.budget.vision - HEADLINE), line.budget.text)))
    return chosen


def _hops(plt: Any, sheet: Sheet) -> Any:
    """KV bytes that live when each hop is over: the slope is the claim."""
    names = _methods(sheet)
    figure, panels = _panels(plt, len(sheet.tasks))
    drawn = False
    for axis, task in zip(panels, sheet.tasks, strict=True):
        for line in _headline(sheet, task):
            cost = line.cost
            many = [hop for hop, items in enumerate(cost.items_by_hop) if items >= max(1, line.results[0].task.n // 20)]
            if len(many) > 1:  # hops that few items reach are other items, not growth
                drawn = True
                kilobytes = [cost.kv_bytes_by_hop[hop] / 1e3 for hop in many]
                colour = "0.3" if line.row == "none" else _colour(plt, line.row, names)
                axis.plot(many, kilobytes, color=colour, marker="o", markersize=2, linewidth=1, label=line.row)
        axis.set(title=task, xlabel="hop", ylabel="live KV, kB")
        axis.set_ylim(bottom=0)
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
    return figure if drawn else None


def _maps(plt: Any, sheet: Sheet, name: str) -> Any:
    """Heat maps of a share, hop by layer: a row of panels per task, a panel per method."""
    lines = [
        [x for x in _headline(sheet, task) if x.row != "none" and _known(x.cost.keep_map.get(name, []))][:_MAPS]
        for task in sheet.tasks
    ]
    most = max(map(len, lines))
    if not most:
        return None
    size = (1.7 * most, 1.9 * len(sheet.tasks))
    figure, axes = plt.subplots(len(sheet.tasks), most, figsize=size, squeeze=False, layout="constrained")
    shown = None
    for row, task, own in zip(axes, sheet.tasks, lines, strict=True):
        for axis, line in zip(row, own, strict=False):
            values = [[float("nan") if v is None else v for v in hop] for hop in line.cost.keep_map[name]]
            shown = axis.imshow(values, vmin=0, vmax=1, aspect="auto", cmap="viridis")
            axis.set_title(f"{line.row}\n{task}", fontsize=6)
            axis.set(xlabel="layer", ylabel="hop")
        for axis in row[len(own) :]:
            axis.set_axis_off()
    label = "share cached after the hop" if name == "kv" else f"share of {name} that ran"
    figure.colorbar(shown, ax=axes, label=label, fraction=0.02)
    return figure


def _known(rows: list[list[float | None]]) -> bool:
    return any(value is not None for row in rows for value in row)
