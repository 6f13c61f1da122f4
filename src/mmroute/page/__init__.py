"""One self-contained page of traces: pictures, words, scores and KV bytes by hop and layer.

    page.render([page.view(trace)])        # HTML text; `mmroute inspect trace.json -o trace.html` on the command line

Python says what is shown (`View`); `trace.html` draws it. The page holds its data, styles and script and opens from
disk, offline.

Legend: L layers, N logical columns of the session.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

from mmroute.cost import kv_bytes_per_slot, slots_by_layer
from mmroute.errors import ConfigError
from mmroute.page.story import column_hops, column_modality
from mmroute.trace import Trace

__all__ = ["View", "render", "view"]


@dataclass(frozen=True)
class View:
    """What the page shows of one trace. Columns are logical: one for each position the session has entered."""

    title: str
    model: str
    recipe: str
    question: str
    gold: str
    text: str
    hops: list[str]
    """Text of hops 1, 2, ...; hop 0 is the prompt."""
    words: list[str]
    modality: list[int]
    hop: list[int]
    """Hop of each column."""
    pictures: list[dict[str, Any]]
    """{"png": data address, "rows", "columns", "start": first column}."""
    ran: list[list[int]]
    """[layer]: columns that ran it."""
    lost: list[dict[int, int]]
    """[layer]: column that ran -> hop after which its key is not in the cache any more."""
    again: list[dict[int, int]]
    """[layer]: column -> passes beyond the first."""
    scores: list[list[float | None] | None]
    """[layer]: by column, what it was ranked by; None where it did not compete, or nothing was ranked."""
    replayed: dict[int, list[int]]
    """Hop -> columns whose image features were copied beside its latents."""
    kv: list[list[int]]
    """[layer][hop]: bytes live when the hop has ended."""
    kv_full: list[int]
    """[hop]: bytes one layer would hold by then if nothing were routed."""
    relevant: list[list[int]] = field(default_factory=list)
    """[hop]: vision positions of the first picture that ground truth says must be seen."""


def view(trace: Trace) -> View:
    """What the page needs of one conversation's full trace.

    Raises:
        ConfigError: the trace holds counts alone, several rows, or no story.
    """
    if not trace.calls or any(call.modality is None for call in trace.calls):
        raise ConfigError(
            "the trace says how many positions ran, not which; write it with `mmroute ask ... --trace FILE`, or set "
            "routed.full_trace = True before answering"
        )
    rows = len(trace.calls[0].new)
    if rows != 1 or trace.story is None:
        given = f"{rows} rows" if rows != 1 else "no words and pictures"
        raise ConfigError(
            f"the page shows one conversation, this trace has {given}; write it with `mmroute ask ... --trace FILE`, "
            "or from Python with mmroute.page.story.tell(routed, conversation, answer)"
        )
    story, hops = trace.story, column_hops(trace)
    last = max([*hops, len(story.hops)])
    slot, layers = kv_bytes_per_slot(trace.shape), range(trace.shape.layers)
    history = list(slots_by_layer(trace))
    ends = [[slots for call, slots in history if call.hop[0] <= h][-1] for h in range(last + 1)]
    return View(
        title=story.title or story.model or "trace",
        model=story.model,
        recipe=story.recipe,
        question=story.question,
        gold=story.gold,
        text=story.text,
        hops=[*story.hops, *[""] * (last - len(story.hops))],
        words=story.words,
        modality=column_modality(trace),
        hop=hops,
        pictures=[
            {"png": f"data:image/png;base64,{p.png}", "rows": p.grid[0], "columns": p.grid[1], "start": p.start}
            for p in story.pictures
        ],
        ran=[_ran(trace, i) for i in layers],
        lost=[_lost(trace, i) for i in layers],
        again=[_again(trace, i) for i in layers],
        scores=[_scores(trace, i) for i in layers],
        replayed={r["hop"]: list(r["columns"]) for r in trace.replayed},
        kv=[[slots[i] * slot for slots in ends] for i in layers],
        kv_full=[sum(h <= at for h in hops) * slot for at in range(last + 1)],
        relevant=story.relevant,
    )


def render(views: Sequence[View]) -> str:
    """The page as HTML text."""
    # An opening comment or closing tag in the data would end the script, or keep it from ending.
    data = json.dumps([asdict(v) for v in views], separators=(",", ":")).replace("<", "\\u003c")
    return files("mmroute.page").joinpath("trace.html").read_text(encoding="utf-8").replace("/*DATA*/[]", data)


def _ran(trace: Trace, layer: int) -> list[int]:
    return [c for call in trace.calls for c in (call.layers[layer].kept or [[]])[0]]


def _lost(trace: Trace, layer: int) -> dict[int, int]:
    """Keys that went: not kept by a `kv_only` layer, or given up when a hop closed."""
    out: dict[int, int] = {}
    held: set[int] = set()
    closes = list(trace.closes)
    for number, call in enumerate(trace.calls, start=1):
        record = call.layers[layer]
        ran = set((record.kept or [[]])[0])
        stays = ran if record.held is None else set(record.held[0])
        out |= dict.fromkeys(sorted(ran - stays), call.hop[0])
        held |= stays
        while closes and closes[0].at_call == number:
            close = closes.pop(0)
            if close.held is not None and close.held[layer]:
                left = set(close.held[layer][0])
                out |= dict.fromkeys(sorted(held - left), close.hop[0])
                held &= left
    return out


def _again(trace: Trace, layer: int) -> dict[int, int]:
    out: dict[int, int] = {}
    for call in trace.calls:
        for column in (call.layers[layer].redone or [[]])[0]:
            out[column] = out.get(column, 0) + 1
    return out


def _scores(trace: Trace, layer: int) -> list[float | None] | None:
    if all(call.layers[layer].scores is None for call in trace.calls):
        return None
    out: list[float | None] = []
    for call in trace.calls:
        given = call.layers[layer].scores
        out += given[0] if given is not None else [None] * len((call.modality or [[]])[0])
    return out
