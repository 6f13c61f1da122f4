"""Why the target's rating matters: four kinds of queries, two noisy ratings, four rankings.

Half of the queries are easy for both models, a fifth only the target solves, a fifth is hopeless and makes the target
think twice as long, and on a tenth the draft is better. Perfect difficulty then sends the hopeless first.

python -m mmroute.bench.simulation
"""

import json

import numpy as np

from mmroute.bench.deferral import Curve, Pair, curve, kappa
from mmroute.gate.base import score_of

__all__ = ["simulate"]

KINDS = (
    # share, draft's success, target's, length of the target's answer
    (0.5, 0.90, 0.95, 1.0),
    (0.2, 0.20, 0.85, 1.0),
    (0.2, 0.10, 0.15, 2.0),
    (0.1, 0.80, 0.60, 1.0),
)
DRAFT_COST = 0.05
RATING_COST = 0.003
NOISES = (0.0, 0.15, 0.30)
BUDGETS = (0.2, 0.4)


def simulate(noise: float, n: int = 200_000, seed: int = 0) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy, speed-up over always-target and kappa, by ranking and share of target calls.

    Args:
        noise: standard deviation of both ratings around the true success rates.
        n: queries.
        seed: of kinds and noise.
    """
    rng = np.random.default_rng(seed)
    kinds = np.array(KINDS)
    draft, target, length = kinds[rng.choice(len(kinds), n, p=kinds[:, 0]), 1:].T
    pair = Pair(draft, target)
    r_d, r_t = (np.clip(p + rng.normal(0, noise, n), 0, 1) for p in (draft, target))
    scores = {"random": np.zeros(n), "hardest": score_of("draft", r_d, r_t)}
    scores |= {mode: score_of(mode, r_d, r_t) for mode in ("target", "advantage")}
    out: dict[str, dict[str, dict[str, float]]] = {}
    for name, score in scores.items():
        made = curve(score, pair, kept_cost=np.full(n, DRAFT_COST + RATING_COST), sent_cost=length + RATING_COST)
        out[name] = {str(b): _at(made, score, length, b) for b in BUDGETS}
    return out


def _at(made: Curve, score: np.ndarray, length: np.ndarray, budget: float) -> dict[str, float]:
    return {
        "accuracy": round(float(made.at(budget)), 4),
        "speed_up": round(float(length.mean() / made.cost_at(budget)), 3),
        "kappa": round(kappa(score, length, budget), 3),
    }


if __name__ == "__main__":
    print(json.dumps({str(noise): simulate(noise) for noise in NOISES}, indent=2))
