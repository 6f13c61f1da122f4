"""The contract of a gate: who answers, decided from what has been seen so far; and of a policy, which sees scores only.

A gate turns evidence about queries into ratings. It never generates, and it knows no threshold. What it asks for
(`needs`) decides what it is charged: a gate that reads the draft's whole answer pays for that answer on every query.
Nothing here imports torch: a gateway in front of HTTP servers starts without it.

Legend: B queries, T generated tokens, L layers, D hidden, K rating levels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float

from mmroute.config import options, parse
from mmroute.errors import ConfigError, InputError

__all__ = [
    "SCORES",
    "Continuation",
    "Cost",
    "Decision",
    "Evidence",
    "Gate",
    "Known",
    "Needs",
    "Policy",
    "Prefill",
    "Query",
    "Question",
    "Rating",
    "Ratings",
    "Route",
    "charge",
    "score_of",
]

Needs = Literal["nothing", "prefill", "early", "answer", "samples", "outcome"]
Route = Literal["draft", "target"]
Array = Float[np.ndarray, " B"]


# ---------------------------------------------------------------------- what a gate may look at


@dataclass(frozen=True)
class Query:
    """One question, before anyone has answered it."""

    id: str
    messages: Sequence[dict[str, Any]] = ()
    """Chat messages whose content is text, or a list of image and text blocks."""
    images: Sequence[Any] = ()
    task: str = ""
    level: str = ""
    group: str = ""
    """What succeeds and fails together (image, layout, quad); splits and intervals go by it."""
    prompt_tokens: int = 0
    image_tokens: int = 0
    text: str = ""
    """The prompt's words without images."""
    pixels: Sequence[float] = ()
    """Cheap figures of the images: mean, standard deviation, edge density; empty where there is none."""


@dataclass(frozen=True)
class Prefill:
    """What the draft holds after reading the prompt, before its first token."""

    last: Float[np.ndarray, "L D"]
    """Hidden state of the last prompt position behind each layer."""
    mean: Float[np.ndarray, "L D"] | None = None
    """The same, averaged over all prompt positions."""


@dataclass(frozen=True)
class Continuation:
    """What the draft wrote, whole or in part."""

    text: str = ""
    label: str = ""
    """The answer that was read out of the text; what votes are counted on."""
    stats: Mapping[str, float] = field(default_factory=dict)
    """`lp_mean`, `lp_sum`, `lp_min`, `lp_q90`, `ent_mean`, `ent_max`, `margin`, `lp_answer`, `lp_early_8`, ...;
    see `gate._statistics`."""
    last: Float[np.ndarray, " D"] | None = None
    """Hidden state behind the last layer at the last token."""
    tokens: int = 0
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Known:
    """The true success rates; for oracles and for fitting, never at serving time."""

    draft: float
    target: float


@dataclass(frozen=True)
class Question:
    """An extra question that a gate has put to the draft; the harness asks it, and charges the call."""

    name: str
    """Under which `Evidence.replies` holds the answer."""
    text: str
    options: tuple[str, ...] = ()
    """Two single tokens: the reply is the probability of the first against the second. None: the number written."""
    after_answer: bool = True
    """Whether the draft's own answer comes before the question."""
    draws: int = 0
    """Of the options, at temperature 1: the reply is the share of the first; 0 is its probability."""


@dataclass(frozen=True)
class Evidence:
    """Everything known about one query; only what the gate's `needs` names is filled, and charged."""

    query: Query
    session: Prefill | Any = None
    early: Continuation | None = None
    answer: Continuation | None = None
    samples: Sequence[Continuation] = ()
    replies: Mapping[str, float] = field(default_factory=dict)
    """What extra questions to the draft brought, by their names."""
    outcome: Known | None = None


# ---------------------------------------------------------------------- what a gate says


@dataclass(frozen=True)
class Cost:
    """What something cost, in every unit that is known; None is unknown, and stays unknown in sums."""

    calls: int = 0
    tokens_in: int = 0
    tokens_cached: int = 0
    """Of `tokens_in`, those whose keys and values were there already."""
    tokens_out: int = 0
    """Sequential decode steps."""
    flops: float | None = 0.0
    seconds: float | None = 0.0
    usd: float | None = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        def both(a: float | None, b: float | None) -> float | None:
            return None if a is None or b is None else a + b

        return Cost(
            self.calls + other.calls,
            self.tokens_in + other.tokens_in,
            self.tokens_cached + other.tokens_cached,
            self.tokens_out + other.tokens_out,
            both(self.flops, other.flops),
            both(self.seconds, other.seconds),
            both(self.usd, other.usd),
        )


@dataclass(frozen=True)
class Rating:
    """One query's rating, as a policy sees it."""

    score: float
    """Larger means: send to the target."""
    draft: float | None = None
    """Predicted probability that the draft is right."""
    target: float | None = None
    draft_cost: float = 0.0
    """Expected cost of each model's answer, in one unit; what `utility` and `sla` weigh."""
    target_cost: float = 1.0


@dataclass(frozen=True)
class Ratings:
    """The ratings of B queries."""

    score: Array
    draft: Array | None = None
    target: Array | None = None
    draft_probs: Float[np.ndarray, "B K"] | None = None
    target_probs: Float[np.ndarray, "B K"] | None = None
    overhead: Cost = field(default_factory=Cost)
    """Per query, beyond what `needs` is charged for: g."""

    def __len__(self) -> int:
        return len(self.score)

    def one(self, index: int, draft_cost: float = 0.0, target_cost: float = 1.0) -> Rating:
        """The rating of one query."""
        draft = None if self.draft is None else float(self.draft[index])
        target = None if self.target is None else float(self.target[index])
        return Rating(float(self.score[index]), draft, target, draft_cost, target_cost)


