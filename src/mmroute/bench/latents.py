"""Whether latents carry the reasoning: the same questions with the latents changed, and how much latents differ.

Each item's own latents are recorded first. Then every item is asked again with as many steps, and each step's latent is
replaced as an intervention says, the rest of the run going its own way. Where nothing changes, the latents were idle.

Legend: D hidden, T steps.

Source: CapImagine (2602.22766) asks for such tests of latent reasoning; Vedas (arXiv 2604.10500) has none.
Deviates: the two counterfactual swaps are ours: a donor's first latent names another start, its last one another end,
    and the item's own board says which answer must then come.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mmroute import hub
from mmroute.bench import stats
from mmroute.bench.items import Plan, draw, load_task, messages
from mmroute.config import resolved
from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe, equip
from mmroute.tasks._grid import step as moved
from mmroute.tasks.base import Generated, Sample, Spec, Task
from mmroute.think.base import Thinker, Thought

__all__ = [
    "CHANGES",
    "INTERVENTIONS",
    "Collapse",
    "Effect",
    "Point",
    "Report",
    "collapse",
    "intervene",
    "lines",
    "picture",
    "survey",
]


@dataclass(frozen=True)
class Effect:
    """What one change did to the answers."""

    accuracy: float
    n: int
    diff: float
    """Of accuracy to the untouched run on the same items, with its interval."""
    low: float
    high: float
    predicted: float | None = None
    """Share of the answers that are the one the change calls for, where it calls for one."""


@dataclass(frozen=True)
class Collapse:
    """How much latents tell inputs and steps apart."""

    cosine_inputs: float
    """Mean cosine of one step's latents between items; above .95 they hardly depend on the input."""
    cosine_steps: float
    """Mean cosine of one item's latents between steps."""
    effective_rank: float
    """(sum of singular values)^2 over the sum of their squares, of all latents less their mean."""
    between_inputs: float
    """Share of the variance that lies between items, of one step."""
    collapsed: bool


@dataclass(frozen=True)
class Report:
    """All of it, of one recipe on one task."""

    task: str
    recipe: str
    n: int
    seed: int
    accuracy: float
    steps: dict[str, int]
    """Items by number of latent steps."""
    collapse: Collapse
    effects: dict[str, Effect]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Item:
    sample: Sample
    chat: list[dict[str, Any]]
    latents: Float[Tensor, "T D"]
    answer: str
    right: bool


_Change = Callable[[list[_Item], list[_Item], int, Float[Tensor, "B D"]], Float[Tensor, "B D"]]
"""(items of a batch, their donors, step, own latents now) -> latents in their place."""


def _own(items: list[_Item], step: int) -> Float[Tensor, "B D"]:
    return torch.stack([item.latents[step] for item in items])


def _noise(items: list[_Item], donors: list[_Item], step: int, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randn(z.shape, generator=generator).to(z)
    return drawn * z.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)


