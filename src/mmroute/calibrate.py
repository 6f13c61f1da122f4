"""Where does a model stop needing its image, and which keep rates follow from that? Measured, without training.

`cliff`: the loss of written chains when vision positions are dropped from layer c on, for every c. The first layers
read the image into the text; behind the information cliff the loss no longer notices.
`schedule`: keep rates per layer for a budget, whole where leaving out random positions hurts, nothing behind the cliff.

Everything is teacher-forced: the prompt enters routed, the gold completion then runs whole on its cache, as generated
positions do. All tokens of a chain being the most likely ones is the same as greedy decoding writing that chain.

Legend: B batch, N positions of a prompt, R positions of a completion, V vocabulary, L layers.
Source: DARE's greedy, data-driven cutoff layer (known to us from a summary).
Deviates: the tolerance has an absolute floor, because the loss of a small model that knows its task is nearly zero;
    exact chains must not be lost either; rates come from the damage of random choices, layer by layer.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmroute import hub
from mmroute.engine.attach import attach
from mmroute.errors import BudgetError, ConfigError, InputError
from mmroute.prune._budget import check_budget
from mmroute.prune.schedule import Schedule
from mmroute.session import Session

__all__ = [
    "Cliff",
    "Gold",
    "Loss",
    "Rates",
    "cliff_svg",
    "find_cliff",
    "gold",
    "measure",
    "measure_cliff",
    "measure_schedule",
    "num_layers",
    "share_out",
]

log = logging.getLogger(__name__)

RELATIVE, ABSOLUTE = 0.01, 0.002
"""A rise of the loss below 1 % of it or 0.002 nats per token is none."""
LOST_CHAINS = 0.01
"""Share of exact chains that may be lost: a rise of the loss can sit in the one token that decides."""
FLOOR = 0.05
"""Least share of vision before the cliff."""
SCORERS = ("row", "knorm", "random")


@dataclass(frozen=True)
class Gold:
    """Prompts with the completions they should get; one batch."""

    prompt: dict[str, Tensor]
    completion: Int[Tensor, "B R"]
    """Padded on the right."""
    real: Bool[Tensor, "B R"]


@dataclass(frozen=True)
class Loss:
    """How well completions are predicted."""

    nll: float
    """Nats per token."""
    exact: float
    """Share of completions whose every token is the most likely one."""


@dataclass(frozen=True)
class Cliff:
    """The curve over c = 0 .. L: vision runs and is visible in the layers before c only."""

    nll: list[float]
    """[c], nats per token; the last entry is unrouted."""
    exact: list[float]
    """[c]: share of exact chains."""
    tolerance: float
    """Rise of the loss that still counts as none, nats per token."""
    cutoff_layer: int
    """Least c, stepping down from L, whose loss is within the tolerance and whose chains stay exact."""
    num_items: int

    def to_dict(self) -> dict[str, Any]:
        return {"schema": "cliff/1", **asdict(self)}


@dataclass(frozen=True)
class Rates:
    """A calibrated table with what it costs on the items it was made from."""

    vision: list[float]
    scorer: str
    scope: str
    budget: float
    realised: float
    """Mean of `vision`; below the budget where the cliff allows it."""
    cutoff_layer: int
    damage: list[float]
    """[layer before the cutoff]: rise of the loss when only this layer keeps a random `budget` share; empty where the
    budget pays for all of these layers."""
    unrouted: Loss
    routed: Loss
    by_scorer: dict[str, Loss]
    num_items: int

    def to_dict(self) -> dict[str, Any]:
        return {"schema": "schedule/1", **asdict(self)}

    def recipe(self, source: str) -> str:
        """YAML of a recipe; `source` says in one line what it was made from."""
        lines = [
            f"# Keep rates per layer, training-free, written by `mmroute calibrate schedule`: {source}.",
            f"# Information cliff at layer {self.cutoff_layer} of {len(self.vision)}. On the {self.num_items} items it "
            f"was made from, routed (unrouted): exact chains {self.routed.exact:.3f} ({self.unrouted.exact:.3f}),",
            f"# loss {self.routed.nll:.4f} ({self.unrouted.nll:.4f}) nats per token.",
            "prune:",
            "  name: schedule",
            f"  vision: {json.dumps(self.vision)}",
            "  text: [1.0]",
            f"  scorer: {self.scorer}",
            f"  scope: {self.scope}",
        ]
        return "\n".join(lines) + "\n"


def gold(
    model: Any,
    tasks: Sequence[str],
    n: int,
    *,
    split: str = "val",
    style: str = "cot",
    batch: int = 16,
    offset: int = 0,
) -> Iterator[Gold]:
    """Batches of prompts with gold completions.

    Args:
        model: as `mmroute.load` gives it, with `.processor`.
        tasks: names, each `task` or `task:preset`; every task gives its share of `n`.
        n: items in all.
        split: part of the tasks; never test.
        style: prompt style of the tasks.
        batch: rows per batch.
        offset: items of each task to pass over.

    Raises:
        ConfigError: n is below 1, or the split is test.
        InputError: the model's tokenizer cannot write the completions.
    """
    from mmroute.backbones.images import prepare

    if n < 1 or split == "test":
        raise ConfigError(
            f"calibrate takes n >= 1 items of val or train, given {n} of {split!r}; test is for reporting"
        )
    tokenizer = model.processor.tokenizer
    for i, name in enumerate(tasks):
        task = _task(name)
        mine = n // len(tasks) + (i < n % len(tasks))
        samples = list(task.samples(split, mine, offset))
        for start in range(0, len(samples), batch):
            some = samples[start : start + batch]
            texts = [" ".join([*(hop.text for hop in s.hops if style == "cot"), s.answer_text]) for s in some]
            rows = [[*tokenizer(t, add_special_tokens=False)["input_ids"], *_end(model)] for t in texts]
            if tokenizer.unk_token_id is not None and any(tokenizer.unk_token_id in row for row in rows):
                raise InputError(f"the model's vocabulary cannot write the completions of {name}; take another task")
            longest = max(map(len, rows))
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            real = torch.zeros(len(rows), longest, dtype=torch.bool)
            for b, row in enumerate(rows):
                ids[b, : len(row)], real[b, : len(row)] = torch.tensor(row), True
            prompt = prepare(model, model.processor, [task.messages(s, style) for s in some])
            device = prompt["input_ids"].device
            yield Gold(prompt, ids.to(device), real.to(device))


def _task(name: str) -> Any:
    kind, _, preset = name.partition(":")
    return hub.load("tasks", kind, **({"preset": preset} if preset else {}))


def _end(model: Any) -> list[int]:
    """What ends a completion; a model that names no end token writes none."""
    end = model.generation_config.eos_token_id
    return [] if end is None else [end[0] if isinstance(end, list) else end]


@torch.no_grad()
def measure(model: Any, batches: Sequence[Gold], pruner: Schedule | None = None) -> Loss:
    """The loss of gold completions when prompts are routed by `pruner`; None runs them whole."""
    nll, tokens, exact, rows = 0.0, 0, 0, 0
    with attach(model, prune=pruner) as routed:
        for one in batches:
            logits = _logits(routed, one)
            loss = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), one.completion, reduction="none")
            nll += float((loss * one.real).sum(dtype=torch.float64))
            tokens += int(one.real.sum())
            exact += int(((logits.argmax(-1) == one.completion) | ~one.real).all(1).sum())
            rows += len(one.completion)
    return Loss(nll / tokens, exact / rows)


def _logits(routed: Any, one: Gold) -> Float[Tensor, "B R V"]:
    """What the model expects at each column of the completion."""
    session = Session(routed, reserve=one.completion.shape[1])
    first = session.append(one.prompt)
    assert session.ids is not None
    assert session.mask is not None
    N = session.ids.shape[1]
    ids = torch.cat([session.ids, one.completion], 1)
    mask = torch.cat([session.mask, one.real.to(session.mask.dtype)], 1)
    positions = routed.family.positions(routed.model, ids, mask, one.prompt.get("image_grid_thw"))
    out = routed.model(
        input_ids=one.completion,
        attention_mask=mask,
        position_ids=positions[..., N:],
        past_key_values=session.cache,
        use_cache=True,
        route=False,  # generated positions run whole
    )
    return torch.cat([first[:, None], out.logits[:, :-1]], 1)


def measure_cliff(model: Any, batches: Sequence[Gold]) -> Cliff:
    """The cliff of a model that writes words alone; see `find_cliff`."""
    return find_cliff(num_layers(model), _rows(batches), lambda pruner: measure(model, batches, pruner))


def find_cliff(L: int, num_items: int, measured: Callable[[Schedule], Loss]) -> Cliff:
    """The whole sweep, L + 1 passes, and the greedy cutoff: step down from L while the rise stays in the tolerance.

    Args:
        L: layers of the model.
        num_items: that the loss is measured on.
        measured: the loss when given vision positions are routed so.
    """
    losses = []
    for c in range(L + 1):
        vision = (1.0,) * c + (0.0,) * (L - c)
        losses.append(measured(Schedule(vision=vision, scorer="random", scope="drop")))
        log.info("vision in %d of %d layers: nll %.4f, exact chains %.3f", c, L, losses[c].nll, losses[c].exact)
    nll = [loss.nll for loss in losses]
    tolerance = max(RELATIVE * nll[-1], ABSOLUTE)
    exact = [loss.exact for loss in losses]
    cutoff = L
    while cutoff > 0 and nll[cutoff - 1] - nll[-1] <= tolerance and exact[cutoff - 1] >= exact[-1] - LOST_CHAINS:
        cutoff -= 1
    if any(after > before + tolerance for before, after in pairwise(nll)):
        log.warning("the loss does not fall with every layer that sees the image: more items (--n), or read the curve")
    if losses[-1].exact < 0.5:
        log.warning(
            "unrouted, only %.0f %% of the chains are exact: the cliff of a model that cannot do the task says little",
            100 * losses[-1].exact,
        )
    return Cliff(nll, exact, tolerance, cutoff, num_items)


def measure_schedule(model: Any, batches: Sequence[Gold], budget: float, cliff: Cliff | None = None) -> Rates:
    """Keep rates whose mean over layers is at most `budget`, and the scorer that does best with them.

    Layers behind the cliff keep no vision. If the budget pays for all layers before it, they stay whole. Otherwise
    layer l keeps 1 - c / (damage + 0.01), never less than 5 %, with c such that the mean is the budget; damage is the
    rise of the loss when that layer alone keeps a random share.

    Args:
        model: as `mmroute.load` gives it.
        batches: what to measure on.
        budget: mean share of vision positions that run a layer, in (0, 1].
        cliff: of the same model and batches; measured if None.

    Raises:
        BudgetError: not even 5 % of the layers before the cliff fits.
    """
    check_budget(budget)
    L = num_layers(model)
    cliff = cliff or measure_cliff(model, batches)
    cutoff = cliff.cutoff_layer
    damage: list[float] = []
    early = [1.0] * cutoff
    if budget * L < cutoff:
        for layer in range(cutoff):
            alone = tuple(budget if i == layer else 1.0 for i in range(L))
            loss = measure(model, batches, Schedule(vision=alone, scorer="random"))
            damage.append(max(loss.nll - cliff.nll[-1], 0.0))
            log.info("layer %d alone at %.2f: nll %.4f, exact chains %.3f", layer, budget, loss.nll, loss.exact)
        early = share_out(damage, budget * L)
    vision = [round(rate, 4) for rate in (*early, *[0.0] * (L - cutoff))]
    falls = all(after <= before for before, after in pairwise(vision))
    scope = "drop" if falls else "skip"
    whole = set(vision) <= {0.0, 1.0}  # nothing is ranked: every scorer keeps the same
    losses = {}
    for scorer in SCORERS:
        if (scorer == "row" and vision[0] < 1) or (whole and scorer != "random"):
            continue
        losses[scorer] = measure(model, batches, Schedule(vision=tuple(vision), scorer=scorer, scope=scope))
        log.info("scorer %s: nll %.4f, exact chains %.3f", scorer, losses[scorer].nll, losses[scorer].exact)
    best = min(losses, key=lambda scorer: (-losses[scorer].exact, losses[scorer].nll))
    return Rates(
        vision=vision,
        scorer=best,
        scope=scope,
        budget=budget,
        realised=sum(vision) / L,
        cutoff_layer=cutoff,
        damage=damage,
        unrouted=Loss(cliff.nll[-1], cliff.exact[-1]),
        routed=losses[best],
        by_scorer=losses,
        num_items=_rows(batches),
    )


def share_out(damage: Sequence[float], total: float) -> list[float]:
    """Rates in [0.05, 1] that sum to `total`, larger where leaving out hurts: 1 - c / (damage + 0.01), c by bisection.

    Raises:
        BudgetError: even 5 % everywhere is more than `total`.

    Example:
        >>> [round(rate, 2) for rate in share_out([0.35, 0.353, 0.275, 0.005], 2.3)]
        [0.77, 0.77, 0.71, 0.05]
    """
    if len(damage) * FLOOR > total:
        raise BudgetError(
            f"{len(damage)} layers need their image and the budget pays for {total:.2f}; it must pay for "
            f"{len(damage) * FLOOR:.2f} at least: raise --budget"
        )

    def rates(c: float) -> list[float]:
        return [min(max(1 - c / (d + 0.01), FLOOR), 1.0) for d in damage]

    low, high = 0.0, max(damage) + 0.01
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(rates(middle)) > total else (low, middle)
    return rates(high)


def num_layers(model: Any) -> int:
    """Decoder layers of its text model."""
    from mmroute import backbones

    return backbones.of(model).shape(model).layers


def _rows(batches: Sequence[Gold]) -> int:
    return sum(len(one.completion) for one in batches)


def cliff_svg(cliff: Cliff, title: str) -> str:
    """The curve as a self-contained SVG: loss and exact chains over the number of layers that see the image."""
    width, height, left, top = 560, 300, 56, 44
    right, bottom = width - 56, height - 48
    L, most = len(cliff.nll) - 1, max(cliff.nll) or 1.0

    def at(c: float, share: float) -> str:
        return f"{left + (right - left) * c / L:.1f},{bottom - (bottom - top) * share:.1f}"

    losses = " ".join(at(c, value / most) for c, value in enumerate(cliff.nll))
    chains = " ".join(at(c, value) for c, value in enumerate(cliff.exact))
    x = left + (right - left) * cliff.cutoff_layer / L
    ticks = "".join(
        f'<text x="{left + (right - left) * c / L:.1f}" y="{bottom + 18}" text-anchor="middle">{c}</text>'
        for c in range(0, L + 1, max(1, L // 16))
    )
    safe = title.replace("&", "&amp;").replace("<", "&lt;")
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"
 font-size="12">
<rect width="{width}" height="{height}" fill="white"/>
<text x="{left}" y="20" font-size="14">{safe}</text>
<path d="M{left} {top}V{bottom}H{right}V{top}" fill="none" stroke="#888"/>
<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="#888" stroke-dasharray="4 4"/>
<text x="{x + 4:.1f}" y="{top + 12}">cliff {cliff.cutoff_layer}</text>
<polyline points="{losses}" fill="none" stroke="#b5402a" stroke-width="2"/>
<polyline points="{chains}" fill="none" stroke="#1f6f8b" stroke-width="2"/>
{ticks}
<text x="{left - 6}" y="{top + 4}" text-anchor="end" fill="#b5402a">{most:.2f}</text>
<text x="{left - 6}" y="{bottom}" text-anchor="end" fill="#b5402a">0</text>
<text x="{right + 6}" y="{top + 4}" fill="#1f6f8b">1</text>
<text x="{right + 6}" y="{bottom}" fill="#1f6f8b">0</text>
<text x="{left}" y="{height - 8}"><tspan fill="#b5402a">loss, nats per token</tspan>
 <tspan fill="#1f6f8b">exact chains</tspan> over layers that see the image (n = {cliff.num_items})</text>
</svg>
"""
