"""The tables of docs/scaling.md are what the closed forms say. To write them anew: python tests/docs/test_scaling.py"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # run by hand, nobody else says where `released` is

import families
from released import NAMES, Released, released

from mmroute import backbones
from mmroute.cost import estimate_flops, estimate_kv_bytes, kv_bytes_per_slot, planned_trace, position_macs
from mmroute.train.curriculum import TrainConfig
from mmroute.train.tuning import Tuning

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
BACKBONES = NAMES[:-1]
"""On the page one by one; the last is the target of a fleet."""
LARGE, LARGE_CARDS = NAMES[-1], 4
"""Too large for one card: on so many, by a server of its own."""
DISTINCT = (
    "Qwen2.5-VL-3B",
    "Qwen2.5-VL-7B",
    "Qwen3-VL-8B",
    "LLaVA-NeXT-7B (Mistral)",
    "LLaVA-1.5-7B (Llama)",
    "Chameleon-7B, Anole-7B",
)
"""One of each shape of text model, from few bytes a position to many."""
SHOWN = DISTINCT[:2]
"""In the table of prompts, where the others hardly differ from the second."""
PROMPTS = ((200, 1024), (200, 4096))
KEEPS = ((1.0, 1.0), (0.5, 1.0), (0.4, 0.7), (0.25, 1.0))
STOCK, DARE = KEEPS[0], KEEPS[2]
"""Vision and text; the second is the mean that DARE's paper prints."""

GPUS, GPU_BYTES, GPU_FLOPS, GPU_READ = 8, 80e9, 989e12, 3.35e12
"""Of the plan: cards, and what a maker prints for one: memory, dense bf16 FLOP/s, bytes read per second."""
FLEET = 64
USABLE, BUSY, READING = 0.9, 0.4, 0.6
"""Assumed: shares of memory, of FLOP/s and of bandwidth that a good server reaches."""
WRITTEN = 256
"""Tokens of an answer."""
LONG, PICTURES = 8192, 0.75
"""Positions of a long conversation, and the share of them that are vision."""
ON_DRAFT = 0.6
"""Share of a fleet's questions that the gate leaves to the draft."""
TRAINED_ROWS = 8
"""Rows of 1224 positions on a card."""


def prefill_table():
    """What a prompt costs, by shape, length and mean keep rates."""
    yield "| model | vision + text | vision keep | text keep | prefill TFLOPs | of unrouted | KV MiB | of unrouted |"
    yield "|---|---|---|---|---|---|---|---|"
    for name in SHOWN:
        shape = released(name).shape
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
    for name in DISTINCT:
        shape = released(name).shape
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


def weight_bytes(shape):
    """Bytes of the matrices a step multiplies with: one number per multiply-add of a position, and the head."""
    return (shape.layers * position_macs(shape) + shape.hidden * shape.vocab) * shape.itemsize


def held_bytes(found: Released):
    """Bytes that a served copy of all weights takes, tower and embeddings included."""
    return found.parameters * found.shape.itemsize


@dataclass(frozen=True)
class Serving:
    """Full cards that answer questions of one length: what a question takes of them."""

    end: int
    """KV bytes of one conversation when its answer is written."""
    held: int
    """Conversations at once."""
    prefill: float
    """Card-seconds a question."""
    decode: float

    @property
    def answers(self):
        """A second and card: prefill and decode share the cards, so their times add up."""
        return 1 / (self.prefill + self.decode)


def serving(name, keep, text=200, vision=1024, cards=1):
    """One copy of a model on so many cards, at mean keep rates (vision, text); answers are cached whole."""
    found = released(name)
    shape = found.shape
    asked = planned_trace(shape, [[text, vision, 0]], (keep[1], keep[0], 1.0))
    slot = shape.layers * kv_bytes_per_slot(shape)
    end = estimate_kv_bytes(asked) + WRITTEN * slot
    held = int((USABLE * GPU_BYTES * cards - held_bytes(found)) / end)
    # A step reads the weights once and every conversation's cache, half of its answer written on average.
    mean = end - WRITTEN * slot // 2
    read = (weight_bytes(shape) + held * mean) / (READING * GPU_READ)
    macs = weight_bytes(shape) // shape.itemsize + 2 * shape.layers * shape.heads * shape.head_dim * (mean // slot)
    step = max(read, held * 2 * macs / (BUSY * GPU_FLOPS))
    prefill = estimate_flops(asked).prefill / (BUSY * GPU_FLOPS)
    return Serving(end, held, prefill, WRITTEN * step / held)


