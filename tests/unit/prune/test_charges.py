"""What choosing costs is counted against every method, from what it asked the engine for; hand counts, not its own."""

import families
import pytest
import torch

import mmroute
from mmroute import hub
from mmroute.cost import estimate_flops

LAYERS, N, P = 4, 36, 2 * 16
D, H, K, E = families.HIDDEN, 4, 2, 16
"""Width, heads, key-value heads, head dim of the tiny models."""


def row(keys):
    return 2 * H * E * keys


CHARGED = {
    # One attention row over all keys of the layer before.
    "fastv": ({"vision_keep": 0.5, "start_layer": 2}, lambda n, v: row(n)),
    # That row at stages 1, 2, 3, with queries and keys of everything.
    "pyramiddrop": ({"stage_keep": 0.5}, lambda n, v: 3 * (2 * D * E * (H + K) * n + row(n))),
    # A named row at the first stage (E to score, 1 to average), then queries, keys and the last row at the second.
    "reroute": (
        {"vision_keep": 0.5, "stages": (0.25, 0.5)},
        lambda n, v: 2 * H * (E + 1) * n + 2 * D * E * (H + K) * n + row(n),
    ),
    # All pairs once, then one row of them per pick.
    "divprune": ({"vision_keep": 0.5}, lambda n, v: 2 * D * v * (v + v // 2)),
    # Eight pivots against all.
    "dart": ({"vision_keep": 0.5, "start_layer": 2}, lambda n, v: 2 * D * 8 * v),
    # A norm for each key and layer; its product with the mean too.
    "knorm": ({"vision_keep": 0.5}, lambda n, v: LAYERS * 2 * K * E * n),
    "keydiff": ({"vision_keep": 0.5}, lambda n, v: LAYERS * 4 * K * E * n),
    # The window's rows at each layer.
    "snapkv": ({"vision_keep": 0.5}, lambda n, v: LAYERS * 2 * H * -(-n // 8) * (E + 1) * n),
    # Nothing is read.
    "streaming": ({"vision_keep": 0.5}, lambda n, v: 0),
    "random": ({"vision_keep": 0.5}, lambda n, v: 0),
    # One product per position and layer that chooses: the row of its modality. p-MoD's first layer is whole.
    "mod": ({"vision_keep": 0.5}, lambda n, v: 3 * 2 * D * n),
    "symmetric": ({"keep": 0.7, "first_layer": 1}, lambda n, v: 3 * 2 * D * n),
    "dare": ({"vision_keep": 0.5, "text_keep": 0.8, "first_layer": 1, "cutoff_layer": 3}, lambda n, v: 3 * 2 * D * n),
}  # fmt: skip
ELSEWHERE = {
    "sparsevlm": "how many are clustered decides; its rows are charged below",
    "visionzip": "tests/unit/prune/test_visionzip.py",
    "schedule": "charged as fastv's row, or as knorm's",
    "oracle": "given the truth, it computes nothing",
    "none": "chooses nothing",
}


def spent(name, **options):
    model = families.make("qwen2_5_vl", "sdpa", layers=LAYERS)
    batch = families.make_inputs("qwen2_5_vl", model, batch=1, pads=[0], images=1, before=6, after=8)
    given = {"relevance": torch.ones(batch["input_ids"].shape)} if name == "oracle" else {}
    with mmroute.attach(model, prune=hub.load("prune", name, **options), strip_padding=True) as routed, torch.no_grad():
        routed.model(**batch, **given, use_cache=True)
        new = routed.trace.calls[0].new[0]
        flops = estimate_flops(routed.trace)
    assert flops.total == flops.prefill + flops.decode + flops.extra + flops.lm_head
    return flops.extra, sum(new), new[1]


def test_every_method_is_charged_somewhere():
    assert set(CHARGED) | set(ELSEWHERE) == set(hub.names("prune"))


@pytest.mark.parametrize("name", CHARGED)
def test_choosing_costs_what_a_hand_count_says(name):
    options, count = CHARGED[name]
    extra, n, v = spent(name, **options)
    assert extra == count(n, v)


@pytest.mark.parametrize("name", ["sparsevlm", "visionzip"])
def test_methods_that_merge_pay_for_attention_and_for_clusters(name):
    least = spent(name, **({"keeps": (0.6, 0.5, 0.4), "version": "v2"} if name == "sparsevlm" else {"contextual": 0.0}))
    merged = spent(name, **({"keeps": (0.6, 0.5, 0.4)} if name == "sparsevlm" else {"contextual": 0.4}))
    assert merged[0] > least[0] > 2 * E * least[1]


@pytest.mark.parametrize("scorer", ["row", "knorm", "random"])
def test_a_schedule_pays_for_what_it_ranks_by(scorer):
    extra, n, _ = spent("schedule", vision=(1.0, 1.0, 0.5, 0.5), scorer=scorer)
    keys = 2 * D * E * (H + K) * n + 2 * K * E * n
    # The row of layer 2 is over what ran there.
    assert {"row": row(n) < extra < 2 * row(n), "knorm": extra == 2 * keys, "random": extra == 0}[scorer]


@pytest.mark.parametrize("name", ["oracle", "none"])
def test_controls_that_compute_nothing_pay_nothing(name):
    assert spent(name)[0] == 0
