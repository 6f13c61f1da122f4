"""`mmroute demo`: the bundled model looks at pictures, reasons in hops and answers, unrouted and routed, measured.

Where the package holds a pair and its rater, also who of the two answers, decided before either does.

No network. Writes `demo.json` (every figure with its settings) and `demo.html` (one self-contained page).
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmroute import hub, page, recipe
from mmroute.backbones.images import prepare
from mmroute.backbones.load import load
from mmroute.bench.gate_pair import absent, evaluate, open_pair
from mmroute.bench.gate_schema import GateSummary
from mmroute.bench.measure import Spread, interleave, measure_generation
from mmroute.bench.stats import wilson
from mmroute.cost import estimate_flops, estimate_kv_bytes, keep_shares
from mmroute.files import write_text
from mmroute.page.story import tell
from mmroute.reason import Answer
from mmroute.tasks.base import Generated, Sample
from mmroute.train.prp_config import sections

__all__ = ["RECIPES", "TASKS", "Row", "example", "gate", "run", "write"]

TASKS = ("maze", "frozenlake")
RECIPES = ("none", "schedule", "dare-l", "dare-lh")
GATE = "prp-small"
ROUNDS, WARMUP = 7, 2
FORCED_TOKENS = 24
TIMED_QUESTIONS = 4


@dataclass(frozen=True)
class Item:
    """One question of the demo."""

    task: Generated
    sample: Sample

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.task.messages(self.sample, "cot")


@dataclass(frozen=True)
class Row:
    """One line of the table; ratios are to `none`, on the same items."""

    recipe: str
    batch: int
    n: int
    correct: int
    ci95: tuple[float, float]
    same_as_alone: int
    """Answers equal, token by token, to the answer given alone."""
    flops_ratio: float
    kv_ratio: float
    prefill_ratio: Spread
    decode_ratio: Spread
    keep: dict[str, float]

    @property
    def accuracy(self) -> float:
        return self.correct / self.n


def run(
    n: int = 60,
    batch: int = 15,
    model: str = "tiny",
    say: Callable[[str], None] = lambda _: None,
    recipes: Sequence[str] = RECIPES,
) -> tuple[list[Row], list[page.View]]:
    """Answers `n` held-out items under each recipe, alone and in batches, and times both.

    Args:
        n: items, half mazes and half lakes.
        batch: rows of a batch.
        model: bundled name, folder or hub id.
        say: told what is going on.
        recipes: `none` first, which the others are compared with.
    """
    tasks = [hub.load("tasks", name) for name in TASKS]
    items = [Item(t, s) for t in tasks for s in t.samples("test", n // len(tasks))]
    loaded = {name: load(model) for name in recipes}  # a copy each: timed in turn, each as it is
    answers: dict[tuple[str, int], list[Answer]] = {}
    views = []
    for name in reversed(recipes):  # the routed example comes first on the page
        say(f"{name}: {len(items)} items, one by one and in batches of {batch}")
        with recipe.equip(loaded[name], recipe.read(name)) as (routed, think):
            for size in (1, batch):
                answers[name, size] = [
                    answer
                    for at in range(0, len(items), size)
                    for answer in routed.answer_many([i.messages for i in items[at : at + size]], think=think)
                ]
            views += [_view(routed, think, name, item) for item in _shown(items)]
    say("timing: prefill and decode, all recipes in turn")
    times = {size: _times(loaded, items, size) for size in (1, batch)}
    rows = [_row(name, size, items, answers, times[size]) for size in (1, batch) for name in recipes]
    return rows, views


def gate(n: int = 60, say: Callable[[str], None] = lambda _: None, name: str = GATE) -> GateSummary | None:
    """The pair of a recipe under its rater and its policy; None, and one line of why, where the pair is not there.

    Args:
        n: held-out questions of the recipe's mixture.
        say: told what is going on.
        name: recipe with a gate.
    """
    chosen = recipe.read(name)
    gated, _ = sections(chosen)
    missing = absent(gated)
    if missing:
        say(f"no rows of the gate: {', '.join(missing)} not bundled; `mmroute train prp --help` says how to make them")
        return None
    say(f"{name}: {n} questions to draft and target, and who of them answers")
    return evaluate(chosen, *open_pair(gated), n=n, seed=0, num_timed=TIMED_QUESTIONS)


def example(model: str = "tiny", name: str = "schedule", n: int = 30) -> page.View:
    """The demo's longest maze under one recipe."""
    task = hub.load("tasks", TASKS[0])
    item = max((Item(task, s) for s in task.samples("test", n)), key=lambda i: len(i.sample.hops))
    with recipe.equip(model, recipe.read(name)) as (routed, think):
        return _view(routed, think, name, item)


