"""What routing is worth on a GPU, at the sizes of Qwen2.5-VL: `python -m mmroute.bench.gpu --out results/gpu`.

Text stacks of the 3B and the 7B model with random bfloat16 weights (a small vocabulary; no tower, no language-model
head). A context enters in four hops, each an image among text, and some tokens are generated after it. Stock and routed
take turns in one process on the same weights; selection is random, so what is timed is the engine. Rounds are as many
as the time allows, so a result says how many it has. Writes one `gpu/1` file per case and keep rate; ends with a card
for people and one JSON line.

Footgun: from the second hop on, the stock model builds a mask over all its cached keys, repeats them for its grouped
heads and loses the flash kernel, and the engine does not. So the ratio at keep 1 may be below 1; `one_call` compares
with the stock model at its best, the whole context in one call, which no conversation of several hops can have.

Legend: B batch, N positions of the context.
"""

import copy
import dataclasses
import gc
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from mmroute import cost, hub
from mmroute.bench import engine_schema, schema
from mmroute.bench.engine import live_bytes
from mmroute.bench.engine_cases import IMAGE, Stack, build
from mmroute.bench.measure import WALL, Timings, clock_of, interleave, realised_saving
from mmroute.cache import RaggedCache
from mmroute.engine.attach import attach
from mmroute.trace import Call, LayerCall, Shape, Trace

__all__ = ["SIZES", "Case", "card", "cases", "measure", "results_of"]

SIZES = {
    "3b": Stack(layers=36, hidden=2048, mlp=11008, heads=16, kv_heads=2),
    "7b": Stack(layers=28, hidden=3584, mlp=18944, heads=28, kv_heads=4),
}
KEEPS = {"keep-1-1": (1.0, 1.0), "keep-4-7": (0.4, 0.7)}
"""Vision and text keep rates, in every layer."""
STOCK, ONE_CALL = "stock", "one-call"
LARGE = 2**17
"""Positions of a batch above which only the stock model and the main keep rate run: one round takes half a minute."""
MOST_ROUNDS, LEAST_ROUNDS = 20, 5
"""Counted rounds of a case; the lower bound holds where a round takes less than a second."""


@dataclass(frozen=True)
class Case:
    """One model size, context and batch."""

    size: str
    stack: Stack
    context: int
    """Positions of a row, a multiple of `hops`."""
    batch: int
    hops: int = 4
    steps: int = 8
    """Positions generated after the context."""
    itemsize: int = 2

    @property
    def name(self) -> str:
        return f"{self.size}-{self.context}-batch-{self.batch}"

    @property
    def is_large(self) -> bool:
        return self.context * self.batch > LARGE

    @property
    def shape(self) -> Shape:
        return dataclasses.replace(self.stack.shape, itemsize=self.itemsize)

    @property
    def hop(self) -> tuple[int, int]:
        """Text and vision positions of each hop."""
        whole = self.context // self.hops
        vision = whole * 784 // 1024
        return whole - vision, vision

    def planned(self, vision_keep: float, text_keep: float) -> Trace:
        """The trace that the context and the steps after it leave."""
        # Footgun: 0.07 * 100 is 7.000000000000001, and ceil would keep one position too many.
        ran = [math.ceil(n * keep - 1e-6) for n, keep in zip(self.hop, (text_keep, vision_keep), strict=True)]
        entering = [("prefill", [*self.hop, 0], [*ran, 0])] * self.hops + [
            ("decode", [1, 0, 0], [1, 0, 0])
        ] * self.steps
        trace, stored, seen = Trace(self.shape), 0, 0
        for kind, new, runs in entering:
            before, stored = stored, stored + sum(runs)
            layer = LayerCall([runs] * self.batch, [before] * self.batch, [stored] * self.batch)
            call = Call(kind, [0] * self.batch, [new] * self.batch, [layer] * self.stack.layers, seen)  # type: ignore[arg-type]
            trace.calls.append(call)
            seen += sum(new)
        return trace

    def flops(self, vision_keep: float = 1.0, text_keep: float = 1.0) -> cost.Flops:
        """Of prefill and steps; padding, mask and language-model head apart."""
        return cost.estimate_flops(self.planned(vision_keep, text_keep))


