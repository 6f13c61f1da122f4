"""All gates of a bench recipe on one pair of models: asked once, judged on the same answers, each charged its overhead.

mmroute bench --recipe bench-gate --dry             # how much there is to ask, and the CPU time it will take
mmroute bench --recipe bench-gate --n 100           # a short one
mmroute bench --recipe bench-gate --set gate.draft=DIR --set gate.target=DIR --set gate.rater=DIR
"""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from mmroute import hub
from mmroute import recipe as recipes
from mmroute.bench import deferral, gate_report, grid, schema
from mmroute.bench.gate_gather import Gathered, gather, rate_chats
from mmroute.bench.gate_judge import BUDGETS, Case, Scored, costs_of, judge, score_gates
from mmroute.bench.gate_pair import by_part, open_pair
from mmroute.bench.gate_schema import Claims, GateResult, GateSet, Judged
from mmroute.bench.gate_time import timed
from mmroute.bench.outcomes.base import Outcomes
from mmroute.bench.simulation import NOISES, simulate
from mmroute.config import options, overrides, parse, read_yaml, resolved
from mmroute.gate.base import Ratings, score_of
from mmroute.gate.prp import Prp, fingerprint
from mmroute.recipe import Recipe
from mmroute.train.prompts import chats_of
from mmroute.train.prp_config import GateConfig, sections
from mmroute.train.recipe import merge

__all__ = ["ATTAINABLE", "OURS", "VERIFIED", "GateBench", "Plan", "is_gate_bench", "read", "run"]

log = logging.getLogger(__name__)

OURS = "prp"
VERIFIED = "prp, a quarter of the budget on a second look"
ATTAINABLE = "attainable: kinds known by heart"
_TRAIN_SEED = 1000
"""Beyond what the rater was trained on: its calibration and the baselines' fits share no question."""
_PROBE = 64
"""Questions asked to tell how long the rest will take."""


