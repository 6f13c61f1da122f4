"""The forward pass of the small model, made for training on one CPU core; the numbers are those of the stock classes.

It runs the weights of a stock Qwen2.5-VL model built by `small_model.build`, several times faster, because
- a vision window is one tile, so each distinct tile of a batch is encoded once and gathered;
- positions have a closed form when every image has the same side and place;
- half of the rotation is folded into the projection, the norm's scale into the weights behind it;
- attention is written out on CPU: the backward pass of the fused kernel there takes ten times its forward pass in bf16.
`tests/unit/train/test_fast.py` holds it to the stock forward.

Legend: B batch, N positions, D hidden size, H query heads, K key-value heads, E head dim, T distinct tiles.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen2_5_VLForConditionalGeneration

from mmroute.errors import ConfigError
from mmroute.train.small_model import MERGE, PATCH

__all__ = ["Positions", "encode_tiles", "run_text"]

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_VISION_THETA = 10_000.0
_STD = (0.26862954, 0.26130258, 0.27577711)


class Positions:
    """Where each column of a batch stands: text, then a square image of `side` tiles at column `first`, then text."""

    def __init__(self, first: int, side: int, length: int, device: torch.device) -> None:
        tile = torch.arange(side, device=device)
        before = torch.arange(first, device=device).expand(3, -1)
        image = torch.stack(
            [
                torch.full((side * side,), first, device=device),
                first + tile.repeat_interleave(side),
                first + tile.repeat(side),
            ]
        )
        rest = length - first - side * side
        after = (torch.arange(rest, device=device) + first + side).expand(3, -1)
        self.ids: Int[Tensor, "3 N"] = torch.cat([before, image, after], dim=1)


def encode_tiles(
    model: Qwen2_5_VLForConditionalGeneration, pixels: Float[Tensor, "T px px 3"], dtype: torch.dtype
) -> Float[Tensor, "T D"]:
    """The vision token of each tile, as the stock tower gives it wherever the tile lies.

    Args:
        pixels: values in [0, 255].

    Raises:
        ConfigError: a vision window is larger than one tile, so a token depends on its neighbours.
    """
    vision: Any = model.model.visual
    if vision.fullatt_block_indexes or vision.window_size != PATCH * MERGE:
        raise ConfigError("the fast vision pass takes windows of one tile and no full-attention block")
    x = _patches(pixels).to(dtype) @ vision.patch_embed.proj.weight.flatten(1).to(dtype).T  # (T, 4, vision width)
    cos, sin = (table.to(dtype) for table in _vision_rotation(vision.config, x.device))
    for block in vision.blocks:
        attention = block.attn
        qkv = _linear(attention.qkv, _norm(block.norm1, x), dtype)
        q, k, v = qkv.view(*x.shape[:2], 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = q * cos + _turn(q) * sin, k * cos + _turn(k) * sin
        weight = (q @ k.transpose(-1, -2) * attention.scaling).softmax(-1)
        x = x + _linear(attention.proj, (weight @ v).transpose(1, 2).flatten(2), dtype)
        h = _norm(block.norm2, x)
        mlp = block.mlp
        x = x + _linear(mlp.down_proj, F.silu(_linear(mlp.gate_proj, h, dtype)) * _linear(mlp.up_proj, h, dtype), dtype)
    merger = vision.merger
    first, act, second = merger.mlp
    return _linear(second, act(_linear(first, _norm(merger.ln_q, x).flatten(1), dtype)), dtype)


def run_text(
    model: Qwen2_5_VLForConditionalGeneration,
    x: Float[Tensor, "B N D"],
    positions: Int[Tensor, "3 N"],
    tap: int | None = None,
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N D"] | None]:
    """Hidden states behind the last norm, and behind the same norm after the first `tap` layers.

    Args:
        x: embeddings, in the dtype to compute in.
        positions: of every row; rows are padded on the right, where a causal pass needs no mask.
        tap: number of layers after which the second result is read; None for none.
    """
    text: Any = model.model.language_model
    dtype = x.dtype
    cos, sin = (table[:, None].to(dtype) for table in _text_rotation(text.config, positions))  # (N, 1, E)
    future = torch.full((x.shape[1],) * 2, -torch.inf, device=x.device, dtype=dtype).triu(1)
    tapped = None
    for index, layer in enumerate(text.layers):
        x = x + _attend(layer, x, cos, sin, future)
        h = _normalise(x, layer.post_attention_layernorm.variance_epsilon)
        scale = layer.post_attention_layernorm.weight
        gate = F.linear(h, (layer.mlp.gate_proj.weight * scale).to(dtype))
        up = F.linear(h, (layer.mlp.up_proj.weight * scale).to(dtype))
        x = x + F.linear(F.silu(gate) * up, layer.mlp.down_proj.weight.to(dtype))
        if index + 1 == tap:
            tapped = _norm(text.norm, x)
    return _norm(text.norm, x), tapped


def _vision_rotation(config: PretrainedConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the patches of one tile; attention sees differences only, so any tile's do."""
    width = config.hidden_size // config.num_heads // 2
    frequency = _frequencies(_VISION_THETA, width, device)
    corner = torch.tensor([[row, column] for row in range(MERGE) for column in range(MERGE)], device=device)
    angle = (corner[..., None] * frequency).flatten(1).repeat(1, 2)
    return angle.cos(), angle.sin()