def _shown(items: Sequence[Item]) -> list[Item]:
    """The longest reasoning of each task."""
    return [max((i for i in items if i.task.name == name), key=lambda i: len(i.sample.hops)) for name in TASKS]


def _row(
    name: str,
    size: int,
    items: Sequence[Item],
    answers: dict[tuple[str, int], list[Answer]],
    times: Any,
) -> Row:
    own, stock, alone = answers[name, size], answers["none", size], answers[name, 1]
    correct = sum(
        item.task.score(item.sample, answer.text).correct == 1 for item, answer in zip(items, own, strict=True)
    )
    shares = [keep_shares(a.trace) for a in own]
    return Row(
        recipe=name,
        batch=size,
        n=len(items),
        correct=correct,
        ci95=wilson(correct, len(items)),
        same_as_alone=sum(a.ids == b.ids for a, b in zip(own, alone, strict=True)),
        flops_ratio=sum(estimate_flops(a.trace).total for a in own) / sum(estimate_flops(a.trace).total for a in stock),
        kv_ratio=sum(estimate_kv_bytes(a.trace) for a in own) / sum(estimate_kv_bytes(a.trace) for a in stock),
        prefill_ratio=times.ratio(name, "none", "prefill"),
        decode_ratio=times.ratio(name, "none", "decode"),
        keep={m: statistics.mean(s[m] for s in shares) for m in ("vision", "text")},
    )


def _times(loaded: dict[str, Any], items: Sequence[Item], size: int) -> Any:
    """Prefill and decode of the same items under each recipe, interleaved; `none` is the stock model itself."""
    chosen = _shown(items)[:1] if size == 1 else list(items[:size])
    cases: dict[str, Callable[[], dict[str, float]]] = {}
    with ExitStack() as stack:
        for name, model in loaded.items():
            routed, _ = stack.enter_context(recipe.equip(model, recipe.read(name)))
            batch = prepare(routed.model, routed.processor, [i.messages for i in chosen])
            batch["position_ids"] = routed.family.positions(
                routed.model, batch["input_ids"], batch["attention_mask"], batch.get("image_grid_thw")
            )
            cases[name] = partial(_seconds, routed.model, batch)
        return interleave(cases, rounds=ROUNDS, warmup=WARMUP)


def _seconds(model: Any, batch: dict[str, Any]) -> dict[str, float]:
    return measure_generation(model, batch, FORCED_TOKENS, tower=model.model.visual).parts


def _view(routed: Any, think: Any, name: str, item: Item) -> page.View:
    routed.full_trace = True
    answer = routed.answer_many([item.messages], think=think)[0]
    routed.full_trace = False
    spare = item.sample.meta["relevant"]
    trace = tell(
        routed,
        item.messages,
        answer,
        title=item.task.name,
        recipe=name,
        gold=item.sample.answer_text.removeprefix("answer: "),
        relevant=[spare["start"], *(hop.relevant for hop in item.sample.hops), spare["answer"]],
    )
    return page.view(trace)


def write(
    rows: Sequence[Row], views: Sequence[page.View], folder: Path, more: Mapping[str, Any] | None = None
) -> tuple[Path, Path]:
    """Writes `demo.json` and `demo.html` beside their names and renames them.

    Args:
        rows: of the table.
        views: of the page.
        folder: of both files.
        more: further tables of `demo.json`, by key.
    """
    data = {
        "schema": "demo/1",
        "tasks": TASKS,
        "rounds": ROUNDS,
        "forced_tokens": FORCED_TOKENS,
        "rows": [{**asdict(row), "accuracy": row.accuracy} for row in rows],
        "recipes": {row.recipe: asdict(recipe.read(row.recipe)) for row in rows},
        **(more or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "demo.json", folder / "demo.html"
    for path, text in zip(paths, (json.dumps(data, indent=1), page.render(views)), strict=True):
        write_text(path, text)
    return paths
