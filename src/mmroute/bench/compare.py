"""Lines of a bench's table from its result files alone: seeds pooled, differences paired on the same items.

Every committed result says which items it had right, what it answered, and which file is its control, so nothing is run
again to compare.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean

from mmroute.bench import schema, stats
from mmroute.errors import InputError

__all__ = ["Line", "Sheet", "read_sheet"]

_RESAMPLES = 4_000


@dataclass(frozen=True)
class Line:
    """A method at a budget on a task."""

    task: str
    row: str
    budget: schema.Budget
    results: list[schema.Result]
    """One per seed."""
    accuracy: float
    ci95: tuple[float, float]
    exact: float | None
    """Share of chains that are right word for word."""
    forced: float | None
    """Share of answers that are right behind the right chain."""
    flops: float | None
    """Ratio to `none`, of whole answers; None without `none`."""
    kv: float | None
    """The same of KV bytes at the end of the answer."""
    to_none: stats.Difference | None
    to_random: stats.Difference | None
    """Difference to random positions at the same counts."""
    loyalty: float | None
    """Share of items that are answered as `none` answers them."""

    @property
    def n(self) -> int:
        return sum(result.task.n for result in self.results)

    @property
    def cost(self) -> schema.Cost:
        """Of the first seed: what maps and curves over hops show."""
        return self.results[0].cost

    @property
    def ar_steps(self) -> float:
        """Sequential steps of an answer: latents and generated tokens."""
        return mean(result.cost.ar_steps for result in self.results)

    def share(self, modality: str) -> float:
        """Realised share of a modality's given positions that ran, over layers."""
        return mean(result.cost.keep[modality] for result in self.results)


@dataclass(frozen=True)
class Sheet:
    """A bench folder."""

    name: str
    lines: list[Line]
    infeasible: list[schema.Infeasible]
    left_out: int
    """Files of other weights or another number of items than the newest one's."""

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(line.task for line in self.lines))

    def of(self, task: str) -> list[Line]:
        return [line for line in self.lines if line.task == task]

    @property
    def dirty(self) -> bool:
        """Whether some file was made from source that was not committed."""
        return any(result.run.dirty for line in self.lines for result in line.results)


def read_sheet(folder: Path) -> Sheet:
    """All result files of a bench folder, compared.

    Raises:
        InputError: there are none.
    """
    files = {path.name: path for path in sorted(folder.glob("*.json"))}
    kinds = {name: schema.kind_of(path) for name, path in files.items()}
    results = {name: schema.read_result(files[name]) for name, kind in kinds.items() if kind == "result/1"}
    if not results:
        raise InputError(f"{folder}: no result files; run the bench that fills it")
    newest = max(results.values(), key=lambda r: r.run.started_at)
    kept = {name: r for name, r in results.items() if _set_of(r) == _set_of(newest)}
    grouped: dict[tuple[str, str, float, float], list[schema.Result]] = defaultdict(list)
    for r in kept.values():
        budget = r.method.budget
        if budget is not None and not r.method.row.startswith("random@"):
            grouped[_task_of(r), r.method.row, budget.text, budget.vision].append(r)
    none = {(_task_of(r), r.task.ids_sha256): r for r in kept.values() if r.method.row == "none"}
    lines = [_line(sorted(same, key=lambda r: r.task.seed), none, kept) for same in grouped.values()]
    # From whole to little; ties by name.
    lines.sort(key=lambda x: (x.task, -x.budget.text, -x.budget.vision, x.row != "none", x.row))
    told = [schema.read_infeasible(files[name]) for name, kind in kinds.items() if kind == "infeasible/1"]
    met = {(line.row, line.budget) for line in lines}
    infeasible = [row for row in told if row.layers == newest.model.layers and (row.row, row.budget) not in met]
    return Sheet(folder.name, lines, infeasible, len(results) - len(kept))


def _set_of(result: schema.Result) -> tuple[str, str, int]:
    return result.model.id, result.model.weights_sha256, result.task.n


def _task_of(result: schema.Result) -> str:
    name = f"{result.task.name}:{result.task.preset}" if result.task.preset else result.task.name
    return name if result.task.hop_images == "none" else f"{name} ({result.task.hop_images}, {result.task.context})"


def _line(
    results: list[schema.Result],
    none: dict[tuple[str, str], schema.Result],
    files: dict[str, schema.Result],
) -> Line:
    first = results[0]
    bases = [none.get((_task_of(r), r.task.ids_sha256)) for r in results]
    controls = [files.get(r.method.control) for r in results]
    pairs = [(r, base) for r, base in zip(results, bases, strict=True) if base is not None]
    correct = "".join(r.quality.correct for r in results)
    assert first.method.budget is not None
    return Line(
        task=_task_of(first),
        row=first.method.row,
        budget=first.method.budget,
        results=results,
        accuracy=correct.count("1") / len(correct),
        ci95=stats.wilson(correct.count("1"), len(correct)),
        exact=_share([r.quality.exact for r in results]),
        forced=_share([r.quality.forced for r in results]),
        flops=_ratio([(r.cost.flops_answer, base.cost.flops_answer) for r, base in pairs]),
        kv=_ratio([(r.cost.kv_bytes_end, base.cost.kv_bytes_end) for r, base in pairs]),
        to_none=None if first.method.row == "none" else _paired(results, bases),
        to_random=_paired(results, controls),
        loyalty=_loyalty(pairs),
    )


def _share(flags: Sequence[str]) -> float | None:
    text = "".join(flags)
    return text.count("1") / len(text) if all(flags) else None


def _ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None


def _paired(ours: Sequence[schema.Result], theirs: Sequence[schema.Result | None]) -> stats.Difference | None:
    """Over all seeds that both have, groups of items drawn whole."""
    a: list[float] = []
    b: list[float] = []
    groups: list[int] = []
    for one, other in zip(ours, theirs, strict=True):
        if other is None or one.task.ids_sha256 != other.task.ids_sha256:
            continue
        a += [float(c) for c in one.quality.correct]
        b += [float(c) for c in other.quality.correct]
        for size in map(int, one.task.groups.split(",")):
            groups += [groups[-1] + 1 if groups else 0] * size
    return stats.paired_bootstrap(a, b, groups=groups, resamples=_RESAMPLES) if a else None


def _loyalty(pairs: Sequence[tuple[schema.Result, schema.Result]]) -> float | None:
    same = [
        ours == theirs != "-"
        for r, base in pairs
        for ours, theirs in zip(r.quality.predicted, base.quality.predicted, strict=True)
    ]
    return mean(same) if same else None
