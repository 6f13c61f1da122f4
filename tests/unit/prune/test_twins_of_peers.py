"""Peers keep what slow loops, written from their papers, keep: plain Python over one row at a time."""

import itertools
import math

import pytest
import torch
from twins import CASES, LAYERS, TEXT, VISION, assert_same_sets, members, plain, twin

from mmroute import hub
from mmroute.checks import Case, made_up, walk
from mmroute.prune import _rank
from mmroute.prune.sparsevlm import _density_peaks, _split


def room(case: Case, b: int, hop: int, rate: float) -> int:
    """How many free vision columns of a hop run at this rate."""
    whole, free = members(case, b, hop, VISION), members(case, b, hop, VISION, free=True)
    protected = len(whole) - len(free)
    return max(math.ceil(rate * len(whole) - 1e-6), protected) - protected


# ---------------------------------------------------------------------- DivPrune


def spread(case: Case, b: int) -> dict[int, float]:
    """Minus the turn at which each vision column is taken, hop by hop."""
    out = dict.fromkeys(range(case.tokens.shape[1]), 0.0)
    for hop in range(3):
        free = members(case, b, hop, VISION, free=True)
        unit = torch.nn.functional.normalize(case.x[b, free].double(), dim=-1)
        cosine = {c: dict(zip(free, row, strict=True)) for c, row in zip(free, (unit @ unit.T).tolist(), strict=True)}

        def apart(c: int, d: int, cosine: dict[int, dict[int, float]] = cosine) -> float:
            return 1 - cosine[c][d]

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
            first = [c for c in alive if plain(case).hop[b][c] == 0][:3]
            return {c: c + 1000.0 * (c in first) for c in alive}

        assert_same_sets(pruner, case, twin(case, score, [{VISION: 0.4, TEXT: 0.6}] * LAYERS, "kv_only"))


# ---------------------------------------------------------------------- Reroute


