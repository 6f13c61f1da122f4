"""`mmroute demo`: the bundled model on held-out items, unrouted and routed, in words and in latents."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from mmroute.bench.gate_schema import GateSummary

__all__ = ["demo"]


def demo(
    n: Annotated[int, typer.Option(min=2, help="Held-out items, half mazes and half lakes.")] = 60,
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.html.")] = Path("."),
) -> None:
    """Solve mazes and lakes with the bundled model, unrouted and routed, and show what was saved; then think in words
    and in latents; then let a draft decide who answers."""
    from mmroute.bench.measure import one_thread

    with one_thread():  # models this small gain nothing from a second one, and wait for it where the machine is busy
        _run(n, out)


def _run(n: int, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from mmroute import demo as demo_

    note = Console(stderr=True)
    rows, views = demo_.run(n, say=lambda text: note.print(f"[dim]{text}[/dim]"))
    table = Table(title=f"bundled model, {n} held-out items ({', '.join(demo_.TASKS)}); ratios to unrouted")
    for column in ("recipe", "batch", "accuracy [95 %]", "FLOPs", "KV", "prefill", "decode", "as alone"):
        table.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=True)
    for row in rows:
        low, high = row.ci95
        table.add_row(
            row.recipe,
            str(row.batch),
            f"{row.accuracy:.2f} [{low:.2f}, {high:.2f}]",
            f"{row.flops_ratio:.3f}",
            f"{row.kv_ratio:.3f}",
            f"{row.prefill_ratio.median:.2f}",
            f"{row.decode_ratio.median:.2f}",
            f"{row.same_as_alone}/{row.n}",
        )
    # Narrow pipes would cut figures off; a wide line is only ugly.
    Console(width=max(Console().width, 104)).print(table)
    kept = rows[-1].keep
    print(f"{rows[-1].recipe} runs {kept['vision']:.0%} of vision and {kept['text']:.0%} of text tokens (all layers)")

    def say(text: str) -> None:
        note.print(f"[dim]{text}[/dim]")

    more = _think(say)
    gated = demo_.gate(n, say=say)
    if gated is not None:
        Console(width=max(Console().width, 104)).print(_who_answers(gated))
        more["gate"] = asdict(gated)
    for path in demo_.write(rows, views, out, more):
        print(f"wrote {path}")


def _think(say: Callable[[str], None]) -> dict[str, Any]:
    """Prints the table of ways to think and returns what `demo.json` keeps of it; nothing without trained latents."""
    from rich.console import Console
    from rich.table import Table

    from mmroute import demo_latents

    rows = demo_latents.run(say=say)
    if not rows:
        return {}
    table = Table(title=f"ways to think, {rows[0].n} held-out items ({demo_latents.TASK}); AR steps count latents too")
    for column in ("way", "accuracy [95 %]", "AR steps", "latent", "tokens entered", "time"):
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=True)
    for row in rows:
        low, high = row.ci95
        table.add_row(
            row.title,
            f"{row.accuracy:.2f} [{low:.2f}, {high:.2f}]",
            f"{row.ar_steps:.1f}",
            f"{row.latents:.1f}",
            f"{row.token_forwards:.0f}",
            f"{row.time_ratio.median:.2f}",
        )
    Console(width=max(Console().width, 104)).print(table)
    return demo_latents.as_data(rows)


def _who_answers(found: "GateSummary") -> "Table":
    """Both models alone, and the share that the rater sends to the larger one beside chance and perfect knowledge."""
    from rich.table import Table

    table = Table(title=f"who answers: {found.n} held-out questions of {found.recipe}; ratios to always-target")
    for column in ("", "to the target", "accuracy [95 %]", "FLOPs", "seconds"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    low, high = found.ci95
    share = f"{found.target_share:.2f}"
    table.add_row("draft", "0", f"{found.accuracy_draft:.2f}", f"{found.cost_ratio_draft:.3f}", "")
    table.add_row("random", share, f"{found.accuracy_random:.2f}", "", "")
    ours = f"{found.accuracy:.2f} [{low:.2f}, {high:.2f}]"
    table.add_row("rated by the draft", share, ours, f"{found.cost_ratio:.3f}", f"{found.time_ratio:.2f}")
    table.add_row("oracle", share, f"{found.accuracy_oracle:.2f}", "", "")
    table.add_row("target", "1", f"{found.accuracy_target:.2f}", "1.000", "1.00")
    return table
