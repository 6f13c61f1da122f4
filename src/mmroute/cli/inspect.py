"""`mmroute inspect`: the page of one or more traces."""

import json
from pathlib import Path
from typing import Annotated

import typer

from mmroute.files import write_text

__all__ = ["inspect"]


def inspect(
    traces: Annotated[list[Path], typer.Argument(help="What `mmroute ask ... --trace FILE` wrote; several: tabs.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="HTML file; default beside the first trace.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="End stdout with one JSON object.")] = False,
) -> None:
    """Show what ran, was kept, deepened and replayed, by hop and layer, as one offline page."""
    from mmroute import page  # torch costs seconds; --help must not pay them
    from mmroute.cost import estimate_flops, estimate_kv_bytes, keep_shares
    from mmroute.trace import Trace

    read = [Trace.load(path) for path in traces]
    target = out or traces[0].with_suffix(".html")
    write_text(target, page.render([page.view(trace) for trace in read]))
    if not json_:
        typer.echo(f"wrote {target}")
        return
    facts = [
        {
            "trace": str(path),
            "keep": keep_shares(trace),
            "flops": estimate_flops(trace).total,
            "kv_bytes": estimate_kv_bytes(trace),
        }
        for path, trace in zip(traces, read, strict=True)
    ]
    typer.echo(json.dumps({"page": str(target), "traces": facts}))