def last_attention(case: Case, b: int, layer: int, alive: list[int]) -> dict[int, float]:
    """Mean over heads of the last position's attention, by the layer's own queries and keys."""
    q, k = case.sources(layer)["qk"](case.hidden(layer))
    total = dict.fromkeys(alive, 0.0)
    for head in range(q.shape[1]):
        key = k[b, head // (q.shape[1] // k.shape[1])].double()
        products = (key[alive] @ q[b, head, max(alive)].double() / math.sqrt(q.shape[-1])).tolist()
        logits = dict(zip(alive, products, strict=True))
        norm = sum(math.exp(value) for value in logits.values())
        for c in alive:
            total[c] += math.exp(logits[c]) / norm
    return total


@pytest.mark.parametrize(("method", "starts"), [("fastv", [1, 1, 2, 4]), ("pyramiddrop", [1, 3, 4])])
def test_reroute_lets_all_compete_again_at_each_stage(method: str, starts: list[int]) -> None:
    pruner = hub.load("prune", "reroute", method=method, vision_keep=0.6)
    stage = [sum(layer >= s for s in starts) for layer in range(LAYERS)]
    power = [1 if method == "fastv" and n else n for n in stage]
    rates = [{VISION: 0.6**n} for n in power]
    for case in CASES:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            begun = max((s for s in starts if s <= layer), default=0)
            if method == "fastv" and begun == 1:
                return dict(enumerate(case.attention_map(1)[b, :, -1].mean(0).tolist()))
            return last_attention(case, b, begun, alive)

        assert_same_sets(pruner, case, twin(case, score, rates, "skip"))


def test_reroute_with_one_stage_is_the_method_it_reroutes() -> None:
    for case in CASES[:30]:
        for method, options in (("fastv", {"start_layer": 3}), ("pyramiddrop", {"stages": [0.5]})):
            name = "stage_keep" if method == "pyramiddrop" else "vision_keep"
            kept = walk(hub.load("prune", method, **{name: 0.4}, **options), case, LAYERS)
            again = hub.load("prune", "reroute", method=method, vision_keep=0.4, stages=[0.5])
            assert again.action == "skip"
            for one, other in zip(walk(again, case, LAYERS), kept, strict=True):
                assert torch.equal(one.mask, other.mask)


def test_reroute_chooses_once_a_stage() -> None:
    keeps = walk(hub.load("prune", "reroute"), CASES[1], LAYERS)
    assert keeps[2] is keeps[3]
    assert keeps[3] is not keeps[4]


# ---------------------------------------------------------------------- SnapKV


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_snapkv_keeps_the_window_and_what_it_looks_at(pool: str) -> None:
    pruner = hub.load("prune", "snapkv", vision_keep=0.4, text_keep=0.6, pool=pool)
    for case in CASES:
        maps = [case.attention_map(layer).tolist() for layer in range(LAYERS)]

        def score(b: int, layer: int, alive: list[int], maps: list = maps) -> dict[int, float]:
            width = math.ceil(len(alive) / 8)
            window = alive[-width:]
            out = dict.fromkeys(alive, 0.0)
            for head in maps[layer][b]:
                look = {c: 0.0 if c in window else sum(head[q][c] for q in window) / width for c in alive}
                for c in alive:
                    near = [look.get(d, 0.0) for d in range(c - 2, c + 3)]
                    out[c] += (sum(near) / 5 if pool == "mean" else max(near)) / 4
            return out | {c: 10.0 + c for c in window}

        assert_same_sets(pruner, case, twin(case, score, [{VISION: 0.4, TEXT: 0.6}] * LAYERS, "kv_only"))


# ---------------------------------------------------------------------- DART


def picked(case: Case, b: int, hop: int, layer: int, number: int) -> set[int]:
    keys = case.sources(layer)["keys"](layer - 1)[b].double()
    state = case.sources(layer)["final_normed"](case.hidden(layer))[b].double()
    norm = [sum(math.hypot(h[i], h[i + 4]) for h in heads for i in range(4)) for heads in keys.tolist()]
    free, image = members(case, b, hop, VISION, free=True), members(case, b, hop, VISION)
    vision = sorted(free, key=lambda c: (-norm[c], c))[: min(4, number)]
    text = sorted((c for c in members(case, b, hop, TEXT) if c > max(image)), key=lambda c: (-norm[c], c))[:4]
    chosen, left = set(vision), number - len(vision)
    pivots = vision + text
    for turn, pivot in enumerate(pivots):
        quota = left // len(pivots) + (turn < left % len(pivots))
        like = state[free] @ state[pivot] / state[free].norm(dim=1) / state[pivot].norm()
        cosine = dict(zip(free, like.tolist(), strict=True))
        rest = sorted((c for c in free if c not in chosen), key=lambda c: (cosine[c], c))
        chosen |= set(rest[:quota])
    return chosen


def test_dart_takes_pivots_and_what_is_least_like_them() -> None:
    pruner = hub.load("prune", "dart", vision_keep=0.55, start_layer=2)
    rates = [{VISION: 1.0 if layer < 2 else 0.55} for layer in range(LAYERS)]
    for case in CASES:

        def score(b: int, layer: int, alive: list[int], case: Case = case) -> dict[int, float]:
            out = dict.fromkeys(alive, 0.0)
            for hop in (0, 1) if layer == 2 else ():
                if number := room(case, b, hop, 0.55):
                    out |= dict.fromkeys(picked(case, b, hop, 2, number), 1.0)
            return out

        assert_same_sets(pruner, case, twin(case, score, rates, "drop"))


# ---------------------------------------------------------------------- SparseVLM


def raters(case: Case, b: int, hop: int) -> list[int]:
    x, image = case.hidden(0)[b].double(), members(case, b, hop, VISION)
    behind = [t for t in members(case, b, hop, TEXT) if t > max(image)]
    g = dict.fromkeys(behind, 0.0)
    for match in (x[image] @ x[behind].T).exp().tolist():
        for t, value in zip(behind, match, strict=True):
            g[t] += value / sum(match) / len(image)
    return [t for t in behind if g[t] > sum(g.values()) / len(g)] or behind


def naive_peaks(points: list[torch.Tensor], clusters: int) -> tuple[list[int], list[int]]:
    """Centres, and for each point the number of its cluster, by the formulas one by one."""
    number = range(len(points))
    apart = [((torch.stack(points) - p).norm(dim=1) / math.sqrt(len(p))).tolist() for p in points]
    density = []
    for i in number:
        near = sorted(apart[i][j] for j in number if j != i)[:clusters]
        density.append(math.exp(-sum(d * d for d in near) / len(near)) if near else 1.0)
    delta = [
        min((apart[i][j] for j in number if density[j] > density[i]), default=max(map(max, apart))) for i in number
    ]
    centres = sorted(number, key=lambda i: (-delta[i] * density[i], i))[:clusters]
    label = [min(range(clusters), key=lambda k: (apart[i][centres[k]], k)) for i in number]
    for k, i in enumerate(centres):
        label[i] = k
    return centres, label


def test_density_peaks_are_those_of_a_naive_loop() -> None:
    for seed in range(60):
        size, clusters = 1 + seed % 13, 1 + seed % 4
        x = torch.randn(size, 5, generator=torch.Generator().manual_seed(seed))
        centres, label = _density_peaks(x, min(clusters, size))
        want_centres, want_label = naive_peaks(list(x.double()), min(clusters, size))
        assert centres.tolist() == want_centres
        assert label.tolist() == want_label


def test_split_fills_the_room_with_the_most_that_stays_whole() -> None:
    for candidates in range(1, 200):
        for size in range(candidates + 1):
            best, clusters = _split(candidates, size)
            assert best + clusters == size
            dropped = candidates - best
            wanted = (int(0.3 * dropped) + 1) // 10 + 1 if dropped else 0
            assert clusters == min(wanted, size)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_sparsevlm_ranks_by_its_raters_and_merges_part_of_the_rest(version: str) -> None:
    keeps = (0.8, 0.55, 0.3)
    pruner = hub.load("prune", "sparsevlm", version=version, keeps=keeps)
    merged = 0
    for case in CASES:
        t = case.tokens
        kept = walk(pruner, case, LAYERS)
        maps = [case.attention_map(layer).tolist() for layer in range(4)]
        for b in range(t.shape[0]):
            stay = {c for c, real in enumerate(plain(case).valid[b]) if real}
            for layer in range(LAYERS):
                for hop in (0, 1) if 1 <= layer <= 3 else ():
                    image = members(case, b, hop, VISION)
                    if not image:
                        continue
                    attention = maps[layer][b]
                    rates = raters(case, b, hop)
                    mass = [sum(look[r][i] for r in rates for i in image) for look in attention]
                    heads = sorted(range(4), key=lambda h: (-mass[h], h))
                    heads = heads[:2] if version == "v2" else heads
                    alive = [c for c in members(case, b, hop, VISION, free=True) if c in stay]
                    c_of = {i: sum(attention[h][r][i] for h in heads for r in rates) for i in alive}
                    ranked = sorted(alive, key=lambda i: (-c_of[i], i))
                    size = min(room(case, b, hop, keeps[layer - 1]), len(alive))
                    best, clusters = _split(len(alive), size) if version == "v1" else (size, 0)
                    stay -= set(ranked[best:])
                    if clusters:
                        pool = ranked[best : best + int(0.3 * (len(alive) - best)) + 1]
                        x = case.hidden(layer)[b]
                        centres, label = naive_peaks([x[i].double() for i in pool], clusters)
                        stay |= {pool[i] for i in centres}
                        columns, states = kept[layer].write
                        assert columns[b].tolist() == list(range(t.shape[1]))
                        for k, i in enumerate(centres):
                            mean = torch.stack([x[pool[j]] for j in range(len(pool)) if label[j] == k]).mean(0)
                            torch.testing.assert_close(states[b, pool[i]], mean)
                            merged += label.count(k) > 1
                assert set(kept[layer].mask[b].nonzero().flatten().tolist()) == stay, f"layer {layer}, row {b}"
    assert (merged > 10) == (version == "v1")


def test_sparsevlm_changes_no_state_but_those_of_centres() -> None:
    case = made_up([[(0, TEXT, 3), (0, VISION, 40), (0, TEXT, 5)]])
    keep = walk(hub.load("prune", "sparsevlm"), case, LAYERS)[1]
    changed = (keep.write[1] != case.hidden(1)).any(-1)
    assert 1 <= int(changed.sum()) <= 3
    assert (keep.mask | ~changed).all()