def cases(sizes: dict[str, Stack], contexts: Sequence[int], batches: Sequence[int]) -> list[Case]:
    """All of them, one size after the other, small before large; those that take longest last."""
    every = [Case(size, stack, n, b) for size, stack in sizes.items() for n in contexts for b in batches]
    # The large ones in reverse order of size, so that the last model built serves its large case at once.
    return [c for c in every if not c.is_large] + [c for c in reversed(every) if c.is_large]


class _Session:
    """Enters the hops of a case and generates after them; remembers what the cache held and the peak of memory."""

    def __init__(self, model: Any, case: Case, device: str, one_call: bool = False) -> None:
        self.model, self.case, self.clock = model, case, clock_of(device)
        self.hops, self.steps = (1, 0) if one_call else (case.hops, case.steps)
        self.ids = _ids(case, device)
        self.mask = torch.ones(case.batch, case.context + case.steps, dtype=torch.long, device=device)
        self.positions = torch.arange(case.context + case.steps, device=device).expand(3, case.batch, -1)
        self.kv_bytes = 0
        self.peak: int | None = None

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        cuda = self.ids.is_cuda
        before = torch.cuda.memory_allocated(self.ids.device) if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.ids.device)
        start, cache, width = self.clock.read(), None, self.case.context // self.hops
        for hop in range(self.hops):
            if isinstance(cache, RaggedCache):
                cache.start_hop(hop)
            cache = self._enter(self.ids[:, hop * width : (hop + 1) * width], hop * width, cache)
        prefilled = self.clock.read()
        self.kv_bytes = live_bytes(cache)
        decoding = self.clock.read()
        for step in range(self.steps):
            cache = self._enter(self.ids[:, :1], self.case.context + step, cache)
        decoded = self.clock.read()
        if cuda:
            self.peak = torch.cuda.max_memory_allocated(self.ids.device) - before
        parts = {"prefill": prefilled - start}
        return parts | ({"decode": (decoded - decoding) / self.steps} if self.steps else {})

    def _enter(self, ids: Tensor, at: int, cache: Any) -> Any:
        end = at + ids.shape[1]
        return self.model.model(
            input_ids=ids,
            attention_mask=self.mask[:, :end],
            position_ids=self.positions[..., at:end],
            past_key_values=cache,
            use_cache=True,
        ).past_key_values


def _ids(case: Case, device: str) -> Tensor:
    """(B, N): in each hop a few words, an image's placeholders, the rest of the text."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(IMAGE + 100, case.stack.vocab, (case.batch, case.hops, sum(case.hop)), generator=generator)
    before = min(10, case.hop[0] // 2)
    ids[..., before : before + case.hop[1]] = IMAGE
    return ids.flatten(1).to(device)


def _twin(model: Any) -> Any:
    """Another model of the same weights, in the same memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


@dataclass
class Measured:
    """What one case gave."""

    runs: dict[str, _Session]
    timings: Timings
    warmed: bool
    """False where the time was spent with the first round, which then counts."""
    round_s: float
    """Wall time of a round."""


def sessions(model: Any, case: Case, device: str) -> dict[str, _Session]:
    """What takes turns in a case: the stock model, and routed ones on its weights."""
    runs = {STOCK: _Session(model, case, device)}
    if not case.is_large:
        runs[ONE_CALL] = _Session(model, case, device, one_call=True)
    for name, (vision, text) in KEEPS.items():
        if not case.is_large or name == "keep-4-7":
            prune = hub.load("prune", "random", vision_keep=vision, text_keep=text)
            # Stripping padding forces the executor where nothing is pruned.
            runs[name] = _Session(attach(_twin(model), prune=prune, strip_padding=True).model, case, device)
    return runs