class Gate(ABC):
    """Base class of the files in `gate/`."""

    @options
    class Config:
        pass

    config: Any
    needs: Needs
    trained: ClassVar[bool] = False
    """Whether `fit` must run before `rate`."""

    def __init__(self, **given: Any) -> None:
        self.config = parse(type(self).Config, given, f"gate.{type(self).__module__.rpartition('.')[2]}")

    @property
    def steps(self) -> int:
        """First steps of the draft that a gate with `needs = "early"` looks at, and is charged."""
        return 0

    @property
    def questions(self) -> list[Question]:
        """What the harness must ask the draft besides; the answers come back as `Evidence.replies`."""
        return []

    @abstractmethod
    def rate(self, evidence: Sequence[Evidence]) -> Ratings:
        """A score for each query; larger means: send to the target."""

    def fit(self, evidence: Sequence[Evidence]) -> None:
        """Learns from queries whose `outcome` is known; of the train split only."""
        raise ConfigError(f"{type(self).__name__} has nothing to fit; call `rate`")

    def _known(self, evidence: Sequence[Evidence]) -> tuple[Array, Array]:
        """Success rates of draft and target of each query.

        Raises:
            InputError: a query without an outcome.
        """
        missing = [e.query.id for e in evidence if e.outcome is None]
        if missing:
            raise InputError(f"{type(self).__name__} needs outcomes; {len(missing)} queries have none ({missing[0]!r})")
        pairs = [(e.outcome.draft, e.outcome.target) for e in evidence if e.outcome is not None]
        draft, target = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        return draft, target


# ---------------------------------------------------------------------- scores

SCORES = ("advantage", "draft", "target", "joint")


def score_of(
    mode: str, draft: Array, target: Array | None, *, cost_weight: float = 0.0, cost_gap: Array | float = 0.0
) -> Array:
    """How much a query should go to the target; larger is more.

    Args:
        mode: `advantage` r_t - r_d; `draft` 1 - r_d, hardest first; `target` r_t, what the target is good at;
            `joint` r_t (1 - r_d), the chance that only the target solves it.
        draft: predicted success of the draft.
        target: of the target; `draft` does without.
        cost_weight: lambda.
        cost_gap: (C_t - C_d) / C_ref of each query; lambda times it is taken off.

    Raises:
        ConfigError: no such mode, or the target's rating is missing.
    """
    if mode not in SCORES:
        raise ConfigError(f"score is one of {', '.join(SCORES)} (given {mode!r})")
    if mode == "draft":
        return 1 - draft - cost_weight * cost_gap
    if target is None:
        raise ConfigError(f"score {mode!r} needs a rating of the target too; rate with num_ratings=2, or take 'draft'")
    gain = {"advantage": target - draft, "target": target, "joint": target * (1 - draft)}[mode]
    return gain - cost_weight * cost_gap


# ---------------------------------------------------------------------- charging


def charge(
    needs: Needs,
    sent: Bool[np.ndarray, " B"],
    *,
    draft: Array,
    target: Array,
    prefill: Array,
    overhead: Array | float = 0.0,
    early: Array | float = 0.0,
    samples: int = 1,
) -> Array:
    """What every query cost under a gate of this kind, in whatever unit the arguments are.

    Args:
        needs: what the gate looked at.
        sent: which queries the target answers.
        draft: cost of the draft's whole answer, its prefill included.
        target: of the target's.
        prefill: of the draft's prefill alone.
        overhead: of rating itself, g.
        early: of the draft's first steps, for `early`.
        samples: draft answers, for `samples`.
    """
    looked: Mapping[Needs, tuple[Array | float, Array | float]] = {
        "nothing": (draft, 0.0),
        "outcome": (draft, 0.0),  # an oracle is a bound, not a method
        "prefill": (draft, prefill),
        "early": (draft, prefill + early),
        "answer": (draft, draft),
        "samples": (prefill + samples * (draft - prefill),) * 2,
    }
    kept, lost = looked[needs]
    return np.where(sent, lost + target, kept) + overhead


# ---------------------------------------------------------------------- policies


@dataclass(frozen=True)
class Decision:
    """Who answers, and why."""

    route: Route
    reason: str
    """`rating`, `forced`, `unrated`, `always`, or what a gateway adds: `capability`, `budget_cap`, `fallback` ..."""
    score: float | None = None
    threshold: float | None = None
    shadow: Route | None = None
    """What would have been done, where a shadow policy only watches."""


class Policy(ABC):
    """Base class of the rules that turn scores into routes; see `gate._policy`.

    A policy is one per process and not thread-safe: call it from one thread, in the order of arrival.
    """

    name: ClassVar[str]

    def decide(self, rating: Rating | None, *, key: str = "", force: Route | None = None) -> Decision:
        """Who answers one query.

        Args:
            rating: None where the draft gave none that could be read.
            key: the request's id; breaks ties, always the same way for the same id.
            force: the client's own choice; it does not move the policy.
        """
        if force is not None:
            return Decision(force, "forced", None if rating is None else rating.score)
        if rating is None or math.isnan(rating.score):
            return Decision(self.on_unrated, "unrated")
        return self._decide(rating, key)

    on_unrated: Route = "target"
    """The safe side."""

    def decide_many(self, ratings: Sequence[Rating], keys: Sequence[str] | None = None) -> list[Decision]:
        """Queries in the order of arrival."""
        keys = keys if keys is not None else [""] * len(ratings)
        return [self.decide(rating, key=key) for rating, key in zip(ratings, keys, strict=True)]

    @abstractmethod
    def _decide(self, rating: Rating, key: str) -> Decision:
        """The rule itself."""