def long_conversation(name):
    """Text and vision positions of a long conversation, or of the longest the model is made for."""
    length = min(LONG, released(name).context)
    return length - round(PICTURES * length), round(PICTURES * length)


def backbones_table():
    """What fits on a card, by backbone, and what a step is bound by."""
    yield (
        "| model | weights, GB | KV bytes a token | positions | KV, GB | KV at .4 / .7, GB | conversations a card | "
        "at .4 / .7 | ms a step, one row | tokens/s, full card | at .4 / .7 |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    for name in BACKBONES:
        found = released(name)
        text, vision = long_conversation(name)
        kv, rows, rate = [], [], []
        for vision_keep, text_keep in (STOCK, DARE):
            kv.append(estimate_kv_bytes(planned_trace(found.shape, [[text, vision, 0]], (text_keep, vision_keep, 1.0))))
            side = serving(name, (vision_keep, text_keep), text, vision)
            rows.append(side.held)
            rate.append(WRITTEN / side.decode)
        alone = (weight_bytes(found.shape) + kv[0]) / (READING * GPU_READ)
        yield (
            f"| {name} | {held_bytes(found) / 1e9:.1f} | {found.shape.layers * kv_bytes_per_slot(found.shape)} | "
            f"{text + vision} | {kv[0] / 1e9:.2f} | {kv[1] / 1e9:.2f} | {rows[0]} | {rows[1]} | {1000 * alone:.1f} | "
            f"{rate[0]:.0f} | {rate[1]:.0f} |"
        )


def training_table():
    """What weights, gradients and optimisers take, by what is trained, and what a batch adds."""
    yield (
        "| model | `frozen`, GB | `lora`, GB | `full`, GB | Trainer, routers alone, GB | "
        f"Trainer, all, FSDP2 over {GPUS}, GB | layer inputs of {TRAINED_ROWS} rows, GB |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name in BACKBONES:
        found = released(name)
        shape = found.shape
        # Our trainers: the weights in fp32, and as they came; a gradient and Muon's momentum of what moves.
        frozen = found.parameters * (4 + shape.itemsize)
        lora = frozen + (4 + 8) * lora_parameters(shape)
        full = frozen + 8 * found.trained
        alone = found.parameters * shape.itemsize
        sharded = (found.parameters * 4 + found.trained * 12) / GPUS
        inputs = TRAINED_ROWS * sum(PROMPTS[0]) * shape.layers * shape.hidden * shape.itemsize
        sizes = (frozen, lora, full, alone, sharded, inputs)
        yield f"| {name} | " + " | ".join(f"{size / 1e9:.1f}" for size in sizes) + " |"


def lora_parameters(shape):
    """Numbers of Vedas' adapters by default: on all seven projections of every layer."""
    D, H, K, E, F = shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.mlp
    sides = (D + H * E) + 2 * (D + K * E) + (H * E + D) + 3 * (D + F)
    return TrainConfig.lora_rank * shape.layers * sides


def plan_table():
    """What eight replicas hold and answer, one model on each card."""
    yield "| model | keep | KV of one, MiB | conversations held | answers/s, prefill | answers/s, decode | answers/s |"
    yield "|---|---|---|---|---|---|---|"
    for name in DISTINCT:
        for keep in (STOCK, DARE):
            side = serving(name, keep)
            yield (
                f"| {name} | {keep[0]:g} / {keep[1]:g} | {side.end / 2**20:.1f} | {GPUS * side.held} | "
                f"{GPUS / side.prefill:.0f} | {GPUS / side.decode:.0f} | {GPUS * side.answers:.0f} |"
            )


def fleet(target, draft=None, f=ON_DRAFT):
    """Card-seconds of the mean question on the target's cards and on the draft's.

    Every question is read by the draft and rated by one more step of it; what is sent is read by the target too.
    """
    if draft is None:
        return target.prefill + target.decode, 0.0
    sent = (1 - f) * (target.prefill + target.decode)
    return sent, draft.prefill + draft.decode / WRITTEN + f * draft.decode


def fleet_table():
    """What a fleet answers with and without routing of questions and of tokens."""
    yield (
        "| target | draft | target's cards | draft's cards | answers/s | of the target alone | "
        "questions a day, millions | people at one question a minute |"
    )
    yield "|---|---|---|---|---|---|---|---|"
    seven, three = "Qwen2.5-VL-7B", "Qwen2.5-VL-3B"
    stock, large = serving(seven, STOCK), serving(LARGE, STOCK, cards=LARGE_CARDS)
    groups = (
        (
            (seven, None, stock, None),
            (f"{seven}, .4 / .7", None, serving(seven, DARE), None),
            (seven, three, stock, serving(three, STOCK)),
            (f"{seven}, .4 / .7", f"{three}, .4 / .7", serving(seven, DARE), serving(three, DARE)),
        ),
        (
            (LARGE, None, large, None),
            (LARGE, seven, large, stock),
            (LARGE, f"{seven}, .4 / .7", large, serving(seven, DARE)),
            (LARGE, f"{three}, .4 / .7", large, serving(three, DARE)),
        ),
    )
    for rows in groups:
        alone = FLEET / sum(fleet(rows[0][2]))
        for target, draft, big, small in rows:
            on_target, on_draft = fleet(big, small)
            rate = FLEET / (on_target + on_draft)
            yield (
                f"| {target} | {draft or '-'} | {rate * on_target:.1f} | {rate * on_draft:.1f} | {rate:.0f} | "
                f"{rate / alone:.2f} | {rate * 86400 / 1e6:.0f} | {rate * 60:.0f} |"
            )


TABLES = {
    "prefill": prefill_table,
    "decode": decode_table,
    "backbones": backbones_table,
    "training": training_table,
    "plan": plan_table,
    "fleet": fleet_table,
}


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
    shape = released("LLaVA-NeXT-7B (Mistral)").shape
    assert shape.layers * position_macs(shape) == pytest.approx(6.98e9, rel=1e-3)
    assert kv_bytes_per_slot(shape) * shape.layers == 131072  # 128 KiB a token: 2 x 8 x 128 x 2 bytes x 32 layers


PUBLISHED = {
    "Qwen2-VL-7B": 8_291_375_616,
    "Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen3-VL-8B": 8_767_123_696,
    "LLaVA-1.5-7B (Llama)": 7_063_427_072,
    "LLaVA-NeXT-7B (Mistral)": 7_566_747_648,
    "Qwen2.5-VL-72B": 73_410_777_344,
}
"""Parameters that the Hub shows for the checkpoint's safetensors files."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_checkpoint_of_these_sizes_has_the_published_number_of_parameters(name):
    assert released(name).parameters == PUBLISHED[name]


@pytest.mark.parametrize("part", ["full", "lora"])
def test_what_our_trainers_move_is_what_the_table_counts(part):
    model = families.make("qwen2_5_vl", layers=2)
    family = backbones.of(model)
    text, shape = family.text_model(model), family.shape(model)
    whole = sum(p.numel() for module in (text.layers, text.norm) for p in module.parameters())
    tuning = Tuning(model, part, TrainConfig.lora_rank, 16, TrainConfig.lora_targets, seed=0, embeddings=False)
    assert next(model.parameters()).dtype == torch.float32
    moved = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tuning.restore()
    assert moved == (whole if part == "full" else lora_parameters(shape))


def test_a_fleet_whose_draft_costs_nothing_answers_as_many_more_as_it_keeps_from_the_target():
    target, free = Serving(1, 1, 1.0, 3.0), Serving(1, 1, 0.0, 0.0)
    assert sum(fleet(target, free, f=0.6)) == pytest.approx(0.4 * sum(fleet(target)))
    draft = Serving(1, 1, 0.2, 0.512)
    assert sum(fleet(target, draft, f=1.0)) == pytest.approx(0.2 + 0.512 * (1 + 1 / WRITTEN))
    assert sum(fleet(target, draft, f=0.0)) == pytest.approx(4.0 + 0.2 + 0.512 / WRITTEN)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
