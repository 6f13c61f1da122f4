"""What a run cost, in closed form from its `Trace`: FLOPs, KV bytes, effective tokens. No model, no tensor, no clock.

Counted: matrix products, as FLOPs = 2 multiply-adds. Not counted: norms, rotary, softmax, additions (under 1 %).
All layers count, those before the first pruned one included; a method's own cost of choosing stands in `extra`.

Legend: D hidden, H query heads, K key-value heads, E head dim, F MLP width, L layers, q new positions of a row in a
layer, c keys of that row and layer that were cached before.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmroute.errors import ConfigError
from mmroute.tokens import NUM_MODALITIES, Modality
from mmroute.trace import Call, LayerCall, Shape, Trace

__all__ = [
    "Convention",
    "EffectiveTokens",
    "Flops",
    "effective_tokens",
    "estimate_flops",
    "estimate_kv_bytes",
    "estimate_kv_bytes_by_hop",
    "estimate_tower_flops",
    "keep_maps",
    "keep_shares",
    "kv_bytes_per_slot",
    "pairs",
    "planned_trace",
    "position_macs",
    "slots_by_layer",
]

Convention = Literal["causal", "rectangle"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of the text model, by what they were spent on."""

    prefill: int
    """Layers in calls that read given positions, second passes included."""
    decode: int
    """Layers in calls that write one position per row, second passes included."""
    extra: int
    """What methods spent on choosing, in all calls."""
    lm_head: int

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.extra + self.lm_head


@dataclass(frozen=True)
class EffectiveTokens:
    """Positions that ran, as the mean over layers (and over rows)."""

    vision: float
    """V_eff, first passes."""
    text: float
    """T_eff, first passes."""
    latent: float
    again: float
    """Positions of second passes, whatever their modality."""


def pairs(q: int, c: int, convention: Convention = "causal") -> int:
    """How many (query, key) products a row of q new positions on c cached ones needs per head.

    Args:
        convention: `causal` counts the keys a query may see, which is what is reported; `rectangle` counts what a dense
            kernel computes, which is what torch's `FlopCounterMode` sees.

    Example:
        >>> pairs(3, 2), pairs(3, 2, "rectangle")
        (12, 15)
    """
    return q * c + q * (q + 1) // 2 if convention == "causal" else q * (c + q)


def position_macs(shape: Shape) -> int:
    """Multiply-adds of one position in one layer, attention products apart: projections and MLP."""
    D, H, K, E, F = shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.mlp
    return D * H * E + 2 * D * K * E + H * E * D + (3 if shape.gated_mlp else 2) * D * F


def kv_bytes_per_slot(shape: Shape) -> int:
    """Bytes of the key and the value of one position in one layer."""
    return 2 * shape.kv_heads * shape.head_dim * shape.itemsize


def estimate_flops(trace: Trace, *, lm_head_positions: int | None = None, convention: Convention = "causal") -> Flops:
    """How many FLOPs the text model spent on everything in the trace, all rows together.

    Args:
        lm_head_positions: positions whose logits were computed; None is one per row and call, as in generation.
        convention: see `pairs`.

    Raises:
        ConfigError: another convention.
    """
    if convention not in ("causal", "rectangle"):
        raise ConfigError(f"convention is 'causal' (reported) or 'rectangle' (counter check), given {convention!r}")
    spent = {"prefill": 0, "decode": 0}
    extra = scored = 0
    for call in trace.calls:
        scored += sum(map(any, call.new))  # a row that a call brings nothing has no logits
        for layer in call.layers:
            spent[call.kind] += _layer_flops(layer, trace.shape, convention)
            extra += layer.extra_flops
    scored = scored if lm_head_positions is None else lm_head_positions
    return Flops(spent["prefill"], spent["decode"], extra, 2 * trace.shape.hidden * trace.shape.vocab * scored)


def _layer_flops(layer: LayerCall, shape: Shape, convention: Convention) -> int:
    ran = [sum(row) for row in layer.ran]
    macs = _pass_macs(ran, layer.cached, shape, convention)
    if layer.again:
        macs += _pass_macs(layer.again, layer.again_cached or [0] * len(layer.again), shape, convention)
    return 2 * macs


def _pass_macs(ran: Sequence[int], cached: Sequence[int], shape: Shape, convention: Convention) -> int:
    if convention == "rectangle" and set(ran) == {1}:
        # One position per row is one call for all rows, as wide as the longest row; shorter ones are masked.
        products = len(ran) * (max(cached) + 1)
    else:
        products = sum(pairs(q, c, convention) for q, c in zip(ran, cached, strict=True))
    return position_macs(shape) * sum(ran) + 2 * shape.heads * shape.head_dim * products


