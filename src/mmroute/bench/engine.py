"""What the engine realises of the saving that the arithmetic promises: `python -m mmroute.bench.engine --out DIR`.

Stock and routed model interleaved in one process, case by case (`engine_cases.py`). Selection is random, so what is
timed is the engine. Rounds of several fresh processes on large pages are pooled, because how a process happens to lie
in memory moves the ratio by a tenth; every ratio is of two runs of one process. Peak memory has a fresh process per
configuration. Writes one `engine/1` file per case; ends with a card for people and one JSON line.
"""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

from mmroute import cost, hub
from mmroute.bench import engine_schema, schema
from mmroute.bench.engine_cases import CASES, Case, build, groups, prompt
from mmroute.bench.measure import (
    WALL,
    interleave,
    peak_memory_bytes,
    realised_saving,
    reset_peak_memory,
    spread,
)
from mmroute.engine.attach import Routed, attach

__all__ = ["Raw", "live_bytes", "measure_cases", "measure_peak", "result_of"]


def _attached(model: nn.Module, case: Case) -> Routed:
    if case.what == "train":
        rates = {"vision_keep": case.vision_keep, "text_keep": case.text_keep}
        flat = {"rates": "fixed", "vision_schedule": "flat", "first_layer": 0, "cutoff_layer": case.stack.layers}
        return attach(model, prune=hub.load("prune", "dare", **rates, **flat), executor=case.executor)
    pruner = hub.load("prune", "random", vision_keep=case.vision_keep, text_keep=case.text_keep)
    # Stripping padding forces the executor where nothing is pruned.
    return attach(model, prune=pruner, strip_padding=True)


class _Prefill:
    """Runs the base model on a prompt; keeps the last cache."""

    def __init__(self, model: Any, case: Case, device: str) -> None:
        self.model, self.batch = model.model, prompt(case, device)
        self.cache: Any = None

    def __call__(self) -> None:
        self.cache = None  # else two caches would be alive at once
        with torch.no_grad():
            self.cache = self.model(**self.batch, use_cache=True).past_key_values


class _Decode(_Prefill):
    """Runs one step after another on the cache of a prompt."""

    def __init__(self, model: Any, case: Case, device: str) -> None:
        super().__init__(model, case, device)
        super().__call__()
        self.mask, self.last = self.batch["attention_mask"], self.batch["position_ids"][..., -1:]
        self.token = self.batch["input_ids"][:, -1:]

    def __call__(self) -> None:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.last = self.last + 1
        with torch.no_grad():
            self.model(
                input_ids=self.token,
                attention_mask=self.mask,
                position_ids=self.last,
                past_key_values=self.cache,
                use_cache=True,
            )


class _Train(_Prefill):
    """A forward and a backward pass on a prompt; leaves no cache."""

    def __init__(self, model: Any, case: Case, device: str) -> None:
        super().__init__(model.train(), case, device)

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            self.model(**self.batch, use_cache=False).last_hidden_state.square().mean().backward()


_KINDS = {"prefill": _Prefill, "decode": _Decode, "train": _Train}


def live_bytes(cache: Any) -> int:
    """Bytes of the keys and values a cache holds, walked layer by layer; none without a cache."""
    if cache is None:
        return 0
    if hasattr(cache, "live_bytes"):
        return cache.live_bytes()
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


@dataclass
class Raw:
    """What one process measured of one case: seconds per counted round, and bytes."""

    time_s: list[float]
    stock_time_s: list[float]
    kv_bytes: int
    stock_kv_bytes: int
    kv_bytes_estimate: int


def measure_cases(cases: list[Case], rounds: int, warmup: int, device: str = "cpu") -> dict[str, Raw]:
    """Times cases that share stack, prompt and kind against the same stock model in the same rounds.

    Args:
        cases: all of one group, see `groups`.
        rounds: counted rounds.
        warmup: dropped rounds.
        device: of both models.
    """
    first = cases[0]
    kind = _KINDS[first.what]
    runs = {"": kind(build(first.stack, device), first, device)}
    for case in cases:
        runs[case.name] = kind(_attached(build(first.stack, device), case).model, case, device)
    timings = interleave(runs, rounds, warmup)
    steps = rounds + warmup if first.what == "decode" else 0
    return {
        case.name: Raw(
            time_s=timings.seconds[case.name]["total"],
            stock_time_s=timings.seconds[""]["total"],
            kv_bytes=live_bytes(runs[case.name].cache),
            stock_kv_bytes=live_bytes(runs[""].cache),
            kv_bytes_estimate=0 if case.what == "train" else cost.estimate_kv_bytes(case.planned(True, steps)),
        )
        for case in cases
    }


def result_of(
    case: Case,
    raws: list[Raw],
    run: schema.Run,
    device: str = "cpu",
    peak: int | None = None,
    stock_peak: int | None = None,
) -> engine_schema.EngineResult:
    """The result file's content of one case, from what one or several processes measured."""
    ours = [seconds for raw in raws for seconds in raw.time_s]
    theirs = [seconds for raw in raws for seconds in raw.stock_time_s]
    ratio, ideal = spread([a / b for a, b in zip(ours, theirs, strict=True)]), case.flop_ratio()
    goal = case.goal * ideal if case.over_ideal else case.goal
    if case.over_stock_us is not None:
        goal = 1 + case.over_stock_us * 1e-6 * case.stack.layers / spread(theirs).median
    return engine_schema.EngineResult(
        run=run,
        machine=schema.machine_here(device, "float32", "sdpa"),
        case=case.name,
        setting={**dataclasses.asdict(case), "lengths": list(case.lengths), "processes": len(raws)},
        time_s=dataclasses.asdict(spread(ours)),
        stock_time_s=dataclasses.asdict(spread(theirs)),
        ratio=dataclasses.asdict(ratio),
        flop_ratio=ideal,
        goal=goal,
        kv_bytes=raws[0].kv_bytes,
        kv_bytes_estimate=raws[0].kv_bytes_estimate,
        stock_kv_bytes=raws[0].stock_kv_bytes,
        realised_saving=realised_saving(ratio.median, ideal) if case.what != "decode" else None,
        peak_memory_bytes=peak,
        stock_peak_memory_bytes=stock_peak,
    )