def _text_rotation(config: PretrainedConfig, positions: Int[Tensor, "3 N"]) -> tuple[Tensor, Tensor]:
    """Cosines and sines by position; time, height and width each turn their own section of the frequencies."""
    frequency = _frequencies(
        config.rope_parameters["rope_theta"], config.hidden_size // config.num_attention_heads, positions.device
    )
    section = torch.tensor(config.rope_parameters["mrope_section"], device=positions.device)
    owner = torch.arange(3, device=positions.device).repeat_interleave(section)
    angle = (positions[owner].T * frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def _frequencies(theta: float, width: int, device: torch.device) -> Tensor:
    return theta ** -(torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def _attend(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, future: Tensor) -> Tensor:
    attention = layer.self_attn
    B, N, D = x.shape
    E = attention.head_dim
    H, K = attention.num_heads, attention.num_key_value_heads
    scale = layer.input_layernorm.weight
    qk_weight = torch.cat([attention.q_proj.weight, attention.k_proj.weight]) * scale
    qk_bias = torch.cat([attention.q_proj.bias, attention.k_proj.bias])
    # Rotated halves come out of the projection itself: a matrix product costs less here than moving memory about.
    weight = torch.cat([qk_weight, _turn_rows(qk_weight, E), attention.v_proj.weight * scale])
    bias = torch.cat([qk_bias, _turn_rows(qk_bias, E), attention.v_proj.bias])
    h = _normalise(x, layer.input_layernorm.variance_epsilon)
    plain, turned, v = F.linear(h, weight.to(x.dtype), bias.to(x.dtype)).split([(H + K) * E, (H + K) * E, K * E], -1)
    qk = torch.addcmul(plain.view(B, N, H + K, E) * cos, turned.view(B, N, H + K, E), sin).transpose(1, 2)
    q, k = qk.split([H, K], 1)
    v = v.view(B, N, K, E).transpose(1, 2)
    if x.is_cuda:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=attention.scaling, enable_gqa=True)
    else:
        out = _attend_on_cpu(q, k, v, future, attention.scaling)
    return F.linear(out.transpose(1, 2).reshape(B, N, D), attention.o_proj.weight.to(x.dtype))


def _attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, future: Tensor, scaling: float) -> Tensor:
    """Causal attention with the query heads of one key-value head laid side by side as rows of one product."""
    B, H, N, E = q.shape
    K = k.shape[1]
    q = (q * scaling).reshape(B * K, H // K * N, E)
    score = torch.matmul(q, k.reshape(B * K, N, E).transpose(1, 2)).view(B * K, H // K, N, N)
    weight = (score + future).softmax(-1).view(B * K, H // K * N, N)
    return torch.matmul(weight, v.reshape(B * K, N, E)).view(B, H, N, E)


class _Normalise(torch.autograd.Function):
    """x over its root mean square; a backward pass of three operations where the built-in one takes ten."""

    @staticmethod
    def forward(ctx, x, eps):  # type: ignore[no-untyped-def]
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = (size.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
        y = F.rms_norm(x, (x.shape[-1],), None, eps)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        y, inverse = ctx.saved_tensors
        along = (grad * y).mean(-1, keepdim=True)
        return torch.addcmul(grad, y, along, value=-1).mul_(inverse), None


def _normalise(x: Tensor, eps: float) -> Tensor:
    return _Normalise.apply(x, eps)


def _norm(norm: Any, x: Tensor) -> Tensor:
    return _normalise(x, norm.variance_epsilon) * norm.weight.to(x.dtype)


def _linear(layer: nn.Linear, x: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x, layer.weight.to(dtype), None if layer.bias is None else layer.bias.to(dtype))


def _turn(x: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def _turn_rows(weight: Tensor, head_dim: int) -> Tensor:
    """The projection whose output is the rotated half of the given projection's output."""
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))
    return torch.stack([-halves[:, 1], halves[:, 0]], 1).flatten(0, 2)


def _patches(pixels: Float[Tensor, "T px px 3"]) -> Float[Tensor, "T 4 W"]:
    """Pixels as the image processor lays them out: by patch, then colour, time (one frame twice), row, column."""
    mean, std = (torch.tensor(values, device=pixels.device) for values in (_MEAN, _STD))
    x = (pixels / 255 - mean) / std
    x = x.view(-1, MERGE, PATCH, MERGE, PATCH, 3).permute(0, 1, 3, 5, 2, 4)  # T, row, column, colour, y, x
    return x.unsqueeze(4).expand(-1, -1, -1, -1, 2, -1, -1).reshape(len(pixels), MERGE * MERGE, -1)