def _swapped(items: list[_Item], donors: list[_Item], step: int, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    other = step ^ 1
    return _own(items, other) if other < len(items[0].latents) else z


INTERVENTIONS: Mapping[str, _Change] = {
    "none": lambda items, donors, step, z: z,
    "zero": lambda items, donors, step, z: torch.zeros_like(z),
    "mean": lambda items, donors, step, z: _own(items, step).mean(0, keepdim=True).expand_as(z),
    "noise": _noise,
    "shuffle": lambda items, donors, step, z: _own(donors, step),
    "swap": _swapped,
    "donor_first": lambda items, donors, step, z: _own(donors, step) if step == 0 else z,
    "donor_last": lambda items, donors, step, z: _own(donors, step) if step == len(items[0].latents) - 1 else z,
}
"""What stands in the place of each latent: itself, nothing, the mean of the batch, noise of its length, another item's,
its neighbour's, or another item's in the first or last step only."""

CHANGES = (*INTERVENTIONS, "drop_copies", "random_copies", "fewer_steps")
"""All that can be changed: latents, and what is copied beside them, and how many there are."""


@torch.no_grad()
def intervene(
    model: Any,
    recipe: Recipe,
    plan: Plan,
    names: Sequence[str] = CHANGES,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Asks a plan's items as the recipe says, then again under each intervention.

    Args:
        model: a loaded stock model with its processor, or a name.
        recipe: thinks in latents.
        plan: task, items, seed and batch.
        names: some of `CHANGES`.
        progress: told the intervention, items done and items in all.

    Raises:
        ConfigError: the recipe takes no latent steps, or no such intervention.
    """
    wrong = [name for name in names if name not in CHANGES]
    if wrong:
        raise ConfigError(f"no intervention named {', '.join(wrong)}; one of {', '.join(CHANGES)}")
    task = load_task(plan.task)
    samples = draw(task, plan)
    with equip(model, recipe) as (routed, think):
        if not think.num_latents:
            raise ConfigError(f"recipe {recipe.name} takes no latent steps; use one whose `think` does")
        items: list[_Item] = []
        for start in range(0, len(samples), plan.batch):
            items += _recorded(routed, think, task, samples[start : start + plan.batch])
            if progress is not None:
                progress("untouched", len(items), len(samples))
        effects = {}
        for name in names:
            effects[name] = _effect(routed, think, task, items, name, plan.batch)
            if progress is not None:
                progress(name, len(samples), len(samples))
    counts: dict[str, int] = defaultdict(int)
    for item in items:
        counts[str(len(item.latents))] += 1
    accuracy = fmean(item.right for item in items)
    steps = dict(sorted(counts.items(), key=lambda pair: int(pair[0])))
    return Report(plan.task, recipe.name, plan.n, plan.seed, accuracy, steps, collapse(items_latents(items)), effects)


def items_latents(items: Sequence[_Item]) -> list[Float[Tensor, "T D"]]:
    """Latents of each item that took any."""
    return [item.latents for item in items if len(item.latents)]


def _recorded(routed: Routed, think: Thinker, task: Task, samples: Sequence[Sample]) -> list[_Item]:
    chats = [messages(routed, task, sample, think) for sample in samples]
    seen: list[Tensor] = []

    def record(step: int, thought: Thought) -> Thought:
        seen.append(thought.embeds[:, -1])
        return thought

    answers = routed.answer_many(chats, think=think, edit=record)
    out = []
    for b, (sample, chat, answer) in enumerate(zip(samples, chats, answers, strict=True)):
        own = [z[b] for z in seen[: answer.latents]]
        latents = torch.stack(own) if own else torch.empty(0, routed.controller.shape.hidden)
        out.append(_Item(sample, chat, latents, answer.text, bool(task.score(sample, answer.text).correct)))
    return out


def _effect(routed: Routed, think: Thinker, task: Task, items: list[_Item], name: str, batch: int) -> Effect:
    groups: dict[tuple[int, Any], list[_Item]] = defaultdict(list)
    for item in items:
        if len(item.latents):
            groups[len(item.latents), item.sample.difficulty.get("hops")].append(item)
    before: list[int] = []
    after: list[int] = []
    called: list[int] = []
    several = {key: rows for key, rows in groups.items() if len(rows) > 1}  # who is alone has no donor
    for (steps, _), rows in sorted(several.items(), key=lambda pair: str(pair[0])):
        donors = rows[1:] + rows[:1]  # the same task, difficulty and number of steps
        for start in range(0, len(rows), batch):
            part, given = rows[start : start + batch], donors[start : start + batch]
            texts = _again(routed, think, part, given, name, steps)
            for item, donor, text in zip(part, given, texts, strict=True):
                before.append(int(item.right))
                after.append(int(task.score(item.sample, text).correct or 0))
                wanted = _called_for(task, item.sample, donor.sample, name)
                if wanted is not None:
                    called.append(int(task.score(replace(item.sample, answer=wanted), text).correct or 0))
    if not after:
        return Effect(0.0, 0, 0.0, 0.0, 0.0)
    difference = stats.paired_bootstrap(after, before)
    share = fmean(called) if called else None
    return Effect(fmean(after), len(after), difference.diff, difference.low, difference.high, share)


def _again(routed: Routed, think: Thinker, items: list[_Item], donors: list[_Item], name: str, steps: int) -> list[str]:
    """Answers under an intervention, with the number of steps that the items took by themselves."""
    options = {**resolved(think.config), "num_latents": steps, "stop": "fixed"}
    if name == "random_copies" and "replay_pick" in options:
        options["replay_pick"] = "random"
    if name == "fewer_steps":
        options["num_latents"] = steps - 1
    kind = hub.name_of("think", type(think))
    again = hub.load("think", kind, **options) if kind is not None else type(think)(**options)
    again.learned = think.learned

    def edit(step: int, thought: Thought) -> Thought:
        if name == "drop_copies":
            valid = thought.valid.clone()
            valid[:, :-1] = False
            return replace(thought, valid=valid)
        if name not in INTERVENTIONS:
            return thought
        z = INTERVENTIONS[name](items, donors, step, thought.embeds[:, -1])
        return replace(thought, embeds=torch.cat([thought.embeds[:, :-1], z[:, None].to(thought.embeds)], 1))

    return [a.text for a in routed.answer_many([item.chat for item in items], think=again, edit=edit)]


def _called_for(task: Task, sample: Sample, donor: Sample, name: str) -> str | None:
    """The answer that a donor's latent calls for on the item's own board; None where it says nothing.

    Known for `arrows`, where a state is a cell: a donor's first latent is another start, its last another end.
    """
    if name not in ("donor_first", "donor_last") or not isinstance(task, Generated) or task.name != "arrows":
        return None
    own, other = (Spec.from_dict(s.meta["spec"]) for s in (sample, donor))
    path = task.trace(other)
    cell = path[0 if name == "donor_first" else -1].cell
    assert cell is not None
    here = (cell[0] + other.offset[0] - own.offset[0], cell[1] + other.offset[1] - own.offset[1])
    if not all(0 <= x < own.n for x in here):
        return None
    if name == "donor_first":
        for _ in range(own.world["k"]):
            here = moved(here, own.world["arrows"][here[0]][here[1]])
    colour = own.world["colours"][here[0]][here[1]]
    return task.choices(own)[colour].label


def collapse(latents: Sequence[Float[Tensor, "T D"]]) -> Collapse:
    """Whether latents differ.

    Args:
        latents: of each item; items may differ in steps.

    Raises:
        ConfigError: fewer than two items have latents.
    """
    if len(latents) < 2:
        raise ConfigError(f"latents of {len(latents)} items given; at least 2 are compared")
    across, between = [], []
    for step in range(max(map(len, latents))):
        rows = torch.stack([z[step] for z in latents if len(z) > step]).float()
        if len(rows) > 1:
            unit = F.normalize(rows, dim=-1)
            total = unit.sum(0).square().sum() - len(rows)  # cosines of all pairs, each twice
            across.append(float(total) / (len(rows) * (len(rows) - 1)))
            spread = (rows - rows.mean(0)).square().sum()
            between.append(float(spread / rows.square().sum()))
    along = [
        float(F.cosine_similarity(a, b, dim=0))
        for z in latents
        for a, b in itertools.combinations(z.float(), 2)
    ]  # fmt: skip
    every = torch.cat([z.float() for z in latents])
    values = torch.linalg.svdvals(every - every.mean(0))
    rank = float(values.sum() ** 2 / values.square().sum().clamp(min=1e-12))
    cosine = fmean(across)
    return Collapse(cosine, fmean(along) if along else 1.0, rank, fmean(between), cosine > 0.95)


@dataclass(frozen=True)
class Point:
    """One latent on a plane."""

    item: str
    step: int
    x: float
    y: float
    words: list[str]
    """What the model's head reads off it, best first."""


@torch.no_grad()
def survey(
    model: Any,
    recipe: Recipe,
    plan: Plan,
    words: int = 3,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Collapse, list[Point]]:
    """Where the latents of a plan's items lie (their two principal components) and what they say.

    Args:
        model: a loaded stock model with its processor, or a name.
        recipe: thinks in latents.
        plan: task, items, seed and batch.
        words: how many are read off each.
        progress: told what is done, items done and items in all.

    Raises:
        ConfigError: the recipe takes no latent steps.
    """
    task = load_task(plan.task)
    samples = draw(task, plan)
    with equip(model, recipe) as (routed, think):
        if not think.num_latents:
            raise ConfigError(f"recipe {recipe.name} takes no latent steps; use one whose `think` does")
        items: list[_Item] = []
        for start in range(0, len(samples), plan.batch):
            items += _recorded(routed, think, task, samples[start : start + plan.batch])
            if progress is not None:
                progress("latents", len(items), len(samples))
        found = collapse(items_latents(items))
        every = torch.cat(items_latents(items)).float()
        # What is fed back is the state times one number, which changes no order.
        top = routed.family.head(routed.model, every.to(routed.model.dtype)).topk(words, dim=-1).indices.tolist()
        tokenizer = routed.processor.tokenizer
    centred = every - every.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    plane = (centred @ axes[:2].T).tolist()
    names = [(item.sample.id, step) for item in items for step in range(len(item.latents))]
    points = [
        Point(name, step + 1, round(x, 4), round(y, 4), [tokenizer.decode([i]) for i in best])
        for (name, step), (x, y), best in zip(names, plane, top, strict=True)
    ]
    return found, points


_COLOURS = ("#b5402a", "#1f6f8b", "#5b8c3a", "#8a5a9e", "#c98a1b", "#3d3d3d", "#c2557f", "#3a9c8f")


def picture(points: Sequence[Point], title: str) -> str:
    """The points as a self-contained SVG, a colour for each step; the word that the head reads is the tooltip."""
    width, height, edge = 560, 420, 40
    xs, ys = [p.x for p in points], [p.y for p in points]
    wide, high = max(xs) - min(xs) or 1.0, max(ys) - min(ys) or 1.0
    dots = "".join(
        f'<circle cx="{edge + (width - 2 * edge) * (p.x - min(xs)) / wide:.1f}" '
        f'cy="{height - edge - (height - 2 * edge) * (p.y - min(ys)) / high:.1f}" r="3" fill-opacity="0.7" '
        f'fill="{_COLOURS[(p.step - 1) % len(_COLOURS)]}"><title>{_safe(f"{p.item}, step {p.step}: {p.words[0]}")}'
        "</title></circle>"
        for p in points
    )
    steps = sorted({p.step for p in points})
    legend = "".join(
        f'<text x="{width - edge + 6}" y="{edge + 16 * i}" fill="{_COLOURS[(s - 1) % len(_COLOURS)]}">{s}</text>'
        for i, s in enumerate(steps[:24])
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"
 font-size="12">
<rect width="{width}" height="{height}" fill="white"/>
<text x="{edge}" y="20" font-size="14">{_safe(title)}</text>
{dots}
{legend}
</svg>
"""


def _safe(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def lines(report: Report) -> list[str]:
    """What a person wants to know of it."""
    c = report.collapse
    out = [
        f"{report.task}, seed {report.seed}, {report.n} items, recipe {report.recipe}: accuracy {report.accuracy:.3f}",
        f"latent steps: {', '.join(f'{n} items take {k}' for k, n in report.steps.items())}",
        f"cosine between items {c.cosine_inputs:.3f}, between steps {c.cosine_steps:.3f}, effective rank "
        f"{c.effective_rank:.1f}, variance between items {c.between_inputs:.2f}"
        + (" -- COLLAPSED: latents hardly depend on the input" if c.collapsed else ""),
        f"{'latents are':16} {'accuracy':>8}  change [95 %]             as called for",
    ]
    for name, e in report.effects.items():
        share = "" if e.predicted is None else f"{e.predicted:.3f}"
        out.append(f"{name:16} {e.accuracy:8.3f}  {e.diff:+.3f} [{e.low:+.3f}, {e.high:+.3f}]   {share}")
    return out