def estimate_kv_bytes(trace: Trace, at: Literal["end", "peak", "prefill"] = "end") -> int:
    """How many bytes of keys and values are live, all rows together.

    Second passes keep keys of their own, which count too.

    Args:
        at: `end` after the last call and hop close; `peak` the largest value after any call; `prefill` after the last
            call before the first generated position.

    Raises:
        ConfigError: another moment.
    """
    if at not in ("end", "peak", "prefill"):
        raise ConfigError(f"at is 'end', 'peak' or 'prefill', given {at!r}")
    history = [(call, sum(slots)) for call, slots in slots_by_layer(trace)]
    if not history:
        return 0
    if at == "peak":
        slots = max(count for _, count in history)
    elif at == "end":
        slots = history[-1][1]
    else:
        first = next((i for i, (call, _) in enumerate(history) if call.kind == "decode"), len(history))
        slots = history[max(first - 1, 0)][1]
    return slots * kv_bytes_per_slot(trace.shape)


def slots_by_layer(trace: Trace) -> Iterator[tuple[Call, list[int]]]:
    """[layer] live slots, all rows together: after each call and, once more under the call before it, each hop close.

    Slots of second passes count.
    """
    second = [0] * trace.shape.layers  # by layer; a call without a second pass leaves what is there
    for index, call in enumerate(trace.calls, start=1):
        for i, layer in enumerate(call.layers):
            if layer.again and any(layer.stored):  # without a cache nothing of a second pass stays either
                second[i] = sum(layer.again) + sum(layer.again_cached)
        yield call, [sum(layer.stored) + more for layer, more in zip(call.layers, second, strict=False)]
        for close in trace.closes:
            if close.at_call == index:
                yield call, [sum(rows) + more for rows, more in zip(close.after, second, strict=False)]


def effective_tokens(trace: Trace, kind: Literal["prefill", "decode"] | None = "prefill") -> EffectiveTokens:
    """How many positions of each modality ran, as the mean over layers and rows: V_eff, T_eff.

    Args:
        kind: calls that count; None is all of them.
    """
    totals, again, rows = [0] * NUM_MODALITIES, 0, 0
    for call in trace.calls:
        if kind in (None, call.kind):
            rows = max(rows, len(call.new))
            for layer in call.layers:
                again += sum(layer.again)
                for row in layer.ran:
                    totals = [a + b for a, b in zip(totals, row, strict=True)]
    over = max(rows, 1) * trace.shape.layers
    return EffectiveTokens(
        vision=totals[Modality.VISION] / over,
        text=totals[Modality.TEXT] / over,
        latent=totals[Modality.LATENT] / over,
        again=again / over,
    )


def keep_shares(trace: Trace) -> dict[str, float]:
    """Which share of the given vision and text positions ran, over all layers; 1.0 where there were none."""
    shares = {}
    for modality in (Modality.VISION, Modality.TEXT):
        calls = [call for call in trace.calls if call.kind == "prefill"]
        given = sum(row[modality] for call in calls for row in call.new) * trace.shape.layers
        ran = sum(row[modality] for call in calls for layer in call.layers for row in layer.ran)
        shares[modality.name.lower()] = ran / given if given else 1.0
    return shares


def estimate_kv_bytes_by_hop(trace: Trace) -> list[int]:
    """[hop]: bytes of keys and values that are live once the hop is over and closed; a trace of one row."""
    last: dict[int, int] = {}
    for call, slots in slots_by_layer(trace):
        last[call.hop[0]] = sum(slots)
    size = kv_bytes_per_slot(trace.shape)
    return [size * last.get(hop, 0) for hop in range(max(last, default=-1) + 1)]


def keep_maps(trace: Trace) -> dict[str, list[list[float | None]]]:
    """What each layer kept of each hop; a trace of one row.

    Returns:
        `vision` and `text`: [hop][layer] share of the hop's positions that ran, None where it has none; `kv`:
        [hop][layer] share of all positions so far that are cached once the hop is over and closed.
    """
    layers, hops = trace.shape.layers, max((call.hop[0] for call in trace.calls), default=-1) + 1
    maps: dict[str, list[list[float | None]]] = {
        name: [[None] * layers for _ in range(hops)] for name in ("vision", "text", "kv")
    }
    for modality in (Modality.VISION, Modality.TEXT):
        for hop in range(hops):
            calls = [call for call in trace.calls if call.hop[0] == hop]
            given = sum(call.new[0][modality] for call in calls)
            for layer in range(layers if given else 0):
                ran = sum(call.layers[layer].ran[0][modality] for call in calls)
                maps[modality.name.lower()][hop][layer] = ran / given
    seen = 0
    for index, call in enumerate(trace.calls, start=1):
        seen += sum(call.new[0])
        now = [layer.stored[0] for layer in call.layers]
        for close in (c for c in trace.closes if c.at_call == index):
            now = [rows[0] if rows else 0 for rows in close.after]
        maps["kv"][call.hop[0]] = [slots / seen for slots in now]
    return maps


