"""All gates of a bench recipe on one pair of models, each charged what it looked at: `run(read("bench-gate"))`."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mmroute import hub
from mmroute import recipe as recipes
from mmroute.bench import gate_report, schema
from mmroute.bench.gate_judge import Case, Scored, judge, score_gates
from mmroute.bench.gate_pair import gather, open_pair
from mmroute.bench.simulation import NOISES, simulate
from mmroute.config import options, overrides, parse, read_yaml
from mmroute.errors import ConfigError
from mmroute.gate.base import Ratings, score_of
from mmroute.train.prp import sections
from mmroute.train.recipe import merge

__all__ = ["GateBench", "read", "run"]

log = logging.getLogger(__name__)

SCHEMA = "gate/1"
_RECIPES = Path(__file__).parent.parent / "recipes" / "bench"


@options
class GateBench:
    """A bench recipe: what is compared on which pair."""

    name: str = "bench-gate"
    recipe: str = "prp-small"
    """The pair, the mixture and the rater."""
    gates: list[Case]
    n: Annotated[int, Field(ge=10)] = 1000
    """Questions that are judged, per seed."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    train: Annotated[int, Field(ge=0)] = 1500
    """Questions that supervised baselines are fitted on."""
    samples: Annotated[int, Field(ge=0)] = 4
    """Sampled draft answers for self-consistency; 0 is none."""
    resamples: Annotated[int, Field(ge=10)] = 500


def read(name: str, changes: Sequence[str] = ()) -> GateBench:
    """A bench recipe by name or path.

    Raises:
        ConfigError: no such recipe, or an option that is not allowed.
    """
    path = next((p for p in (_RECIPES / f"{name}.yaml", Path(name)) if p.is_file()), None)
    if path is None:
        raise ConfigError(
            f"no bench recipe {name!r}; one of {', '.join(sorted(p.stem for p in _RECIPES.glob('*.yaml')))}"
        )
    return parse(
        GateBench, merge({"name": path.stem, **read_yaml(path)}, overrides(list(changes))), f"recipe {path.stem}"
    )


def run(
    recipe: GateBench,
    *,
    draft: Any = None,
    target: Any = None,
    rater: Any = None,
    out: Path | None = None,
    command: str = "",
    progress: Callable[[str], None] = log.info,
) -> dict[str, Any]:
    """All gates of a bench recipe on its pair, seed by seed; written as JSON, Markdown and SVG.

    Args:
        recipe: from `read`.
        draft: a loaded model; None loads what the recipe names, as for the next two.
        target: likewise.
        rater: a `Prp` on this draft.
        out: folder of the result; None writes nothing.
        command: what the user typed.
        progress: told what is being done.

    Returns:
        What stands in the JSON file.
    """
    commit, dirty = schema.commit_of_source()
    began = time.time()
    chosen = recipes.read(recipe.recipe)
    gated, _ = sections(chosen)
    draft, target, rater = open_pair(gated, draft, target, rater)
    train = None
    if recipe.train:
        progress(f"{recipe.train} questions to fit on")
        # Beyond what the rater was trained on, by the seed: its calibration and these fits share no question.
        train = gather(chosen, draft, target, recipe.train, 1000, "val")
    questions = [q for case in recipe.gates for q in hub.load("gate", case.name, **case.options).questions]
    seeds: dict[str, Any] = {}
    for seed in recipe.seeds:
        progress(f"seed {seed}: {recipe.n} questions")
        test = gather(chosen, draft, target, recipe.n, seed, "test", rater, recipe.samples, questions)
        scored = score_gates(recipe.gates, train.evidence if train else [], test.evidence)
        assert test.rated is not None
        ours = _prp_scores(test.rated)
        judged = [judge(each, test.outcomes, ours[0].score, recipe.resamples) for each in (*ours, *scored)]
        pair = test.outcomes.pair
        seeds[str(seed)] = {
            "n": len(test.outcomes),
            "accuracy_draft": float(pair.draft.mean()),
            "accuracy_target": float(pair.target.mean()),
            "flops_draft": float(test.outcomes.draft_cost.mean()),
            "flops_target": float(test.outcomes.target_cost.mean()),
            "gates": {each.title: asdict(each) for each in judged},
        }
    result = {
        "schema": SCHEMA,
        "command": command,
        "commit": commit,
        "dirty": dirty,
        "wall_s": round(time.time() - began, 1),
        "recipe": asdict(recipe),
        "artifact": rater.facts.get("artifact", ""),
        "seeds": seeds,
        "simulation": {str(noise): simulate(noise, n=50_000) for noise in NOISES},
    }
    if out is not None:
        gate_report.write(result, out)
    return json.loads(json.dumps(result))


def _prp_scores(rated: Ratings) -> list[Scored]:
    """The rater under each way to rank; the recipe's own first."""
    assert rated.draft is not None
    out = [Scored("prp", "prefill", rated.score, rated)]
    if rated.target is not None:
        for mode in ("draft", "target", "joint"):
            score = score_of(mode, rated.draft, rated.target)
            out.append(Scored(f"prp by {mode}", "prefill", score, Ratings(score, overhead=rated.overhead)))
    return out