def measure_peak(case: Case, side: Literal["routed", "stock"], device: str = "cpu") -> int:
    """Peak memory of the first run of a case in this process, over what was resident before it."""
    model = build(case.stack, device)
    if side == "routed":
        _attached(model, case)
    run = _Train if case.what == "train" else _Prefill
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(model, case, device)()
        return torch.cuda.max_memory_allocated(device) - before
    torch.set_num_threads(1)
    reset_peak_memory()
    before = peak_memory_bytes()
    run(model, case, device)()
    return peak_memory_bytes() - before


def _apart(*options: str) -> str:
    """The last line that this file, run in a fresh process, prints."""
    command = [sys.executable, "-m", "mmroute.bench.engine", *options]
    # Torch then asks for large pages. With small ones the ratio is a matter of where tensors happen to lie.
    env = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return done.stdout.splitlines()[-1]


def card(results: list[engine_schema.EngineResult]) -> str:
    """What a person wants to know of a run."""
    lines = [f"{'case':28} {'time':>6} {'p10':>6} {'p90':>6} {'FLOPs':>6} {'goal':>6}   KV of stock   peak MB (stock)"]
    for r in results:
        kv = f"{r.kv_bytes / r.stock_kv_bytes:.3f}" if r.stock_kv_bytes else "-"
        kv += "" if r.kv_bytes == r.kv_bytes_estimate else " (not as counted)"
        peak = "-" if r.peak_memory_bytes is None else f"{r.peak_memory_bytes / 1e6:.0f}"
        stock = "-" if r.stock_peak_memory_bytes is None else f"{r.stock_peak_memory_bytes / 1e6:.0f}"
        lines.append(
            f"{r.case:28} {r.ratio['median']:6.3f} {r.ratio['p10']:6.3f} {r.ratio['p90']:6.3f} {r.flop_ratio:6.3f} "
            f"{r.goal:6.3f}   {kv:11}   {peak} ({stock})   {'reached' if r.reached else 'MISSED'}"
        )
    return "\n".join(lines)


def main(
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path("results/engine"),
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds of prefill; decode gets ten times as many.")] = 9,
    warmup: Annotated[int, typer.Option(min=0)] = 2,
    processes: Annotated[
        int, typer.Option(min=0, help="Fresh processes per group of cases, their rounds pooled; 0 is this one.")
    ] = 3,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory, in fresh processes.")] = True,
    device: str = "cpu",
    group: Annotated[int, typer.Option(hidden=True)] = -1,
    peak: Annotated[str, typer.Option(hidden=True)] = "",
    side: Annotated[str, typer.Option(hidden=True)] = "routed",
) -> None:
    """Times the engine against the stock model."""
    if peak:
        case = next(c for c in CASES if c.name == peak)
        typer.echo(measure_peak(case, "stock" if side == "stock" else "routed", device))
        return
    if group >= 0:
        raws = measure_cases(groups(CASES)[group], rounds, warmup, device)
        typer.echo(json.dumps({name: dataclasses.asdict(raw) for name, raw in raws.items()}))
        return
    commit, dirty = schema.commit_of_source()
    began, start = datetime.now(UTC).isoformat(timespec="seconds"), WALL.read()
    command = f"python -m mmroute.bench.engine --rounds {rounds} --warmup {warmup} --processes {processes}"
    results: list[engine_schema.EngineResult] = []
    for number, cases in enumerate(groups(CASES)):
        measured: dict[str, list[Raw]] = {case.name: [] for case in cases}
        many = 10 if cases[0].what == "decode" else 1
        counts = rounds * many, warmup * many
        if processes == 0:
            for name, raw in measure_cases(cases, *counts, device).items():
                measured[name].append(raw)
        for _ in range(processes):
            options = ["--group", str(number), "--rounds", str(counts[0]), "--warmup", str(counts[1])]
            for name, fields in json.loads(_apart(*options, "--device", device)).items():
                measured[name].append(Raw(**fields))
        for case in cases:
            peaks: tuple[int | None, int | None] = (None, None)
            if memory:
                ours, stock = (
                    _apart("--peak", case.name, "--side", s, "--device", device) for s in ("routed", "stock")
                )
                peaks = int(ours), int(stock)
            run = schema.run_here(command, commit, dirty, began, WALL.read() - start)
            results.append(result_of(case, measured[case.name], run, device, *peaks))
            # A long run that is cut leaves what it has found.
            schema.write_result(out / f"{case.name.replace('.', '')}.json", results[-1])
            typer.echo(f"{case.name}: {results[-1].ratio['median']:.3f} of stock", err=True)
    typer.echo(card(results))
    line = {r.case: {"ratio": r.ratio["median"], "goal": r.goal, "reached": r.reached} for r in results}
    typer.echo(json.dumps(line))


if __name__ == "__main__":
    typer.run(main)
