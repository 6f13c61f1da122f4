"""The gate's result files: `gate/1` of a bench, `gate-eval/1` of an evaluation, `gateway/1` of the load run.

Written and read as strictly as those of `bench.schema`. Legend: n queries.
"""

from pathlib import Path
from typing import Any, Literal

from mmroute.bench import schema
from mmroute.bench.schema import Machine, Run
from mmroute.config import options

__all__ = [
    "MUST_BE_0",
    "Claims",
    "GateEval",
    "GateResult",
    "GateSet",
    "GateSummary",
    "GatewayResult",
    "Judged",
    "read_gate",
    "read_gate_eval",
    "read_gateway",
]

MUST_BE_0 = ("lost", "doubled", "leaked", "unshaped", "left_running")
"""Of requests under load."""
Numbers = dict[str, float]
Figures = dict[str, float | None]
Intervals = dict[str, tuple[float | None, float | None]]


@options
class Judged:
    """What one gate is worth on one set of queries; None is what has no value there."""

    title: str
    needs: str
    """What it looks at, and is charged for."""
    figures: Figures
    at: Numbers
    """Accuracy by share of target calls."""
    realised: Numbers
    """Share of target calls that the budget policy came to, by the share it was asked for."""
    ratings: dict[str, Figures]
    """Calibration of each rating."""
    intervals: Intervals
    """95 %, over drawn groups; empty where none were drawn."""
    curve: dict[str, list[float]]
    """`share`, `accuracy`, `cost`."""
    skipped: str = ""
    """Why there is nothing."""


@options
class GateSet:
    """One set of queries: those of a seed, or all of them."""

    n: int
    groups: int
    """What succeeds and fails together: images, quads."""
    accuracy_draft: float
    accuracy_target: float
    flops_draft: float
    """Mean of an answer; vision tower included, as below."""
    flops_target: float
    by_part: dict[str, Numbers]
    """Share, and accuracy of draft and target, of each part of the mixture."""
    gates: dict[str, Judged]


@options
class Claims:
    """What the bench says of the recipe's own rater, over all seeds."""

    oracle_gain: float | None
    """ONG: share of the way from random to the oracle."""
    oracle_gain_ci95: tuple[float | None, float | None]
    attainable: float | None
    """ONG of who knows every kind of question by heart and nothing of the single one."""
    of_attainable: float | None
    accuracy_over_target_at_40: float | None
    """60 % of the questions on the draft, less always-target."""
    accuracy_over_target_at_40_ci95: tuple[float | None, float | None]
    flops_at_equal_accuracy: float | None
    """Over always-target, where accuracy equals it."""
    time_at_equal_accuracy: float | None
    """Seconds likewise: single questions, both models in turn; None was not timed."""
    time_at_equal_accuracy_together: float | None = None
    """Seconds likewise, of a batch."""
    rating_decode_steps: float | None
    """Seconds of a rating over those of a decode step of the draft."""
    rating_flops: float
    """Of a rating, over the draft's prefill."""
    ahead: dict[str, dict[str, tuple[float, float | None, float | None]]]
    """By rival and share of target calls: accuracy of ours less the rival's, and its paired interval."""
    not_ahead: list[str]
    """Rivals and shares where ours is not above."""


@options
class GateResult:
    """All gates of a bench on one pair."""

    run: Run
    machine: Machine
    recipe: dict[str, Any]
    """The bench recipe, resolved."""
    pair: dict[str, str]
    """Names and weights of draft and target."""
    artifact: str
    """Of the rater."""
    train: int
    """Questions that the supervised baselines were fitted on."""
    seeds: dict[str, GateSet]
    pooled: GateSet
    """All seeds together; intervals and curves are of this one."""
    claims: Claims
    simulation: dict[str, Any]
    """The simulation of `bench.simulation`, by noise."""
    schema: Literal["gate/1"] = "gate/1"


@options
class GateSummary:
    """The one line that `mmroute eval --recipe prp-small --json` ends with."""

    recipe: str
    n: int
    seed: int
    budget: float | None
    """Asked share of target calls; None for a policy that has none."""
    accuracy: float
    """Under the policy, in the order of arrival."""
    ci95: tuple[float, float]
    accuracy_draft: float
    accuracy_target: float
    accuracy_random: float
    """The same share of queries, whichever."""
    accuracy_oracle: float
    """The same share, the best ones."""
    target_share: float
    second_look_share: float = 0.0
    """Of all queries: those that went to the target after the draft's answer had been looked at."""
    oracle_normalised_gain: float | None
    cost_ratio: float
    """FLOPs over always-target, rating and unused draft prefills included."""
    cost_ratio_draft: float
    """FLOPs of always-draft over always-target."""
    time_ratio: float
    """Seconds over always-target, batch 1, medians of rounds in turn."""
    rating_overhead: float
    """Seconds of a rating over those of one decode step of the draft."""
    rating_steps: int
    rating_flops_share: float
    """Of the draft's prefill."""
    by_part: dict[str, Numbers]
    artifact: str
    commit: str


@options
class GateEval:
    """One rater and one policy on held-out questions."""

    run: Run
    machine: Machine
    summary: GateSummary
    schema: Literal["gate-eval/1"] = "gate-eval/1"


@options
class GatewayResult:
    """The gateway under load and faults, beside the same upstream called directly."""

    run: Run
    cpus: int
    busy: float
    """Load average when the run began: latencies of a busy machine are its own."""
    python: str
    settings: dict[str, Any]
    """Of the gateway under faults."""
    load: dict[str, Any] | None
    """Counts by outcome; `lost`, `doubled`, `leaked`, `unshaped` and `left_running` must be 0. None was not run."""
    resident_mib: dict[str, float | None]
    """`before`, `after`: memory of the gateway, once warm and after all requests."""
    latency: dict[str, Any] | None
    """Milliseconds directly and through the gateway, in turn; None was not measured."""
    throughput: dict[str, Any] | None
    """Requests a second; None was not measured."""
    schema: Literal["gateway/1"] = "gateway/1"

    @property
    def sound(self) -> bool:
        """Whether nothing went wrong with any request."""
        return self.load is None or not any(self.load[name] for name in MUST_BE_0)


def read_gate(path: Path) -> GateResult:
    """A gate bench's result file; errors as in `schema.read_result`."""
    return schema.read_as(path, GateResult, "gate/1")


def read_gate_eval(path: Path) -> GateEval:
    """A gate evaluation's result file; errors as in `schema.read_result`."""
    return schema.read_as(path, GateEval, "gate-eval/1")


def read_gateway(path: Path) -> GatewayResult:
    """A load run's result file; errors as in `schema.read_result`."""
    return schema.read_as(path, GatewayResult, "gateway/1")
