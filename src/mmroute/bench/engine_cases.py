"""What the engine's bench runs: its cases, and the random models and prompts that they are about.

A random Qwen2.5-VL text stack; positions stand for images by their ids alone, and no vision tower runs.

Legend: B batch, N positions.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmroute import cost
from mmroute.trace import Shape, Trace

__all__ = ["CASES", "IMAGE", "Case", "Stack", "build", "groups", "prompt"]

IMAGE = 500
"""Id of an image placeholder."""


@dataclass(frozen=True)
class Stack:
    """Sizes of a text model."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int = 2
    vocab: int = 2048

    @property
    def shape(self) -> Shape:
        """What costs depend on, in float32."""
        return Shape(
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            mlp=self.mlp,
            vocab=self.vocab,
            itemsize=4,
        )


@dataclass(frozen=True)
class Case:
    """One configuration, and what it may cost."""

    name: str
    stack: Stack
    lengths: tuple[int, ...]
    """[row]: valid positions; rows are left-padded to the longest."""
    num_vision: int
    """Vision positions of each row, part of its length."""
    vision_keep: float
    text_keep: float
    goal: float
    """The time ratio may be at most this ..."""
    over_ideal: bool = False
    """... times the FLOP ratio."""
    what: Literal["prefill", "decode", "train"] = "prefill"
    """`train` is a forward and a backward pass through DARE's routers."""
    executor: Literal["dense", "physical"] | None = None
    """For `train`."""
    over_stock_us: float | None = None
    """Microseconds per layer over the stock model, in place of `goal`: for layers so small that the engine shows."""

    @property
    def new(self) -> list[list[int]]:
        """[row][modality] positions of the prompt."""
        return [[n - self.num_vision, self.num_vision, 0] for n in self.lengths]

    def planned(self, routed: bool, steps: int = 0) -> Trace:
        """What a run must leave; the stock model runs and stores its padding too."""
        if routed:
            return cost.planned_trace(self.stack.shape, self.new, (self.text_keep, self.vision_keep, 1.0), steps)
        return cost.planned_trace(
            self.stack.shape, [[max(self.lengths), 0, 0] for _ in self.lengths], decode_steps=steps
        )

    def flop_ratio(self) -> float:
        """Routed over stock FLOPs of what is timed, language-model head apart.

        Given padding, the stock model attends through a mask, so it computes every pair of columns and not only the
        causal half of them.
        """
        if self.executor == "dense":
            return 1.0
        steps = 1 if self.what == "decode" else 0
        padded = len(set(self.lengths)) > 1
        ours = cost.estimate_flops(self.planned(True, steps))
        theirs = cost.estimate_flops(self.planned(False, steps), convention="rectangle" if padded else "causal")
        return ours.decode / theirs.decode if steps else ours.prefill / theirs.prefill


_LONG = Stack(layers=10, hidden=512, mlp=1376, heads=8)
_BATCH = Stack(layers=6, hidden=384, mlp=1024, heads=6)
_SMALL = Stack(layers=12, hidden=64, mlp=128, heads=4)
_RAGGED = (768, 618, 468, 318)
CASES = (
    Case("prefill-1024-keep-1-1", _LONG, (1024,), 784, 1.0, 1.0, goal=1.02),
    Case("prefill-1024-keep-.4-.7", _LONG, (1024,), 784, 0.4, 0.7, goal=1.06, over_ideal=True),
    Case("prefill-1024-keep-.4-.4", _LONG, (1024,), 784, 0.4, 0.4, goal=1.06, over_ideal=True),
    Case("batch-4-padded-keep-.4-.7", _BATCH, _RAGGED, 196, 0.4, 0.7, goal=0.37),
    Case("decode-1024-keep-1-1", _LONG, (1024,), 784, 1.0, 1.0, goal=1.02, what="decode"),
    Case("decode-1024-keep-.4-.7", _LONG, (1024,), 784, 0.4, 0.7, goal=1.0, what="decode"),
    Case("decode-64-small-keep-1-1", _SMALL, (64,), 48, 1.0, 1.0, goal=1.0, what="decode", over_stock_us=12),
    Case("train-dense-keep-.4-.7", _BATCH, (1024,), 784, 0.4, 0.7, goal=1.4, what="train", executor="dense"),
    Case("train-physical-keep-.4-.7", _BATCH, (1024,), 784, 0.4, 0.7, goal=0.5, what="train", executor="physical"),
)


def build(stack: Stack, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """A stock model of these sizes with random weights, the same at every call; made where it will live."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = stack.hidden // stack.heads // 2
    text = {
        "vocab_size": stack.vocab,
        "hidden_size": stack.hidden,
        "intermediate_size": stack.mlp,
        "num_hidden_layers": stack.layers,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.kv_heads,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
        },
    }
    tower = {"depth": 1, "hidden_size": 32, "out_hidden_size": stack.hidden, "intermediate_size": 32, "num_heads": 2}
    ids = {
        "image_token_id": IMAGE,
        "video_token_id": IMAGE + 1,
        "vision_start_token_id": IMAGE + 2,
        "vision_end_token_id": IMAGE + 3,
    }
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=dtype)
    return model.eval()


def prompt(case: Case, device: str) -> dict[str, Tensor]:
    """Ids whose image placeholders follow a few words of text, left-padded, with explicit positions."""
    B, N = len(case.lengths), max(case.lengths)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(IMAGE + 100, case.stack.vocab, (B, N), generator=generator)
    mask = torch.zeros(B, N, dtype=torch.long)
    for b, length in enumerate(case.lengths):
        text_before = min(10, length - case.num_vision)
        start = N - length + text_before
        mask[b, N - length :] = 1
        ids[b, start : start + case.num_vision] = IMAGE
    positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases that one stock model serves, together."""
    together: dict[Any, list[Case]] = {}
    for case in cases:
        together.setdefault((case.stack, case.lengths, case.what), []).append(case)
    return list(together.values())
