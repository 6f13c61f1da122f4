"""Each pruner keeps what a slow loop, written from its paper, keeps: plain Python over one row at a time."""

import math

import pytest
import torch
from twins import CASES, LAYERS, TEXT, VISION, assert_same_sets, plain, twin

from mmroute import hub
from mmroute.checks import Case, made_up, walk


def test_fastv_keeps_what_the_last_row_looks_at_most() -> None:
    pruner = hub.load("prune", "fastv", vision_keep=0.35, start_layer=2)
    rates = [{VISION: 1.0 if layer < 2 else 0.35} for layer in range(LAYERS)]
    for case in CASES:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            return dict(enumerate(case.attention_row(layer)[b].tolist()))

        assert_same_sets(pruner, case, twin(case, score, rates, "drop"))


def test_pyramiddrop_ranks_survivors_by_the_stage_layers_own_attention() -> None:
    pruner = hub.load("prune", "pyramiddrop", stage_keep=0.6)
    starts = [1, 3, 4]  # quarters of 6 layers, rounded down
    rates = [{VISION: 0.6 ** sum(layer >= s for s in starts)} for layer in range(LAYERS)]
    for case in CASES:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            q, k = case.sources(layer)["qk"](case.hidden(layer))
            last = max(alive)
            total = dict.fromkeys(range(case.tokens.shape[1]), 0.0)
            for head in range(q.shape[1]):
                key = k[b, head // (q.shape[1] // k.shape[1])].double()
                products = (key[alive] @ q[b, head, last].double() / math.sqrt(q.shape[-1])).tolist()
                logits = dict(zip(alive, products, strict=True))
                most = max(logits.values())
                norm = sum(math.exp(value - most) for value in logits.values())
                for c in alive:
                    total[c] += math.exp(logits[c] - most) / norm
            return total

        assert_same_sets(pruner, case, twin(case, score, rates, "drop"))


def test_knorm_keeps_the_shortest_keys_of_each_modality() -> None:
    pruner = hub.load("prune", "knorm", vision_keep=0.4, text_keep=0.7)
    for case in CASES:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            keys = case.sources(layer)["keys"](layer)[b].tolist()
            return {c: -sum(math.hypot(*head) for head in keys[c]) for c in alive}

        assert_same_sets(pruner, case, twin(case, score, [{VISION: 0.4, TEXT: 0.7}] * LAYERS, "kv_only"))


def test_keydiff_keeps_the_keys_that_point_away_from_the_mean() -> None:
    pruner = hub.load("prune", "keydiff", vision_keep=0.4)
    for case in CASES:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            keys = case.sources(layer)["keys"](layer)[b].double()
            out = dict.fromkeys(alive, 0.0)
            for head in range(keys.shape[1]):
                unit = keys[alive, head] / keys[alive, head].norm(dim=1, keepdim=True)
                mean = unit.mean(0)
                for c, cosine in zip(alive, (unit @ mean / mean.norm()).tolist(), strict=True):
                    out[c] -= cosine
            return out

        assert_same_sets(pruner, case, twin(case, score, [{VISION: 0.4}] * LAYERS, "kv_only"))


def hash_of(seed: int, layer: int, hop: int, rank: int) -> float:
    def mix(x: int) -> int:
        x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
        x = ((x >> 16) ^ x) * 0x45D9F3B % 2**32
        return (x >> 16) ^ x

    key = mix(mix((seed * 0x9E3779B1 + layer) % 2**32) ^ (hop * 0x45D9F3B % 2**32))
    return (mix(key ^ rank) >> 8) / 2**24


def hashes(case: Case, seed: int, layer: int, b: int) -> dict[int, float]:
    """By column; ranks count from the hop's first valid position."""
    out, seen = {}, {}
    for c, (hop, real) in enumerate(zip(plain(case).hop[b], plain(case).valid[b], strict=True)):
        rank = seen.setdefault(hop, 0)
        out[c] = hash_of(seed, layer, hop, rank)
        seen[hop] += int(real)
    return out


@pytest.mark.parametrize("once", [False, True])
def test_random_keeps_the_largest_hashes(once: bool) -> None:
    pruner = hub.load("prune", "random", vision_keep=0.3, text_keep=0.8, start_layer=1, seed=7, once=once)
    rates = [{}] + [{VISION: 0.3, TEXT: 0.8}] * (LAYERS - 1)
    for case in CASES:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            return hashes(case, 7, 1 if once else layer, b)

        assert_same_sets(pruner, case, twin(case, score, rates, "drop" if once else "skip"))


def test_oracle_keeps_needed_then_board_then_hashed_background() -> None:
    pruner = hub.load("prune", "oracle", vision_keep=0.4, seed=3)
    for case in CASES:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            chance = hashes(case, 3, layer, b)
            return {c: float(case.relevance[b, c]) + chance[c] / 2 for c in alive}  # levels are whole numbers

        assert_same_sets(pruner, case, twin(case, score, [{VISION: 0.4}] * LAYERS, "skip"))


@pytest.mark.parametrize("scorer", ["row", "knorm", "random", "oracle"])
@pytest.mark.parametrize("scope", ["skip", "drop"])
def test_schedule_keeps_the_tables_share_at_each_layer(scorer: str, scope: str) -> None:
    vision, text = (1.0, 0.8, 0.8, 0.5, 0.1, 0.0), (1.0, 1.0, 1.0, 0.9, 0.9, 0.6)
    pruner = hub.load("prune", "schedule", vision=vision, text=text, scorer=scorer, scope=scope)
    rates = [{VISION: v, TEXT: t} for v, t in zip(vision, text, strict=True)]
    for case in CASES[:40]:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            if scorer == "row":
                return dict(enumerate(case.attention_row(layer)[b].tolist()))
            if scorer == "knorm":
                k = case.sources(layer)["qk"](case.hidden(layer))[1][b].tolist()
                return {c: -sum(math.hypot(*head[c]) for head in k) for c in alive}
            chance = hashes(case, 0, 0 if scope == "drop" else layer, b)
            return chance if scorer == "random" else {c: float(case.relevance[b, c]) + chance[c] / 2 for c in alive}

        assert_same_sets(pruner, case, twin(case, score, rates, scope))


def test_none_keeps_every_valid_position() -> None:
    for case in CASES[:10]:
        for keep in walk(hub.load("prune", "none"), case, LAYERS):
            assert torch.equal(keep.mask, case.tokens.valid)


def test_ties_go_to_the_lower_column() -> None:
    case = made_up([[(0, TEXT, 3), (0, VISION, 10), (0, TEXT, 3)], [(0, TEXT, 2), (0, VISION, 6), (0, TEXT, 2)]])
    case.attention_row = lambda layer: torch.full(case.tokens.shape, 0.1)  # type: ignore[method-assign]
    mask = walk(hub.load("prune", "fastv", vision_keep=0.5), case, LAYERS)[-1].mask
    assert mask[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 13, 14, 15]
    assert mask[1].nonzero().flatten().tolist() == [6, 7, 8, 9, 10, 14, 15]


def test_oracle_without_relevance_is_random() -> None:
    case = made_up()
    case.relevance = torch.zeros_like(case.relevance)
    oracle = walk(hub.load("prune", "oracle", vision_keep=0.3), case, LAYERS)
    chance = walk(hub.load("prune", "random", vision_keep=0.3), case, LAYERS)
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(oracle, chance, strict=True))


def test_another_seed_and_another_layer_keep_another_random_set() -> None:
    case = made_up([[(0, TEXT, 3), (0, VISION, 60), (0, TEXT, 3)]])
    one, other = (walk(hub.load("prune", "random", vision_keep=0.5, seed=s), case, LAYERS) for s in (0, 1))
    assert not torch.equal(one[0].mask, other[0].mask)
    assert not torch.equal(one[0].mask, one[1].mask)


def test_random_keeps_every_position_equally_often() -> None:
    case = made_up([[(0, TEXT, 3), (0, VISION, 40), (0, TEXT, 3)]])
    kept = torch.zeros(40)
    for seed in range(300):
        kept += walk(hub.load("prune", "random", vision_keep=0.25, seed=seed), case, 1)[0].mask[0, 3:43]
    # 300 draws of .25: standard deviation 7.5; 40 positions, so 4 sigma.
    assert (kept - 75).abs().max() < 30