@options
class GateBench:
    """A bench recipe: what is compared on which pair."""

    name: str = "bench-gate"
    recipe: str = "prp-small"
    """The pair, the mixture and the rater."""
    set: dict[str, Any] = field(default_factory=dict)
    """Changes to that recipe, as `path: value`."""
    gates: Annotated[list[Case], Field(min_length=1)]
    n: Annotated[int, Field(ge=10)] = 1000
    """Questions that are judged, per seed."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=_TRAIN_SEED)]], Field(min_length=1)] = field(
        default_factory=lambda: [0, 1, 2]
    )
    train: Annotated[int, Field(ge=0)] = 2600
    """Questions that supervised baselines are fitted on."""
    samples: Annotated[int, Field(ge=0)] = 4
    """Sampled draft answers for self-consistency; 0 is none."""
    resamples: Annotated[int, Field(ge=10)] = 500
    timed: Annotated[int, Field(ge=0)] = 24
    """Questions that are timed one by one; 0 is none."""
    timed_together: Annotated[int, Field(ge=0)] = 32
    """Questions of the batch that is timed; 0 is none."""
    work: str = "runs/bench-gate"
    """Folder of collected answers; a bench that was killed goes on from it."""


def is_gate_bench(name: str) -> bool:
    """Whether a bench recipe compares gates; errors as in `bench.grid.path_of`."""
    return "gates" in read_yaml(grid.path_of(name))


def read(name: str, changes: Sequence[str] = (), n: int = 0) -> GateBench:
    """A bench recipe by name or path.

    Args:
        name: shipped name, or path.
        changes: `path=value`; those of `gate.` and `think.` are made to the recipe of the pair.
        n: questions per seed, and as many fewer to fit on; 0 is the recipe's.

    Raises:
        ConfigError: no such recipe, or an option that is not allowed.
    """
    file = grid.path_of(name)
    theirs = [text for text in changes if text.startswith(("gate.", "think."))]
    own = overrides([text for text in changes if text not in theirs])
    found: GateBench = parse(GateBench, merge({"name": file.stem, **read_yaml(file)}, own), f"bench {file.stem}")
    found = replace(found, set={**found.set, **dict(map(_change, theirs))})
    if n:
        train = found.train if "train" in own else round(found.train * n / found.n)
        found = parse(GateBench, {**resolved(found), "n": n, "train": train}, f"bench {file.stem}")
    return found


def _change(text: str) -> tuple[str, Any]:
    """Path and value of `path=value`."""
    path, value = text.partition("=")[0], overrides([text])
    for part in path.split("."):
        value = value[part]
    return path, value


@dataclass(frozen=True)
class Plan:
    """What a bench has to ask, and on what."""

    bench: GateBench
    recipe: Recipe
    draft: Any
    target: Any
    rater: Prp
    questions: list[Any]
    """What gates ask the draft besides."""

    @classmethod
    def of(cls, bench: GateBench, draft: Any = None, target: Any = None, rater: Prp | None = None) -> "Plan":
        """Reads the recipe and opens what it names, where it is not given.

        Raises:
            ConfigError: the recipe has no gate, or names no rater.
            CheckpointMismatch: a model or the rater is not there, or they do not fit.
        """
        recipe = recipes.read(bench.recipe, [f"{path}={json.dumps(value)}" for path, value in bench.set.items()])
        gated, _ = sections(recipe)
        questions = {q.name: q for c in bench.gates for q in hub.load("gate", c.name, **c.options).questions}
        return cls(bench, recipe, *open_pair(gated, draft, target, rater), list(questions.values()))

    @property
    def work(self) -> Path:
        return Path(self.bench.work)

    @property
    def answers(self) -> int:
        """How many answers the whole bench is made of; questions besides not counted."""
        return 2 * self.bench.train + len(self.bench.seeds) * self.bench.n * (2 + self.bench.samples)

    def left(self) -> int:
        """How many of them are not in the folder yet; answers of other weights that lie there do not count."""
        known = 0
        for name, model in (("draft", self.draft), ("samples", self.draft), ("target", self.target)):
            file, revision = self.work / f"{name}.jsonl", f'"{fingerprint(model)[:16]}"'
            if file.exists():
                with file.open(encoding="utf-8") as lines:
                    known += sum(revision in line for line in lines if line.endswith("\n"))
        return max(0, self.answers - known)

    def test(self, seed: int, n: int) -> Gathered:
        """Questions that are judged."""
        given: dict[str, Any] = {"samples": self.bench.samples, "questions": self.questions, "work": self.work}
        return gather(self.recipe, self.draft, self.target, n, seed, "test", **given)

    def train(self) -> Gathered:
        """Questions that baselines are fitted on."""
        return gather(self.recipe, self.draft, self.target, self.bench.train, _TRAIN_SEED, "val", work=self.work)

    def expected(self) -> str:
        """How much is left to ask and for how long, after asking the first few questions; they are kept."""
        began, before = time.process_time(), self.left()
        asked = self.test(self.bench.seeds[0], min(_PROBE, self.bench.n)).asked
        each, left = (time.process_time() - began) / max(asked, 1), self.left()
        told = f"{self.answers} answers, {before} not known before"
        if not asked:
            return f"{told}; none of the first {_PROBE} questions had to be asked again, so no time can be told"
        return f"{told}; {1000 * each:.0f} ms each: about {each * left / 60:.1f} min of CPU to go"


def run(
    plan: Plan, *, out: Path | None = None, command: str = "", progress: Callable[[str], None] = log.info
) -> GateResult:
    """All gates of a bench recipe on its pair.

    Args:
        plan: from `Plan.of`.
        out: folder of the result, JSON and SVG; None writes nothing.
        command: what the user typed.
        progress: told what is being done.
    """
    origin, began = schema.commit_of_source(), time.perf_counter()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    bench, rater = plan.bench, plan.rater
    progress(plan.expected())
    train = None
    if bench.train:
        progress(f"{bench.train} questions to fit on")
        train = plan.train()
    tests = []
    for seed in bench.seeds:
        progress(f"seed {seed}: {bench.n} questions")
        tests.append(plan.test(seed, bench.n))
    progress("judging")
    outcomes = Outcomes.joined([test.outcomes for test in tests])
    evidence = [each for test in tests for each in test.evidence]
    think = plan.recipe.build("think")
    rated = rate_chats(rater, chats_of(plan.draft, [item for test in tests for item in test.items], think))
    scored = [
        *_own(rater, rated, outcomes),
        *score_gates(bench.gates, train.evidence if train else [], evidence),
        Scored(ATTAINABLE, "outcome", deferral.attainable(outcomes.pair, [k for t in tests for k in t.kinds])),
    ]
    of_seed = np.repeat(bench.seeds, bench.n)
    start = {b: rater.start(b) for b in BUDGETS}
    pooled = _set(scored, outcomes, bench.resamples, start)
    seeds = {}
    for seed in bench.seeds:
        here = of_seed == seed
        part = _set([each.take(here) for each in scored], outcomes.take(here), 0, start)
        bare = {title: replace(each, curve={}) for title, each in part.gates.items()}
        seeds[str(seed)] = replace(part, gates=bare)
    gated, _ = sections(plan.recipe)
    result = GateResult(
        run=schema.run_here(command, *origin, started_at, time.perf_counter() - began),
        machine=schema.machine_here("cpu", str(gated.dtype or "checkpoint"), "sdpa"),
        recipe=resolved(bench),
        pair={
            "draft": gated.draft,
            "target": gated.target,
            "draft_weights": fingerprint(plan.draft),
            "target_weights": fingerprint(plan.target),
        },
        artifact=str(rater.facts.get("artifact", "")),
        train=bench.train,
        seeds=seeds,
        pooled=pooled,
        claims=_claims(plan, pooled, scored[0], outcomes),
        simulation={str(noise): simulate(noise, n=50_000) for noise in NOISES},
    )
    if out is not None:
        gate_report.write(result, out)
    return result


def _own(rater: Prp, rated: Ratings, outcomes: Outcomes) -> list[Scored]:
    """The rater under each way to rank, the recipe's own first, and with a second look at finished answers."""
    assert rated.draft is not None
    looked: dict[str, Any] = {"needs": rater.needs, "steps": rater.steps}
    out = [Scored(OURS, score=rated.score, ratings=rated, **looked)]
    if rated.target is not None:
        for mode in ("draft", "target", "joint"):
            score = score_of(mode, rated.draft, rated.target)
            bare = Ratings(score, overhead=rated.overhead)
            out.append(Scored(f"{OURS} by {mode}", score=score, ratings=bare, **looked))
    verifier = rater.verifier
    if verifier is not None and "lp_mean" in outcomes.stats:
        again = verifier.score(rated.draft, rated.target, outcomes.stats["lp_mean"])
        bare, share = Ratings(rated.score, overhead=rated.overhead), GateConfig.verify_share
        out.append(Scored(VERIFIED, score=rated.score, ratings=bare, second=again, verify_share=share, **looked))
    return out


