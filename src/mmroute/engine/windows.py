"""Windows of a vision tower in one call of attention for each length, where stock code makes one call a window.

Stock towers without FlashAttention split their patches by `cu_seqlens` and attend window by window: for a picture of
100 windows that is 100 calls a layer, a third of what a small model takes to read it. The same windows are attended to
here, those of equal length as one batch.

Legend: P patches, W windows, N patches of a window, H heads, E head dim.

Source: none; the papers describe no executor.
Deviates: equal to the stock tower to rounding, not bit for bit; `routed.off()` and `detach` are the stock tower.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmroute.engine.controller import Controller

__all__ = ["InOneCall"]

_BASE = "sdpa"
_NAME = f"mmroute_windows_{_BASE}"


class InOneCall:
    """Lets the attention modules of a tower run so, until it ends.

    Args:
        attentions: stock modules of one configuration, which split by `cu_seqlens`; left as they are where that names
            another backend than `sdpa`.
        controller: asked at every call; where it is off, the stock code runs.
    """

    def __init__(self, attentions: Sequence[Any], controller: Controller) -> None:
        self._controller = controller
        self._configs = [a.config for a in attentions if a.config._attn_implementation == _BASE]
        self._handles: list[RemovableHandle] = []
        if self._configs:
            AttentionInterface.register(_NAME, _attend)
            self._handles = [a.register_forward_pre_hook(self._before, with_kwargs=True) for a in attentions]
            self._name(_NAME)

    def end(self) -> None:
        """The stock modules again."""
        for handle in self._handles:
            handle.remove()
        self._name(_BASE)
        self._configs = []

    def _name(self, name: str) -> None:
        for config in self._configs:
            config._attn_implementation_internal = name

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Makes one piece of all windows; their lengths go through the stock code to `_attend`."""
        ends = kwargs.get("cu_seqlens")
        if ends is None or len(ends) < 3 or self._controller.is_off:
            return args, kwargs
        return args, {**kwargs, "cu_seqlens": ends[[0, -1]], "windows": ends.diff().tolist()}


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **given: Any
) -> tuple[Tensor, None]:
    """(1, H, P, E) queries, keys and values -> (1, P, H, E); `windows` are the lengths of what follows each other."""
    sdpa = ALL_ATTENTION_FUNCTIONS[_BASE]
    lengths: list[int] = given.pop("windows", [query.shape[2]])

    def run(part: list[Tensor], size: int) -> Tensor:
        batched = [x[0].unflatten(1, (-1, size)).transpose(0, 1) for x in part]  # (W, H, N, E)
        return sdpa(module, *batched, attention_mask, **given)[0].flatten(0, 1)[None]

    sizes = sorted(set(lengths))
    if len(sizes) == 1:
        return run([query, key, value], sizes[0]), None
    counts = torch.tensor(lengths, device=query.device)
    of_patch = counts.repeat_interleave(counts)
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    for size in sizes:
        at = (of_patch == size).nonzero()[:, 0]
        out[:, at] = run([x[:, :, at] for x in (query, key, value)], size)
    return out, None
