"""Whether latents carry the reasoning: the same questions with the latents changed, and how much latents differ.

Each item's own latents are recorded first. Then every item is asked again with as many steps, and each step's latent is
replaced as an intervention says, the rest of the run going its own way. Where nothing changes, the latents were idle.

Legend: D hidden, T steps.

Source: CapImagine (2602.22766) asks for such tests of latent reasoning; Vedas (arXiv 2604.10500) has none.
Deviates: the two counterfactual swaps are ours: a donor's first latent names another start, its last one another end,
    and the item's own board says which answer must then come.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmroute import hub
from mmroute.backbones.images import prepare
from mmroute.bench import stats
from mmroute.bench.items import Plan, draw, load_task
from mmroute.bench.latent_space import Collapse, collapse
from mmroute.bench.record_latents import Item, latents_of, recorded
from mmroute.cache import RaggedCache
from mmroute.config import resolved
from mmroute.decoding import end_ids
from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe, equip
from mmroute.session import Session
from mmroute.tasks._grid import step as moved
from mmroute.tasks.base import Generated, Sample, Spec, Task
from mmroute.think.base import LatentThinker, Thought
from mmroute.tokens import Modality

__all__ = ["CHANGES", "INTERVENTIONS", "Effect", "Report", "forget_latents", "intervene", "lines"]


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
    predicted_crossing: float | None = None
    """The same where the walk that it calls for crosses itself, as no walk of these worlds does."""


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


_Change = Callable[[list[Item], list[Item], int, Float[Tensor, "B D"]], Float[Tensor, "B D"]]
"""(items of a batch, their donors, step, own latents now) -> latents in their place."""


def _own(items: list[Item], step: int) -> Float[Tensor, "B D"]:
    return torch.stack([item.latents[step] for item in items])


def _noise(items: list[Item], donors: list[Item], step: int, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randn(z.shape, generator=generator).to(z)
    return drawn * z.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)


def _swapped(items: list[Item], donors: list[Item], step: int, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
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

CHANGES = (*INTERVENTIONS, "mask", "drop_copies", "random_copies", "fewer_steps")
"""All that can be changed: latents, who sees them, what is copied beside them, and how many there are."""


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
        items: list[Item] = []
        for start in range(0, len(samples), plan.batch):
            items += recorded(routed, think, task, samples[start : start + plan.batch])
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
    return Report(plan.task, recipe.name, plan.n, plan.seed, accuracy, steps, collapse(latents_of(items)), effects)


def _effect(routed: Routed, think: LatentThinker, task: Task, items: list[Item], name: str, batch: int) -> Effect:
    groups: dict[tuple[int, Any], list[Item]] = defaultdict(list)
    for item in items:
        if len(item.latents):
            groups[len(item.latents), item.sample.difficulty.get("hops")].append(item)
    before: list[int] = []
    after: list[int] = []
    called: dict[bool, list[int]] = {False: [], True: []}
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
                    answer, crosses = wanted
                    right = task.score(replace(item.sample, answer=answer), text).correct
                    called[crosses].append(int(right or 0))
    if not after:
        return Effect(0.0, 0, 0.0, 0.0, 0.0)
    difference = stats.paired_bootstrap(after, before)
    shares = [fmean(called[crosses]) if called[crosses] else None for crosses in (False, True)]
    return Effect(fmean(after), len(after), difference.diff, difference.low, difference.high, *shares)


def _again(
    routed: Routed, think: LatentThinker, items: list[Item], donors: list[Item], name: str, steps: int
) -> list[str]:
    """Answers under an intervention, with the number of steps that the items took by themselves."""
    options = {**resolved(think.config), "num_latents": steps, "stop": "fixed"}
    if name == "random_copies" and "replay_pick" in options:
        options["replay_pick"] = "random"
    if name == "fewer_steps":
        options["num_latents"] = steps - 1
    kind = hub.name_of("think", type(think))
    again: LatentThinker = hub.load("think", kind, **options) if kind is not None else type(think)(**options)
    again.learned = think.learned
    if name == "mask":
        return _masked(routed, again, items)

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


def _masked(routed: Routed, think: LatentThinker, items: list[Item]) -> list[str]:
    """Answers where no later position sees a latent: what it holds goes on through the state that is fed back alone."""
    session = Session(routed)
    session.append(prepare(routed.model, routed.processor, [item.chat for item in items]), think=think)

    def hide(step: int, thought: Thought) -> Thought:
        if step:
            forget_latents(session.cache)
        return thought

    logits = session.think(think, list(range(len(items))), hide)
    forget_latents(session.cache)
    ends, written = end_ids(routed), [list[int]() for _ in items]
    hop = 1 + max(session.latents.values())
    for step in range(think.max_new_tokens):
        ids = logits.argmax(-1)
        for row, value in zip(session.rows, ids.tolist(), strict=True):
            written[row].append(value)
        stays = [i for i, value in enumerate(ids.tolist()) if value not in ends]
        if not stays or step + 1 == think.max_new_tokens:
            break
        if len(stays) < len(ids):
            session.keep_rows(stays)
            ids = ids[stays]
        logits = session.step(ids, [hop] * len(ids))
    return [routed.processor.tokenizer.decode(row, skip_special_tokens=True) for row in written]


def forget_latents(cache: RaggedCache) -> None:
    """Takes the keys of all latents out of every layer, those of extra passes too."""
    latent = cache.meta["modality"] == Modality.LATENT
    for layer in (layer for each in (cache, *cache.depth) for layer in each.layers):
        if layer.n and any(layer.n):
            at = layer.pos[:, : max(layer.n)].long()
            stays = (at >= 0) & ~latent.gather(1, at.clamp(min=0))
            counts = stays.sum(1).tolist()
            if counts != layer.n:
                layer.keep(stays, counts)


def _called_for(task: Task, sample: Sample, donor: Sample, name: str) -> tuple[str, bool] | None:
    """The answer that a donor's latent calls for on the item's own board, and whether the walk there crosses itself;
    None where it says nothing.

    Known for `arrows`, where a state is a cell: a donor's first latent is another start, its last another end.
    """
    if name not in ("donor_first", "donor_last") or not isinstance(task, Generated) or task.name != "arrows":
        return None
    own, other = (Spec.from_dict(s.meta["spec"]) for s in (sample, donor))
    path = task.trace(other)
    cell = path[0 if name == "donor_first" else -1].cell
    assert cell is not None
    walk = [(cell[0] + other.offset[0] - own.offset[0], cell[1] + other.offset[1] - own.offset[1])]
    if not all(0 <= x < own.n for x in walk[0]):
        return None
    if name == "donor_first":
        for _ in range(own.world["k"]):
            row, column = walk[-1]
            walk.append(moved(walk[-1], own.world["arrows"][row][column]))
    row, column = walk[-1]
    return task.choices(own)[own.world["colours"][row][column]].label, len(set(walk)) < len(walk)


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
        share += "" if e.predicted_crossing is None else f" ({e.predicted_crossing:.3f} on walks that cross)"
        out.append(f"{name:16} {e.accuracy:8.3f}  {e.diff:+.3f} [{e.low:+.3f}, {e.high:+.3f}]   {share}")
    return out
