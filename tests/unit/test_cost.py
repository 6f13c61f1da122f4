"""Closed-form costs equal hand counts and torch's own FLOP counter."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmroute import cost
from mmroute.errors import ConfigError
from mmroute.trace import Call, HopClose, LayerCall, Shape, Trace

SHAPE = Shape(hidden=8, layers=2, heads=4, kv_heads=2, head_dim=2, mlp=12, vocab=20, itemsize=4)


def counted(run) -> int:
    """FLOPs by torch's counter. Without the math kernel it sees no attention on a CPU at all."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def qwen():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1]},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 3,
        "hidden_size": 16,
        "out_hidden_size": 32,
        "intermediate_size": 24,
        "num_heads": 2,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    ids = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").float().eval()


def shape_of(model) -> Shape:
    text = model.config.text_config
    return Shape(
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=text.hidden_size // text.num_attention_heads,
        mlp=text.intermediate_size,
        vocab=text.vocab_size,
        itemsize=4,
    )


def test_pairs_count_what_a_causal_mask_lets_through():
    for q, c in [(0, 0), (1, 0), (1, 7), (5, 0), (4, 3)]:
        visible = sum(key <= c + query for query in range(q) for key in range(c + q))
        assert cost.pairs(q, c) == visible
        assert cost.pairs(q, c, "rectangle") == q * (c + q)


def test_flops_of_one_row_equal_a_hand_count():
    trace = cost.planned_trace(SHAPE, [[2, 3, 0]], decode_steps=1)
    per_position = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12
    flops = cost.estimate_flops(trace)
    assert flops.prefill == 2 * 2 * (5 * per_position + 2 * 8 * 15)
    assert flops.decode == 2 * 2 * (per_position + 2 * 8 * 6)
    assert flops.lm_head == 2 * 8 * 20 * 2
    assert flops.total == flops.prefill + flops.decode + flops.lm_head


def test_a_two_matrix_mlp_costs_a_third_less_of_its_mlp():
    plain = Shape(**{**vars(SHAPE), "gated_mlp": False})
    assert cost.position_macs(SHAPE) - cost.position_macs(plain) == SHAPE.hidden * SHAPE.mlp


def test_choosing_and_second_passes_are_charged():
    layer = LayerCall(ran=[[2, 3, 0]], cached=[0], stored=[5], again=[2], again_cached=[1], extra_flops=77)
    with_again = Trace(SHAPE, [Call("prefill", [0], [[2, 3, 0]], [layer])])
    layer = LayerCall(ran=[[2, 3, 0]], cached=[0], stored=[5])
    without = Trace(SHAPE, [Call("prefill", [0], [[2, 3, 0]], [layer])])
    more, less = cost.estimate_flops(with_again), cost.estimate_flops(without)
    assert more.extra == 77
    assert more.prefill - less.prefill == 2 * (2 * cost.position_macs(SHAPE) + 2 * 8 * (2 * 1 + 3))
    assert cost.estimate_kv_bytes(with_again) - cost.estimate_kv_bytes(without) == 3 * cost.kv_bytes_per_slot(SHAPE)


def test_kv_bytes_follow_prefill_decode_and_hop_close():
    trace = cost.planned_trace(SHAPE, [[4, 10, 0], [4, 5, 0]], keep=(1.0, 0.4, 1.0), decode_steps=3)
    slot = 2 * 2 * 2 * 4
    assert cost.kv_bytes_per_slot(SHAPE) == slot
    assert cost.estimate_kv_bytes(trace, "prefill") == 2 * (8 + 6) * slot
    assert cost.estimate_kv_bytes(trace) == 2 * (11 + 9) * slot
    trace.closes.append(HopClose(hop=[0, 0], before=[[11, 9], [11, 9]], after=[[5, 4], [6, 4]], at_call=4))
    assert cost.estimate_kv_bytes(trace) == 19 * slot
    assert cost.estimate_kv_bytes(trace, "peak") == 2 * (11 + 9) * slot


def test_keys_of_a_second_pass_stay_while_later_calls_make_none():
    first = LayerCall(ran=[[5, 0, 0]], cached=[0], stored=[5], again=[2], again_cached=[0])
    step = LayerCall(ran=[[1, 0, 0]], cached=[5], stored=[6])
    calls = [Call("prefill", [0], [[5, 0, 0]], [first]), Call("decode", [0], [[1, 0, 0]], [step])]
    assert cost.estimate_kv_bytes(Trace(SHAPE, calls)) == (6 + 2) * cost.kv_bytes_per_slot(SHAPE)


def test_kv_bytes_without_a_cache_are_zero():
    layer = LayerCall(ran=[[2, 3, 0]], cached=[0], stored=[0], again=[2])
    assert cost.estimate_kv_bytes(Trace(SHAPE, [Call("prefill", [0], [[2, 3, 0]], [layer])])) == 0
    assert cost.estimate_kv_bytes(Trace(SHAPE)) == 0


def test_effective_tokens_average_over_all_layers_and_rows():
    dense = LayerCall(ran=[[2, 8, 0], [2, 4, 0]], cached=[0, 0], stored=[10, 6])
    sparse = LayerCall(ran=[[2, 2, 0], [1, 2, 0]], cached=[0, 0], stored=[4, 3])
    trace = Trace(SHAPE, [Call("prefill", [0, 0], [[2, 8, 0], [2, 4, 0]], [dense, sparse])])
    effective = cost.effective_tokens(trace)
    assert (effective.vision, effective.text) == (4.0, 1.75)
    assert cost.keep_shares(trace) == {"vision": 16 / 24, "text": 7 / 8}


def test_unknown_conventions_and_moments_are_refused():
    with pytest.raises(ConfigError, match="rectangle"):
        cost.estimate_flops(Trace(SHAPE), convention="square")
    with pytest.raises(ConfigError, match="peak"):
        cost.estimate_kv_bytes(Trace(SHAPE), at="start")


def test_rectangle_flops_of_a_stock_model_equal_the_counter(qwen):
    ids = torch.randint(3, 80, (2, 11))
    caches = []

    def run():
        out = qwen(input_ids=ids, use_cache=True)
        step = qwen(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)
        caches.append(step.past_key_values)

    trace = cost.planned_trace(shape_of(qwen), [[11, 0, 0]] * 2, decode_steps=1)
    assert cost.estimate_flops(trace, lm_head_positions=2 * 12, convention="rectangle").total == counted(run)
    layers = caches[0].layers
    assert cost.estimate_kv_bytes(trace) == sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))


def test_tower_flops_with_windows_equal_the_counter(qwen):
    grids = [(1, 8, 8), (1, 6, 10)]  # whole windows, and ones cut at the edge
    vision = qwen.config.vision_config
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(sum(t * h * w for t, h, w in grids), width)
    counter = counted(lambda: qwen.model.visual(pixels, grid_thw=torch.tensor(grids)))
    assert cost.estimate_tower_flops(vision, grids) == counter


def test_clip_tower_flops_equal_the_counter():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    model = CLIPVisionModel(config).eval()
    counter = counted(lambda: model(torch.randn(1, 3, 16, 16)))
    assert cost.estimate_tower_flops(config, [(1, 4, 4)]) == counter


def test_a_tower_without_closed_form_says_none(qwen):
    assert cost.estimate_tower_flops(qwen.config.text_config, [(1, 4, 4)]) is None
