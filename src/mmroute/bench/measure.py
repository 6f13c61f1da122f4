"""How long something takes and how much memory it needs; the only file that reads a clock.

Configurations are compared inside one process, interleaved: every round runs each once, in rotated order, and what
counts is the median of the ratio within a round. On shared cores the clock of separate runs drifts by 2x.
On a CPU the clock is the CPU time of this one thread, with torch set to one thread; wall time stands beside it.

Legend: B batch, N positions of the prompt.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mmroute.errors import ConfigError

__all__ = [
    "Clock",
    "Generation",
    "Spread",
    "Timings",
    "clock_of",
    "interleave",
    "measure_generation",
    "one_thread",
    "peak_memory_bytes",
    "realised_saving",
    "reset_peak_memory",
    "spread",
]


@dataclass(frozen=True)
class Clock:
    """A source of seconds and what kind of seconds they are."""

    name: Literal["thread", "wall", "cuda"]
    read: Callable[[], float]


THREAD = Clock("thread", time.thread_time)
WALL = Clock("wall", time.perf_counter)


@dataclass(frozen=True)
class Spread:
    """What is reported of several measured values."""

    median: float
    p10: float
    p90: float
    min: float
    max: float
    n: int


@dataclass(frozen=True)
class Generation:
    """Seconds of one forced-length generation."""

    prefill_s: float
    """From the prompt (image features included) to the first token."""
    decode_s_per_token: float
    """Mean over all following steps."""
    tower_s: float
    """The vision tower's part of `prefill_s`; 0 if no tower was named."""
    wall_s: float
    """Wall clock of the whole."""

    @property
    def parts(self) -> dict[str, float]:
        """For `interleave`: seconds by name, prefill without the tower."""
        return {
            "prefill": self.prefill_s - self.tower_s,
            "decode": self.decode_s_per_token,
            "tower": self.tower_s,
        }


@dataclass(frozen=True)
class Timings:
    """Seconds per case and part, one value per counted round."""

    seconds: dict[str, dict[str, list[float]]]
    """[case][part]: `total`, `wall`, and what the case itself returned."""
    clock: str

    def spread(self, case: str, part: str = "total") -> Spread:
        """How long one case took."""
        return spread(self.seconds[case][part])

    def ratio(self, case: str, to: str, part: str = "total") -> Spread:
        """How long `case` took relative to `to`, round by round: below 1 is faster."""
        pairs = zip(self.seconds[case][part], self.seconds[to][part], strict=True)
        return spread([ours / theirs for ours, theirs in pairs])


