"""What the engine realises of the saving that the arithmetic promises: `python -m mmroute.bench.engine --out DIR`.

A random Qwen2.5-VL text stack, stock and routed interleaved in one process. Selection is random, so what is timed is
the engine; positions stand for images by their ids alone, and no vision tower runs. Rounds of several fresh processes
are pooled, because how a process happens to lie in memory moves the ratio by a tenth; every ratio is of two runs of one
process. Peak memory has a fresh process per configuration. Writes one `engine/1` file per case; ends with a card for
people and one JSON line.
"""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn

from mmroute import cost, hub
from mmroute.bench import schema
from mmroute.bench.measure import (
    WALL,
    interleave,
    peak_memory_bytes,
    realised_saving,
    reset_peak_memory,
    spread,
)
from mmroute.engine.attach import Routed, attach
from mmroute.trace import Shape, Trace

__all__ = ["CASES", "Case", "Raw", "Stack", "groups", "measure_cases", "measure_peak", "result_of"]

IMAGE = 500


@dataclass(frozen=True)
class Stack:
    """Sizes of a text model."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int = 2
    vocab: int = 2048

    @property
    def shape(self) -> Shape:
        """What costs depend on, in float32."""
        return Shape(
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            mlp=self.mlp,
            vocab=self.vocab,
            itemsize=4,
        )


@dataclass(frozen=True)
class Case:
    """One configuration, and what it may cost."""

    name: str
    stack: Stack
    lengths: tuple[int, ...]
    """[row]: valid positions; rows are left-padded to the longest."""
    num_vision: int
    """Vision positions of each row, part of its length."""
    vision_keep: float
    text_keep: float
    goal: float
    """The time ratio may be at most this ..."""
    over_ideal: bool = False
    """... times the FLOP ratio."""
    what: Literal["prefill", "decode", "train"] = "prefill"
    """`train` is a forward and a backward pass through DARE's routers."""
    executor: Literal["dense", "physical"] | None = None
    """For `train`."""
    over_stock_us: float | None = None
    """Microseconds per layer over the stock model, in place of `goal`: for layers so small that the engine shows."""

    @property
    def new(self) -> list[list[int]]:
        """[row][modality] positions of the prompt."""
        return [[n - self.num_vision, self.num_vision, 0] for n in self.lengths]

    def planned(self, routed: bool, steps: int = 0) -> Trace:
        """What a run must leave; the stock model runs and stores its padding too."""
        if routed:
            return cost.planned_trace(self.stack.shape, self.new, (self.text_keep, self.vision_keep, 1.0), steps)
        return cost.planned_trace(
            self.stack.shape, [[max(self.lengths), 0, 0] for _ in self.lengths], decode_steps=steps
        )

    def flop_ratio(self) -> float:
        """Routed over stock FLOPs of what is timed, language-model head apart.

        Given padding, the stock model attends through a mask, so it computes every pair of columns and not only the
        causal half of them.
        """
        if self.executor == "dense":
            return 1.0
        steps = 1 if self.what == "decode" else 0
        padded = len(set(self.lengths)) > 1
        ours = cost.estimate_flops(self.planned(True, steps))
        theirs = cost.estimate_flops(self.planned(False, steps), convention="rectangle" if padded else "causal")
        return ours.decode / theirs.decode if steps else ours.prefill / theirs.prefill


_LONG = Stack(layers=10, hidden=512, mlp=1376, heads=8)
_BATCH = Stack(layers=6, hidden=384, mlp=1024, heads=6)
_SMALL = Stack(layers=12, hidden=64, mlp=128, heads=4)
_RAGGED = (768, 618, 468, 318)
CASES = (
    Case("prefill-1024-keep-1-1", _LONG, (1024,), 784, 1.0, 1.0, goal=1.02),
    Case("prefill-1024-keep-.4-.7", _LONG, (1024,), 784, 0.4, 0.7, goal=1.06, over_ideal=True),
    Case("prefill-1024-keep-.4-.4", _LONG, (1024,), 784, 0.4, 0.4, goal=1.06, over_ideal=True),
    Case("batch-4-padded-keep-.4-.7", _BATCH, _RAGGED, 196, 0.4, 0.7, goal=0.37),
    Case("decode-1024-keep-1-1", _LONG, (1024,), 784, 1.0, 1.0, goal=1.02, what="decode"),
    Case("decode-1024-keep-.4-.7", _LONG, (1024,), 784, 0.4, 0.7, goal=1.0, what="decode"),
    Case("decode-64-small-keep-1-1", _SMALL, (64,), 48, 1.0, 1.0, goal=1.0, what="decode", over_stock_us=12),
    Case("train-dense-keep-.4-.7", _BATCH, (1024,), 784, 0.4, 0.7, goal=1.4, what="train", executor="dense"),
    Case("train-physical-keep-.4-.7", _BATCH, (1024,), 784, 0.4, 0.7, goal=0.5, what="train", executor="physical"),
)


def build(stack: Stack, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A stock model of these sizes with random weights, the same at every call; made where it will live."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = stack.hidden // stack.heads // 2
    text = {
        "vocab_size": stack.vocab,
        "hidden_size": stack.hidden,
        "intermediate_size": stack.mlp,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.kv_heads,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        },
    }
    tower = {"depth": 1, "hidden_size": 32, "out_hidden_size": stack.hidden, "intermediate_size": 32, "num_heads": 2}
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 1,
        "vision_start_token_id": IMAGE + 2,
        "vision_end_token_id": IMAGE + 3,
    }
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval()


def prompt(case: Case, device: str) -> dict[str, Tensor]:
    """Ids whose image placeholders follow a few words of text, left-padded, with explicit positions."""
    B, N = len(case.lengths), max(case.lengths)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(IMAGE + 100, case.stack.vocab, (B, N), generator=generator)
    mask = torch.zeros(B, N, dtype=torch.long)
    for b, length in enumerate(case.lengths):
        text_before = min(10, length - case.num_vision)
        start = N - length + text_before
        mask[b, N - length :] = 1
        ids[b, start : start + case.num_vision] = IMAGE
    positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in batch.items()}


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


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases that one stock model serves, together."""
    together: dict[Any, list[Case]] = {}
    for case in cases:
        together.setdefault((case.stack, case.lengths, case.what), []).append(case)
    return list(together.values())


def result_of(
    case: Case,
    raws: list[Raw],
    run: schema.Run,
    device: str = "cpu",
    peak: int | None = None,
    stock_peak: int | None = None,
) -> schema.EngineResult:
    """The result file's content of one case, from what one or several processes measured."""
    ours = [seconds for raw in raws for seconds in raw.time_s]
    theirs = [seconds for raw in raws for seconds in raw.stock_time_s]
    ratio, ideal = spread([a / b for a, b in zip(ours, theirs, strict=True)]), case.flop_ratio()
    goal = case.goal * ideal if case.over_ideal else case.goal
    if case.over_stock_us is not None:
        goal = 1 + case.over_stock_us * 1e-6 * case.stack.layers / spread(theirs).median
    return schema.EngineResult(
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
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1]


def card(results: list[schema.EngineResult]) -> str:
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
    results: list[schema.EngineResult] = []
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
