"""What the gateway remembers: Prometheus metrics, the replay log, and the last decisions for the page."""

from collections import deque
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mmroute.serve.replay import ReplayLog
from mmroute.serve.settings import Settings, UpstreamSettings
from mmroute.serve.spending import Spending
from mmroute.serve.turn import Turn

__all__ = ["Book"]

_SHOWN = 240
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SHARES = tuple(i / 10 for i in range(11))
_STATES = {"closed": 0, "half": 1, "open": 2}


class Book:
    """One per gateway; closing a turn twice counts once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.log = (
            None
            if settings.replay_log is None
            else ReplayLog(settings.replay_log, settings.replay_bytes, settings.replay_files)
        )
        self.recent: deque[dict[str, Any]] = deque(maxlen=_SHOWN)
        self.in_flight = 0
        self.totals = {"ok": 0, "error": 0, "gone": 0}
        self.spent: dict[str, Any] = {"unit": "", "cost": 0.0, "always_target": 0.0}
        """What answered requests cost, and what the target alone would have cost for the same tokens."""
        self.on_target = Spending()
        """USD of the target's answers, if it has prices."""
        r = self.registry = CollectorRegistry()
        self.requests = Counter("mmroute_requests", "Chat requests by how they ended", ["route", "outcome"], registry=r)
        self.decisions = Counter("mmroute_decisions", "Routes by reason", ["route", "reason"], registry=r)
        self.rating_s = Histogram("mmroute_rating_seconds", "From arrival to rating", buckets=_SECONDS, registry=r)
        self.rating = Histogram("mmroute_rating", "Predicted chance", ["model"], buckets=_SHARES, registry=r)
        scores = tuple(i / 5 for i in range(-5, 6))
        self.score = Histogram("mmroute_score", "What policies see", buckets=scores, registry=r)
        self.threshold = Gauge("mmroute_threshold", "Of the last decision", registry=r)
        self.share = Gauge("mmroute_target_share", "Of the last rated decisions", registry=r)
        self.budget = Gauge("mmroute_budget", "Asked share", registry=r)
        self.attempts = Counter("mmroute_upstream_attempts", "Calls", ["upstream", "code"], registry=r)
        self.ttft = Histogram(
            "mmroute_upstream_ttft_seconds", "To the first event", ["upstream"], buckets=_SECONDS, registry=r
        )
        self.seconds = Histogram("mmroute_request_seconds", "First to last byte", buckets=_SECONDS, registry=r)
        self.tokens = Counter("mmroute_tokens", "By usage", ["upstream", "kind"], registry=r)
        self.usd = Counter("mmroute_cost_usd", "By prices", ["upstream"], registry=r)
        self.inflight = Gauge("mmroute_inflight", "Chat requests being answered", registry=r)
        self.inflight.set_function(lambda: self.in_flight)
        self.circuit = Gauge("mmroute_circuit_state", "0 closed, 1 half-open, 2 open", ["upstream"], registry=r)
        self.fallback = Counter("mmroute_fallback", "Other model took over", ["from", "to", "reason"], registry=r)
        self.fail_open = Counter("mmroute_rater_fail_open", "Decided without a rating", ["reason"], registry=r)
        self.gone = Counter("mmroute_client_disconnects", "Clients that left", registry=r)
        self.wasted = Counter("mmroute_wasted_draft_tokens", "Written, then routed away", registry=r)
        self.dropped = Gauge("mmroute_replay_dropped_total", "Log lines not written", registry=r)
        self.dropped.set_function(lambda: self.log.dropped if self.log else 0)
        self.reloads = Counter("mmroute_reload", "Hot reloads", ["result"], registry=r)

    def attempt(self, upstream: str, code: str) -> None:
        self.attempts.labels(upstream, code).inc()

    def decided(self, turn: Turn) -> None:
        """A route has been chosen."""
        self.decisions.labels(turn.route, turn.reason).inc()
        if turn.reason in ("fallback", "verify"):
            return  # another route for a query whose rating has been counted
        if turn.reason in ("unrated", "rater_timeout"):
            self.fail_open.labels(turn.reason).inc()
        if turn.rating_s is not None:
            self.rating_s.observe(turn.rating_s)
        if turn.rated is not None:
            for model, chance in (("draft", turn.rated.draft), ("target", turn.rated.target)):
                if chance is not None:
                    self.rating.labels(model).observe(chance)
        if turn.decision is not None and turn.decision.score is not None:
            self.score.observe(turn.decision.score)
            if turn.decision.threshold is not None:
                self.threshold.set(turn.decision.threshold)

    def close(self, turn: Turn) -> None:
        """Writes the turn down; before its last byte is sent, or when it has failed."""
        if turn.total_s is not None:
            return
        turn.total_s = turn.elapsed
        self.requests.labels(turn.route or "none", turn.outcome).inc()
        self.totals[turn.outcome] += 1
        self.seconds.observe(turn.total_s)
        self.wasted.inc(turn.wasted_tokens)
        if turn.outcome == "gone":
            self.gone.inc()
        if turn.fallback is not None:
            failed, how = turn.fallback
            self.fallback.labels(failed, turn.route, how).inc()
        for kind, n in (("in", turn.tokens_in), ("out", turn.tokens_out)):
            if n is not None and turn.route:
                self.tokens.labels(turn.route, kind).inc(n)
        self._cost(turn)
        if turn.route:
            shown = {"time": turn.at, **turn.facts(), "outcome": turn.outcome, "total_ms": 1000 * turn.total_s}
            shown["first_byte_ms"] = None if turn.first_byte_s is None else 1000 * turn.first_byte_s
            self.recent.append(shown)
            share = self.target_share()
            shown |= {"cost": dict(self.spent), "share": share}
            self.share.set(share or 0.0)
        if self.log is not None:
            self.log.write(turn.line())

    def target_share(self) -> float | None:
        """Of the requests on the page that a rating decided."""
        routes = [r["route"] for r in self.recent if r["reason"] in ("rating", "verify")]
        return routes.count("target") / len(routes) if routes else None

    def _cost(self, turn: Turn) -> None:
        if turn.outcome != "ok" or turn.tokens_in is None or turn.tokens_out is None:
            return
        draft, target = self.settings.draft, self.settings.target
        unit, cost, always = "", 0.0, 0.0
        if turn.route == "target" and _priced(target):
            self.on_target.add(_usd(target, turn.tokens_in, turn.tokens_out))
        if _priced(draft) and _priced(target):
            unit = "USD"
            always = _usd(target, turn.tokens_in, turn.tokens_out)
            cost = _usd(getattr(self.settings, turn.route), turn.tokens_in, turn.tokens_out)
            if turn.route == "target" and turn.wasted_tokens:
                cost += _usd(draft, turn.tokens_in, turn.wasted_tokens)
            self.usd.labels(turn.route).inc(cost)
        elif turn.report is not None and (turn.route == "target" or "flops_target" in turn.report):
            unit = "GFLOPs"
            cost = (turn.report["flops"] + turn.rating_flops) / 1e9
            always = turn.report.get("flops_target", turn.report["flops"]) / 1e9
        if unit:
            self.spent = {
                "unit": unit,
                "cost": self.spent["cost"] + cost,
                "always_target": self.spent["always_target"] + always,
            }

    def metrics(self, circuits: dict[str, str], budget: float | None) -> bytes:
        for role, state in circuits.items():
            self.circuit.labels(role).set(_STATES[state])
        if budget is not None:
            self.budget.set(budget)
        return generate_latest(self.registry)

    def shut(self) -> None:
        if self.log is not None:
            self.log.close()


def _priced(settings: UpstreamSettings) -> bool:
    return settings.price_in is not None and settings.price_out is not None


def _usd(settings: UpstreamSettings, tokens_in: int, tokens_out: int) -> float:
    return ((settings.price_in or 0) * tokens_in + (settings.price_out or 0) * tokens_out) / 1e6
