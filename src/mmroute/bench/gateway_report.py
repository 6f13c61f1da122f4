"""What a load run of the gateway says, as Markdown."""

from collections.abc import Iterator
from typing import Any

from mmroute.bench import table
from mmroute.bench.gate_schema import MUST_BE_0, GatewayResult

__all__ = ["section"]


def section(result: GatewayResult) -> list[str]:
    """Counts under faults, memory, added milliseconds and requests a second; of what was run."""
    parts = [_counts(result), _times(result.latency), _rates(result.throughput)]
    return [line for part in parts for line in part][1:]


def _counts(result: GatewayResult) -> Iterator[str]:
    load, memory = result.load, result.resident_mib
    if load is None:
        return
    before, after = memory["before"], memory["after"]
    grown = "-" if before is None or after is None else f"{after - before:+.1f} MiB"
    rows = [[str(load["n"]), str(load["concurrency"]), *(str(load[name]) for name in MUST_BE_0), grown]]
    head = [
        "requests",
        "at a time",
        "lost",
        "doubled",
        "rating text leaked",
        "no OpenAI error",
        "left running",
        "memory",
    ]
    ended = ", ".join(f"{name} {count}" for name, count in sorted(load["outcomes"].items()))
    yield from ("", *table.markdown(head, rows).splitlines(), "", f"How they ended: {ended}.")


def _times(latency: dict[str, Any] | None) -> Iterator[str]:
    if latency is None:
        return
    rows = []
    for kind, cases in latency.items():
        if not isinstance(cases, dict):
            continue
        for name, through, direct, added_by in (
            ("gateway, passed on", "forced", "direct", "added forced"),
            ("gateway, rated and kept", "peek kept", "direct draft", "added peek"),
            ("nginx", "nginx", "direct", "added nginx"),
        ):
            if through not in cases:
                continue
            added = cases[added_by]
            ms = [cases[direct]["p50"], cases[through]["p50"], added["p50"], added["p99"]]
            rows.append([kind, name, *(f"{value:.2f}" for value in ms)])
    head = ["what", "through", "direct p50 (ms)", "p50", "added p50", "added p99"]
    yield from ("", *table.markdown(head, rows).splitlines())


def _rates(throughput: dict[str, Any] | None) -> Iterator[str]:
    if throughput is None:
        return
    kinds = [kind for kind in throughput if isinstance(throughput[kind], dict)]
    ways = list(throughput[kinds[0]])
    rows = [[kind, *(f"{throughput[kind][way]:.0f}" for way in ways)] for kind in kinds]
    yield from ("", *table.markdown(["requests a second", *ways], rows).splitlines())
