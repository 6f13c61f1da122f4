"""What happened to one request; filled in as it goes, then counted, logged and shown."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from mmroute.gate.base import Decision, Rating

__all__ = ["Turn"]

Outcome = Literal["ok", "error", "gone"]


@dataclass(eq=False)  # two requests may look alike and are not one
class Turn:
    """One request from first to last byte. Seconds by a monotonic clock, from its arrival."""

    request_id: str
    began: float = field(default_factory=time.monotonic)
    at: float = field(default_factory=time.time)
    """Seconds since 1970."""
    policy: str = ""
    artifact: str = ""
    route: str = ""
    model: str = ""
    reason: str = ""
    decision: Decision | None = None
    rated: Rating | None = None
    rating_s: float | None = None
    own: bool = False
    """Whether the request set its own budget or threshold."""
    attempts: int = 0
    fallback: tuple[str, str] | None = None
    """The model that failed, and how: `connect`, `timeout`, `status`, `broken`, `malformed` ..."""
    first_byte_s: float | None = None
    total_s: float | None = None
    status: int = 0
    outcome: Outcome = "error"
    tokens_in: int | None = None
    tokens_out: int | None = None
    wasted_tokens: int = 0
    """Tokens the draft wrote on a query that went to the target."""
    prompt_hash: str = ""
    prompt: Any = None
    report: dict[str, Any] | None = None
    """What a local model says about its run: FLOPs, KV bytes, shares kept, the view of its trace."""
    rating_flops: float = 0.0
    """Of a local draft's prefill on a query that went to the target."""

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def headers(self) -> dict[str, str]:
        """What the client is told before the first byte."""
        out = {
            "x-request-id": self.request_id,
            "x-mmroute-schema": "1",
            "x-mmroute-route": self.route,
            "x-mmroute-model": self.model,
            "x-mmroute-policy": self.policy,
            "x-mmroute-reason": self.reason,
            "x-mmroute-attempts": str(self.attempts),
            "x-mmroute-artifact": self.artifact,
            "x-mmroute-fallback": ": ".join(self.fallback or ()),
        }
        numbers = {
            "score": self.decision.score if self.decision else None,
            "threshold": self.decision.threshold if self.decision else None,
            "draft-rating": self.rated.draft if self.rated else None,
            "target-rating": self.rated.target if self.rated else None,
            "rating-ms": None if self.rating_s is None else 1000 * self.rating_s,
        }
        out.update({f"x-mmroute-{k}": f"{v:.6g}" for k, v in numbers.items() if v is not None})
        return {k: v for k, v in out.items() if v}

    def facts(self) -> dict[str, Any]:
        """The routing, without content: the `mmroute` object of a debug answer, `/v1/route`, `/stats`."""
        decision = self.decision
        return {
            "request_id": self.request_id,
            "route": self.route,
            "model": self.model,
            "policy": self.policy,
            "reason": self.reason,
            "score": decision.score if decision else None,
            "threshold": decision.threshold if decision else None,
            "shadow": decision.shadow if decision else None,
            "draft_rating": self.rated.draft if self.rated else None,
            "target_rating": self.rated.target if self.rated else None,
            "rating_ms": None if self.rating_s is None else 1000 * self.rating_s,
            "attempts": self.attempts,
            "artifact": self.artifact,
        }

    def line(self) -> dict[str, Any]:
        """The replay log's record."""
        return {
            "schema": "replay/1",
            "time": self.at,
            **self.facts(),
            "own": self.own,
            "fallback": self.fallback,
            "status": self.status,
            "outcome": self.outcome,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "first_byte_ms": None if self.first_byte_s is None else 1000 * self.first_byte_s,
            "total_ms": 1000 * (self.total_s if self.total_s is not None else self.elapsed),
            **({"prompt_hash": self.prompt_hash} if self.prompt_hash else {}),
            **({"prompt": self.prompt} if self.prompt is not None else {}),
        }