def planned_trace(
    shape: Shape, new: list[list[int]], keep: Sequence[float] = (1.0, 1.0, 1.0), decode_steps: int = 0
) -> Trace:
    """The trace a run would leave: every layer at the same keep rates, then generated positions that all run.

    Args:
        new: [row][modality] positions of the prompt.
        keep: [modality] share that runs each layer; counts are rounded up.
        decode_steps: positions generated after the prompt.

    Example:
        >>> shape = Shape(hidden=4, layers=2, heads=2, kv_heads=1, head_dim=2, mlp=8, vocab=16, itemsize=4)
        >>> estimate_kv_bytes(planned_trace(shape, [[3, 10, 0]], (1.0, 0.4, 1.0)))  # 7 slots of 16 bytes in 2 layers
        224
    """
    # Footgun: 0.07 * 100 is 7.000000000000001, and ceil would keep one position too many.
    ran = [[math.ceil(n * share - 1e-6) for n, share in zip(row, keep, strict=True)] for row in new]
    kept = [sum(row) for row in ran]
    layers = [LayerCall(ran=ran, cached=[0] * len(new), stored=kept) for _ in range(shape.layers)]
    trace = Trace(shape, [Call("prefill", [0] * len(new), new, layers)])
    one = [[1 if m == Modality.TEXT else 0 for m in range(NUM_MODALITIES)] for _ in new]
    for step in range(decode_steps):
        cached = [k + step for k in kept]
        layers = [LayerCall(ran=one, cached=cached, stored=[c + 1 for c in cached]) for _ in range(shape.layers)]
        trace.calls.append(Call("decode", [0] * len(new), one, layers, start=max(sum(row) for row in new) + step))
    return trace


def estimate_tower_flops(vision: Any, grids: Sequence[tuple[int, int, int]]) -> int | None:
    """How many FLOPs a vision tower spends on some images, projection to the text width included.

    Attention in a tower is not causal, so this is what a dense kernel computes.

    Args:
        vision: the `vision_config` of a Transformers model.
        grids: per image (frames, patch rows, patch columns), before any merging.

    Returns:
        None for towers without a closed form here: all but Qwen2.5-VL's and CLIP's (of CLIP, the tower alone).
    """
    if vision.model_type in ("qwen2_5_vl", "qwen2_5_vl_vision"):
        return sum(_qwen25_tower(vision, *grid) for grid in grids)
    if vision.model_type == "clip_vision_model":
        return sum(_clip_tower(vision, *grid) for grid in grids)
    return None


def _qwen25_tower(vision: Any, frames: int, rows: int, columns: int) -> int:
    D, F, merge = vision.hidden_size, vision.intermediate_size, vision.spatial_merge_size
    patches = frames * rows * columns
    embed = patches * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * D
    full = len([layer for layer in vision.fullatt_block_indexes if layer < vision.depth])
    side = vision.window_size // merge // vision.patch_size  # of a window, in merged patches
    window_pairs = frames * sum(
        (a * b * merge**2) ** 2 for a in _cuts(rows // merge, side) for b in _cuts(columns // merge, side)
    )
    attention = 2 * D * (full * frames * (rows * columns) ** 2 + (vision.depth - full) * window_pairs)
    blocks = vision.depth * patches * (4 * D * D + 3 * D * F)
    wide = D * merge**2
    merger = patches // merge**2 * (wide * wide + wide * vision.out_hidden_size)
    return 2 * (embed + attention + blocks + merger)


def _cuts(length: int, side: int) -> list[int]:
    return [min(side, length - start) for start in range(0, length, side)]


def _clip_tower(vision: Any, frames: int, rows: int, columns: int) -> int:
    D, F, L = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
    patches = frames * rows * columns
    positions = patches + 1  # the class position
    embed = patches * vision.num_channels * vision.patch_size**2 * D
    return 2 * (embed + L * (positions * (4 * D * D + 2 * D * F) + 2 * D * positions**2))
