"""The tables of docs/scaling.md are what the closed forms say. To write them anew: python tests/docs/test_scaling.py"""

import re
from pathlib import Path

import pytest

from mmroute.cost import estimate_flops, estimate_kv_bytes, kv_bytes_per_slot, planned_trace, position_macs
from mmroute.trace import Shape

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
SHAPES = {
    "Qwen2.5-VL-3B": Shape(
        hidden=2048, layers=36, heads=16, kv_heads=2, head_dim=128, mlp=11008, vocab=151936, itemsize=2
    ),
    "Qwen2.5-VL-7B": Shape(
        hidden=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp=18944, vocab=152064, itemsize=2
    ),
    "LLaVA (Mistral-7B)": Shape(
        hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp=14336, vocab=32064, itemsize=2
    ),
    "Chameleon-7B": Shape(
        hidden=4096, layers=32, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=65536, itemsize=2
    ),
}
PROMPTS = ((200, 1024), (200, 4096))
KEEPS = ((1.0, 1.0), (0.5, 1.0), (0.4, 0.7), (0.25, 1.0))
SHOWN = ("Qwen2.5-VL-3B", "Qwen2.5-VL-7B")
"""In the table of prompts, where the other two hardly differ from the second."""


def prefill_table():
    """What a prompt costs, by shape, length and mean keep rates."""
    yield "| model | vision + text | vision keep | text keep | prefill TFLOPs | of unrouted | KV MiB | of unrouted |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in SHOWN:
        shape = SHAPES[name]
        for text, vision in PROMPTS:
            sides = []
            for vision_keep, text_keep in KEEPS:
                trace = planned_trace(shape, [[text, vision, 0]], (text_keep, vision_keep, 1.0))
                sides.append((estimate_flops(trace).prefill, estimate_kv_bytes(trace)))
                flops, kv = sides[-1]
                yield (
                    f"| {name} | {vision} + {text} | {vision_keep:g} | {text_keep:g} | {flops / 1e12:.2f} | "
                    f"{flops / sides[0][0]:.3f} | {kv / 2**20:.1f} | {kv / sides[0][1]:.3f} |"
                )


def decode_table():
    """What one decode step must read, and how much of that pruning the cache can save."""
    yield "| model | rows | weights read, GiB | KV read, GiB | KV's part | read at .4 / .7, of unrouted |"
    yield "|---|---|---|---|---|---|"
    for name, shape in SHAPES.items():
        for rows in (1, 8, 64):
            whole, routed = (
                estimate_kv_bytes(planned_trace(shape, [[200, 1024, 0]] * rows, keep))
                for keep in ((1.0, 1.0, 1.0), (0.7, 0.4, 1.0))
            )
            weights = weight_bytes(shape)
            yield (
                f"| {name} | {rows} | {weights / 2**30:.2f} | {whole / 2**30:.2f} | {whole / (weights + whole):.1%} | "
                f"{(weights + routed) / (weights + whole):.3f} |"
            )


GPUS, GPU_BYTES, GPU_FLOPS, GPU_READ = 8, 80e9, 989e12, 3.35e12
"""Of the plan: cards, and what a maker prints for one: memory, dense bf16 FLOP/s, bytes read per second."""
USABLE, BUSY, READING = 0.9, 0.4, 0.6
"""Assumed: shares of memory, of FLOP/s and of bandwidth that a good server reaches."""
WRITTEN = 256
"""Tokens of an answer."""


def plan_table():
    """What eight replicas hold and answer, one model on each card."""
    yield "| model | keep | KV of one, MiB | conversations held | answers/s, prefill | answers/s, decode | answers/s |"
    yield "|---|---|---|---|---|---|---|"
    for name, shape in SHAPES.items():
        for vision_keep, text_keep in KEEPS[:1] + KEEPS[2:3]:
            asked = planned_trace(shape, [[200, 1024, 0]], (text_keep, vision_keep, 1.0))
            weights = weight_bytes(shape)
            end = estimate_kv_bytes(asked) + WRITTEN * shape.layers * kv_bytes_per_slot(shape)
            held = int((USABLE * GPU_BYTES - weights) / end)
            prefill = BUSY * GPU_FLOPS / estimate_flops(asked).prefill
            # A step reads the weights once and every conversation's cache, half of its answer written on average.
            mean = end - WRITTEN * shape.layers * kv_bytes_per_slot(shape) / 2
            step = (weights + held * mean) / (READING * GPU_READ)
            decode = held / (WRITTEN * step)
            both = 1 / (1 / prefill + 1 / decode)
            yield (
                f"| {name} | {vision_keep:g} / {text_keep:g} | {end / 2**20:.1f} | {GPUS * held} | "
                f"{GPUS * prefill:.0f} | {GPUS * decode:.0f} | {GPUS * both:.0f} |"
            )


def weight_bytes(shape):
    """Bytes of the matrices a step multiplies with: one number per multiply-add of a position, and the head."""
    return (shape.layers * position_macs(shape) + shape.hidden * shape.vocab) * shape.itemsize


TABLES = {"prefill": prefill_table, "decode": decode_table, "plan": plan_table}


def page(text):
    """The page with its tables filled."""
    for name, rows in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        assert text.count(start) == text.count(end) == 1
        filled = "\n".join([start, *rows(), end])
        text = re.sub(f"{start}.*?{end}", lambda _, filled=filled: filled, text, flags=re.DOTALL)
    return text


def test_the_tables_are_what_the_closed_forms_say():
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run: python tests/docs/test_scaling.py"


def test_a_position_of_a_7b_model_costs_what_is_known_of_such_models():
    """2 FLOPs per weight and token, attention products apart: Mistral-7B has 6.98e9 weights in its layers."""
    shape = SHAPES["LLaVA (Mistral-7B)"]
    assert shape.layers * position_macs(shape) == pytest.approx(6.98e9, rel=1e-3)
    assert kv_bytes_per_slot(shape) * shape.layers == 131072  # 128 KiB a token: 2 x 8 x 128 x 2 bytes x 32 layers


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
