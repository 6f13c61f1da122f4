"""Peers keep what slow loops, written from their papers, keep: plain Python over one row at a time."""

import itertools
import math

import pytest
import torch
from twins import CASES, LAYERS, TEXT, VISION, assert_same_sets, twin

from mmroute import hub
from mmroute.checks import Case
from mmroute.prune import _rank

# ---------------------------------------------------------------------- DivPrune


def spread(case: Case, b: int) -> dict[int, float]:
    """Minus the turn at which each vision column is taken, hop by hop."""
    t, out = case.tokens, dict.fromkeys(range(case.tokens.shape[1]), 0.0)
    for hop in range(3):
        free = [
            c
            for c in range(t.shape[1])
            if t.valid[b, c] and t.hop[b, c] == hop and t.modality[b, c] == VISION and not t.protected[b, c]
        ]
        unit = {c: case.x[b, c].double() / case.x[b, c].double().norm() for c in free}

        def apart(c: int, d: int, unit: dict[int, torch.Tensor] = unit) -> float:
            return 1 - float(unit[c] @ unit[d])

        taken: list[int] = []
        while len(taken) < len(free):
            others = [c for c in free if c not in taken]
            rivals = taken or free
            near = {c: min((apart(c, d) for d in rivals if d != c), default=math.inf) for c in others}
            taken.append(max(others, key=lambda c: (round(near[c], 5), -c)))
        out |= {c: -float(turn) for turn, c in enumerate(taken)}
    return out


def test_divprune_takes_the_farthest_from_what_it_has() -> None:
    pruner = hub.load("prune", "divprune", vision_keep=0.45)
    for case in CASES:
        turns = [spread(case, b) for b in range(case.tokens.shape[0])]

        def score(b: int, layer: int, alive: list[int], turns: list[dict[int, float]] = turns) -> dict[int, float]:
            return turns[b]

        assert_same_sets(pruner, case, twin(case, score, [{VISION: 0.45}] * LAYERS, "drop"))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_greedy_spread_is_at_least_half_of_the_best_there_is(count: int) -> None:
    """The guarantee of greedy max-min, in a metric: angles; the first pick is free, so any start serves."""
    for seed in range(20):
        unit = torch.nn.functional.normalize(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)), dim=-1)
        angle = (unit @ unit.T).clamp(-1, 1).arccos()

        def least(chosen: tuple[int, ...], angle: torch.Tensor = angle) -> float:
            return min(float(angle[i, j]) for i, j in itertools.combinations(chosen, 2))

        turn = _rank.most_spread(unit[None], torch.ones(1, 8, dtype=torch.bool), count)[0]
        greedy = tuple((turn < count).nonzero().flatten().tolist())
        assert len(greedy) == count
        best = max(least(chosen) for chosen in itertools.combinations(range(8), count))
        assert best / 2 - 1e-6 <= least(greedy) <= best


def test_equal_embeddings_are_taken_in_order_of_columns() -> None:
    unit = torch.nn.functional.normalize(torch.tensor([[[1.0, 0], [1, 0], [1, 0], [0, 1]]]), dim=-1)
    turn = _rank.most_spread(unit, torch.ones(1, 4, dtype=torch.bool), 4)[0]
    assert turn.tolist() == [1, 2, 3, 0]


# ---------------------------------------------------------------------- StreamingLLM


def test_streaming_keeps_sinks_and_the_most_recent_of_each_modality() -> None:
    pruner = hub.load("prune", "streaming", vision_keep=0.4, text_keep=0.6, sinks=3)
    for case in CASES:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            first = [c for c in alive if case.tokens.hop[b, c] == 0][:3]
            return {c: c + 1000.0 * (c in first) for c in alive}

        assert_same_sets(pruner, case, twin(case, score, [{VISION: 0.4, TEXT: 0.6}] * LAYERS, "kv_only"))
