"""The engine's result files: `engine/1` of one configuration on a CPU, `gpu/1` of one on a GPU.

Written and read as strictly as those of `bench.schema`.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

from mmroute.bench import schema
from mmroute.bench.schema import Machine, Numbers, Run
from mmroute.config import options

__all__ = ["EngineResult", "GpuResult", "Timed", "read_engine", "read_gpu"]


@options
class EngineResult:
    """One configuration of the engine benchmark."""

    run: Run
    machine: Machine
    case: str
    setting: dict[str, Any]
    """Sizes, lengths and keep rates."""
    time_s: Numbers
    stock_time_s: Numbers
    ratio: Numbers
    """Of paired rounds, routed over stock: median, p10, p90, min, max, n."""
    flop_ratio: float
    """What the arithmetic promises."""
    goal: float
    """The ratio may be at most this."""
    kv_bytes: int
    """Live bytes, walked."""
    kv_bytes_estimate: int
    stock_kv_bytes: int
    realised_saving: float | None
    peak_memory_bytes: int | None
    """Over what was resident before the first forward, in a process of its own; coarse."""
    stock_peak_memory_bytes: int | None
    schema: Literal["engine/1"] = "engine/1"

    @property
    def reached(self) -> bool:
        return self.ratio["median"] <= self.goal and self.kv_bytes == self.kv_bytes_estimate


@options
class Timed:
    """One part of a run, in the same rounds as the stock model's."""

    time_s: Numbers
    stock_time_s: Numbers
    ratio: Numbers
    """Of paired rounds, routed over stock: median, p10, p90, min, max, n."""


@options
class GpuResult:
    """One case and keep rate of the benchmark on a GPU: a context in several hops, then some tokens."""

    run: Run
    machine: Machine
    case: str
    setting: dict[str, Any]
    """Sizes, context, batch, hops, keep rates."""
    prefill: Timed
    """All hops."""
    decode: Timed
    """Per token after them."""
    one_call_ratio: Numbers | None
    """Prefill over that of the stock model given the whole context in one call, which is faster than hop by hop."""
    prefill_flop_ratio: float
    decode_flop_ratio: float
    realised_saving: float | None
    """Of `prefill`."""
    kv_bytes: int
    """Live bytes after the last hop, walked."""
    kv_bytes_estimate: int
    stock_kv_bytes: int
    peak_memory_bytes: int | None
    """Over the weights and what else was allocated before; None off the GPU."""
    stock_peak_memory_bytes: int | None
    notes: list[str] = dataclasses.field(default_factory=list)
    schema: Literal["gpu/1"] = "gpu/1"


def read_engine(path: Path) -> EngineResult:
    """An engine benchmark's result file; errors as in `schema.read_result`."""
    return schema.read_as(path, EngineResult, "engine/1")


def read_gpu(path: Path) -> GpuResult:
    """The GPU benchmark's result file; errors as in `schema.read_result`."""
    return schema.read_as(path, GpuResult, "gpu/1")