def clock_of(device: torch.device | str) -> Clock:
    """The clock for work on a device: the thread's CPU time, or wall time between synchronised points."""
    if torch.device(device).type == "cpu":
        return THREAD

    def read() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return Clock("cuda", read)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread, so that the thread's CPU time is all the time there is; restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread(values: Sequence[float]) -> Spread:
    """Median, 10th and 90th percentile, extremes and count.

    Example:
        >>> spread([3.0, 1.0, 2.0]).median
        2.0
    """
    if not values:
        raise ConfigError("a spread needs at least one value, given none; measure at least one round")
    ordered = sorted(values)
    deciles = statistics.quantiles(ordered, n=10, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 9
    return Spread(statistics.median(ordered), deciles[0], deciles[-1], ordered[0], ordered[-1], len(ordered))


def interleave(
    cases: Mapping[str, Callable[[], Mapping[str, float] | None]],
    rounds: int = 9,
    warmup: int = 3,
    clock: Clock = THREAD,
    wall: Clock = WALL,
) -> Timings:
    """How long each case takes, all of them once per round in rotated order.

    Args:
        cases: name to what is run; it may return seconds of its own parts by name.
        rounds: counted rounds.
        warmup: rounds before them that are run and dropped.

    Raises:
        ConfigError: nothing to run, or no counted round.
    """
    if not cases or rounds < 1 or warmup < 0:
        raise ConfigError(
            f"timing needs cases, rounds >= 1 and warmup >= 0, given {len(cases)} cases, {rounds} and {warmup}"
        )
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
    names = list(cases)
    with one_thread():
        for index in range(warmup + rounds):
            turn = index % len(names)
            for name in names[turn:] + names[:turn]:
                wall_start, start = wall.read(), clock.read()
                parts = cases[name]()
                took = {"total": clock.read() - start, "wall": wall.read() - wall_start, **(parts or {})}
                if index >= warmup:
                    for part, value in took.items():
                        seconds[name].setdefault(part, []).append(value)
    return Timings(seconds, clock.name)


@torch.no_grad()
def measure_generation(
    model: nn.Module,
    batch: Mapping[str, Any],
    new_tokens: int,
    *,
    clock: Clock = THREAD,
    wall: Clock = WALL,
    tower: nn.Module | None = None,
    step: Mapping[str, Any] | None = None,
) -> Generation:
    """How long a model takes for a prompt, and per token after it, at a forced output length.

    The end token is ignored: a method that answers in fewer words is not faster per token. Positions are given
    explicitly in every call, because what a model derives by itself depends on its earlier calls.

    Args:
        model: a Transformers model with a language-model head, stock or attached.
        batch: keyword arguments of its prompt: `input_ids` (B, N), `attention_mask` (B, N), `position_ids` (B, N) or
            (3, B, N), pixels and so on.
        new_tokens: generated tokens; the first one is the prompt's, each other one is a step.
        tower: module whose time is reported apart, the vision tower.
        step: keyword arguments that every step gets too.

    Raises:
        ConfigError: a batch without explicit positions or mask, or fewer than two tokens.
    """
    if missing := {"input_ids", "attention_mask", "position_ids"} - set(batch):
        raise ConfigError(f"a timed batch needs explicit {', '.join(sorted(missing))}; given {', '.join(batch)}")
    if new_tokens < 2:
        raise ConfigError(f"new_tokens is at least 2, the prompt's and one step's, given {new_tokens}")
    mask, positions = batch["attention_mask"], batch["position_ids"]
    last = positions.amax(dim=-1, keepdim=True)
    last = last.amax(dim=0, keepdim=True).expand_as(last) if last.dim() == 3 else last
    with _timed(tower, clock) as spent:
        wall_start, start = wall.read(), clock.read()
        out = model(**batch, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        prefilled = clock.read()
    for index in range(1, new_tokens):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = model(
            input_ids=token,
            attention_mask=mask,
            position_ids=last + index,
            past_key_values=out.past_key_values,
            use_cache=True,
            **(step or {}),
        )
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    decoded = clock.read()
    return Generation(
        prefill_s=prefilled - start,
        decode_s_per_token=(decoded - prefilled) / (new_tokens - 1),
        tower_s=sum(spent),
        wall_s=wall.read() - wall_start,
    )


@contextmanager
def _timed(module: nn.Module | None, clock: Clock) -> Iterator[list[float]]:
    """Seconds of each forward of a module while the block runs."""
    spent: list[float] = []
    if module is None:
        yield spent
        return
    started: list[float] = []

    def before(*_: Any) -> None:
        started.append(clock.read())

    def after(*_: Any) -> None:
        spent.append(clock.read() - started.pop())

    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield spent
    finally:
        for hook in hooks:
            hook.remove()


def realised_saving(time_ratio: float, flop_ratio: float) -> float | None:
    """Which share of the saving that the arithmetic promises is seen on the clock; None where it promises none."""
    return (1 - time_ratio) / (1 - flop_ratio) if flop_ratio < 1 else None


def reset_peak_memory() -> None:
    """Starts a new peak of this process's resident memory where the system can (Linux); coarse elsewhere."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")


def peak_memory_bytes() -> int:
    """The most resident memory of this process since the last reset, or since its start."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