def _set(scored: Sequence[Scored], outcomes: Outcomes, resamples: int, start: dict[float, float | None]) -> GateSet:
    """All gates on some queries; only our own score has a threshold to start from."""
    ours = scored[0].score
    gates: dict[str, Judged] = {}
    for each in scored:
        own = each.title == OURS
        gates[each.title] = judge(each, outcomes, None if own else ours, resamples, start if own else None)
    return GateSet(
        n=len(outcomes),
        groups=len(set(outcomes.groups)),
        accuracy_draft=float(outcomes.draft.mean()),
        accuracy_target=float(outcomes.target.mean()),
        flops_draft=float(outcomes.draft_cost.mean()),
        flops_target=float(outcomes.target_cost.mean()),
        by_part=by_part(outcomes),
        gates=gates,
    )


def _claims(plan: Plan, pooled: GateSet, ours: Scored, outcomes: Outcomes) -> Claims:
    own, attainable = pooled.gates[OURS], pooled.gates[ATTAINABLE].figures["ong"]
    ahead: dict[str, dict[str, tuple[float, float | None, float | None]]] = {}
    for title, each in pooled.gates.items():
        if title.startswith(OURS) or each.needs == "outcome" or each.skipped:
            continue
        ahead[title] = {b: (own.at[b] - each.at[b], *each.intervals[f"rival_lead_at_{b}"]) for b in own.at}
    gain = own.figures["ong"]
    speed_up = own.figures["speed_up_lossless"]
    alone, together = (_timed(plan, ours, outcomes, each) for each in (1, plan.bench.timed_together))
    overhead = 0.0 if ours.ratings is None else ours.ratings.overhead.flops or 0.0
    return Claims(
        oracle_gain=gain,
        oracle_gain_ci95=own.intervals["ong"],
        attainable=attainable,
        of_attainable=gain / attainable if gain is not None and attainable else None,
        accuracy_over_target_at_40=own.figures["gain_on_target_at_40"],
        accuracy_over_target_at_40_ci95=own.intervals["gain_on_target_at_40"],
        flops_at_equal_accuracy=None if speed_up is None else 1 / speed_up,
        time_at_equal_accuracy=alone.get("ratio"),
        time_at_equal_accuracy_together=together.get("ratio"),
        rating_decode_steps=alone.get("rating_steps"),
        rating_flops=float(overhead / outcomes.prefill_cost.mean()),
        ahead=ahead,
        not_ahead=[f"{title} at {b}" for title, leads in ahead.items() for b, lead in leads.items() if lead[0] <= 0],
    )


def _timed(plan: Plan, ours: Scored, outcomes: Outcomes, at_once: int) -> dict[str, float]:
    """Seconds at the least share of target calls whose accuracy is that of always-target."""
    num = plan.bench.timed if at_once == 1 else at_once
    if not num:
        return {}
    made = deferral.curve(ours.score, outcomes.pair, **costs_of(ours, outcomes))
    share = made.share[np.flatnonzero(made.accuracy >= made.accuracy[-1] - 1e-12)[0]]
    sent = ours.score > np.quantile(ours.score, 1 - share) if share < 1 else np.full(len(ours.score), True)
    first = sent[: plan.bench.n]
    return timed(plan.recipe, plan.draft, plan.target, plan.rater, first, num, plan.bench.seeds[0], at_once)
