"""Who answers: questions that list many moves go to the large model.

python examples/add_gate.py frozenlake 200

Source: none, an example.
"""

import sys

import numpy as np

from mmroute import hub
from mmroute.config import options
from mmroute.gate._policy import policy
from mmroute.gate.base import Evidence, Gate, Needs, Query, Ratings

__all__ = ["Moves"]


class Moves(Gate):
    """The longer the list, the harder the question."""

    needs: Needs = "nothing"  # no model has run: this gate is charged for nothing but the answers

    @options
    class Config:
        marks: str = ","
        """Signs between listed moves."""

    def rate(self, evidence: list[Evidence]) -> Ratings:
        """Larger means: send to the target. It knows no threshold; a policy turns scores into routes."""
        return Ratings(np.array([sum(map(e.query.text.count, self.config.marks)) for e in evidence], dtype=float))


def main(world: str, n: int, budget: float = 0.3) -> tuple[float, float, float]:
    """Returns the share that was sent, and the mean number of hops of what was sent and of what stayed."""
    samples = list(hub.load("tasks", world).samples("test", n))
    ratings = Moves().rate([Evidence(Query(sample.id, text=sample.question)) for sample in samples])
    rule = policy(name="budget", budget=budget)
    decisions = rule.decide_many([ratings.one(i) for i in range(n)], [sample.id for sample in samples])
    sent = np.array([decision.route == "target" for decision in decisions])
    hops = np.array([len(sample.hops) for sample in samples])
    print(f"{sent.mean():.0%} go to the target: {hops[sent].mean():.1f} hops; the rest has {hops[~sent].mean():.1f}")
    return float(sent.mean()), float(hops[sent].mean()), float(hops[~sent].mean())


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