def measure(model: Any, case: Case, seconds: float, device: str) -> Measured:
    """Rounds of one case on one stock model, as many as fit the time, after one that warms up.

    Args:
        model: stock; its routed twins share its weights.
        case: what to enter.
        seconds: wall time to spend; the first round runs whatever it takes.
        device: of the model.
    """
    runs, clock, start = sessions(model, case, device), clock_of(device), WALL.read()
    first = interleave(runs, rounds=1, warmup=0, clock=clock)
    took = WALL.read() - start
    rounds = min(MOST_ROUNDS, max(int((seconds - took) / took), LEAST_ROUNDS if took < 1 else 0))
    if rounds < 1:
        return Measured(runs, first, False, took)
    return Measured(runs, interleave(runs, rounds, warmup=0, clock=clock), True, took)


def results_of(
    case: Case, measured: Measured, run: schema.Run, machine: schema.Machine
) -> list[engine_schema.GpuResult]:
    """The result files' content of one case, a file per keep rate."""
    runs, timings, stock = measured.runs, measured.timings, measured.runs[STOCK]
    full, found = case.flops(), []
    notes = [f"random weights; vocabulary of {case.stack.vocab}; no vision tower, no language-model head"]
    if not measured.warmed:
        notes.append("one round and no warm-up: it spent the time")
    if case.is_large:
        notes.append("not compared with one call, and keep 1 not run: too large for the time")
    for name, (vision, text) in KEEPS.items():
        if name not in runs:
            continue
        session, flops = runs[name], case.flops(vision, text)
        prefill, decode = (_timed(timings, name, part) for part in ("prefill", "decode"))
        one_call = _numbers(timings.ratio(name, ONE_CALL, "prefill")) if ONE_CALL in runs else None
        promised = flops.prefill / full.prefill
        found.append(
            engine_schema.GpuResult(
                run=run,
                machine=machine,
                case=f"{case.name}-{name}",
                setting={**dataclasses.asdict(case), "vision_keep": vision, "text_keep": text},
                prefill=prefill,
                decode=decode,
                one_call_ratio=one_call,
                prefill_flop_ratio=promised,
                decode_flop_ratio=flops.decode / full.decode,
                realised_saving=realised_saving(prefill.ratio["median"], promised),
                kv_bytes=session.kv_bytes,
                kv_bytes_estimate=cost.estimate_kv_bytes(case.planned(vision, text), at="prefill"),
                stock_kv_bytes=stock.kv_bytes,
                peak_memory_bytes=session.peak,
                stock_peak_memory_bytes=stock.peak,
                notes=notes,
            )
        )
    return found


def _timed(timings: Timings, name: str, part: str) -> engine_schema.Timed:
    return engine_schema.Timed(
        time_s=_numbers(timings.spread(name, part)),
        stock_time_s=_numbers(timings.spread(STOCK, part)),
        ratio=_numbers(timings.ratio(name, STOCK, part)),
    )


def _numbers(spread: Any) -> dict[str, float]:
    return dataclasses.asdict(spread)


def card(results: list[engine_schema.GpuResult]) -> str:
    """What a person wants to know of a run."""
    head = f"{'case':28} {'rounds':>6} {'prefill':>15} {'FLOPs':>6} {'of one call':>11} {'decode':>15}"
    lines = [head + "   KV of stock   peak GB (stock)"]
    for r in results:
        prefill, decode = (
            f"{t.ratio['median']:.3f} {t.ratio['p10']:.2f}-{t.ratio['p90']:.2f}" for t in (r.prefill, r.decode)
        )
        one = "-" if r.one_call_ratio is None else f"{r.one_call_ratio['median']:.3f}"
        kv = f"{r.kv_bytes / r.stock_kv_bytes:.3f}" + ("" if r.kv_bytes == r.kv_bytes_estimate else " (not as counted)")
        peak, stock = ("-" if n is None else f"{n / 1e9:.2f}" for n in (r.peak_memory_bytes, r.stock_peak_memory_bytes))
        lines.append(
            f"{r.case:28} {r.prefill.ratio['n']:6.0f} {prefill:>15} {r.prefill_flop_ratio:6.3f} {one:>11} {decode:>15}"
            f"   {kv:11}   {peak} ({stock})"
        )
    return "\n".join(lines)


def _run(
    planned: list[Case], seconds: float, device: str, dtype: torch.dtype
) -> Iterator[tuple[Case, Measured | None, str]]:
    """Cases in turn, with what was measured or why nothing was."""
    deadline, rate, model, built = WALL.read() + seconds, 0.0, None, ""
    measured: Measured | None = None
    for number, case in enumerate(planned):
        spent = sum(case.flops(*KEEPS.get(name, ())).prefill for name in _names(case))
        left = deadline - WALL.read()
        if rate and spent / rate > left:
            yield case, None, f"would take about {spent / rate:.0f} s of the {left:.0f} s left; raise --seconds"
            continue
        if built != case.size:
            model = measured = None
            _free(device)  # the memory of the size before
            model, built = build(case.stack, device, dtype), case.size
            _Session(model, dataclasses.replace(case, context=16 * case.hops, batch=1), device)()  # loads the kernels
        weights = [c.flops().prefill ** 0.5 for c in planned[number:]]
        try:
            measured = measure(model, case, (deadline - WALL.read()) * weights[0] / sum(weights), device)
        except torch.OutOfMemoryError:
            yield case, None, "does not fit the device's memory"
        else:
            rate = max(rate, spent / measured.round_s)  # small cases wait for launches: the best rate is the true one
            yield case, measured, ""
        _free(device)


def _free(device: str) -> None:
    gc.collect()  # attached models refer to themselves
    if device != "cpu":
        torch.cuda.empty_cache()


def _names(case: Case) -> list[str]:
    return [STOCK, "keep-4-7"] if case.is_large else [STOCK, ONE_CALL, *KEEPS]


def main(
    out: Annotated[Path, typer.Option(help="Folder of the result files.")] = Path("results/gpu"),
    seconds: Annotated[float, typer.Option(min=1, help="Wall time of all cases together, about.")] = 120,
    quick: Annotated[bool, typer.Option(help="The 3B sizes at 2k and 8k, batch 1, in a third of the time.")] = False,
    device: str = "cuda",
    commit: Annotated[str, typer.Option(help="Commit this source is a copy of, where there is no checkout.")] = "",
) -> None:
    """Times stock and routed text stacks on a GPU."""
    began, start = datetime.now(UTC).isoformat(timespec="seconds"), WALL.read()
    found, dirty = schema.commit_of_source()
    if commit and not found:
        found, dirty = commit, False
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    planned = cases({"3b": SIZES["3b"]}, (2048, 8192), (1,)) if quick else cases(SIZES, (2048, 8192, 32768), (1, 8))
    itemsize = dtype.itemsize
    planned = [dataclasses.replace(case, itemsize=itemsize) for case in planned]
    name = device if device == "cpu" else torch.cuda.get_device_name(device)
    machine = schema.machine_here(name, str(dtype).removeprefix("torch."), "sdpa")
    command = f"python -m mmroute.bench.gpu --seconds {seconds:g}{' --quick' * quick}"
    results: list[engine_schema.GpuResult] = []
    for case, measured, why in _run(planned, seconds / 3 if quick else seconds, device, dtype):
        if measured is None:
            typer.echo(f"{case.name}: not measured: {why}", err=True)
            continue
        run = schema.run_here(command, found, dirty, began, WALL.read() - start)
        for result in results_of(case, measured, run, machine):
            schema.write_result(out / f"{result.case}.json", result)  # at once: a later case may run out of memory
            results.append(result)
            typer.echo(card([result]).splitlines()[-1], err=True)
    typer.echo(card(results))
    typer.echo(
        json.dumps(
            {r.case: {"prefill": r.prefill.ratio["median"], "decode": r.decode.ratio["median"]} for r in results}
        )
    )


if __name__ == "__main__":
    typer.run(main)
