"""Stock layers as compiled graphs: one for all layers, all lengths and all keep sets; routing stays Python.

What changes from call to call (rows, what is cached, what is recorded) never meets the compiler, which would guard on
every number of it. A ticket takes its place: a number in a tensor, by which one custom op finds the call it belongs to,
writes the cache and attends exactly as without a compiler.

Legend: B batch, M positions that run, S key slots, H query heads, K key-value heads, E head dim.

Source: none; the papers describe no executor.
Deviates: nothing is compiled where gradients are on, the op has no backward.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmroute.rows import Rows, Ticket

__all__ = ["Compiled"]


class _Call(NamedTuple):
    """What a ticket stands for."""

    attention: nn.Module
    backend: str
    stored: Any
    """The layer's cache, its write planned; None without one."""
    rows: Rows


_CALLS: dict[int, _Call] = {}
_NUMBERS = itertools.count()


@torch.library.custom_op("mmroute::rows_attention", mutates_args=())
def rows_attention(query: Tensor, key: Tensor, value: Tensor, number: Tensor, scaling: float) -> Tensor:
    """Writes the cache of the call with that number and attends: (B, H, M, E), (B, K, M, E) -> (B, M, H, E).

    Footgun: it writes what is not among its arguments. That is sound because nothing else in the graph sees the cache,
    and because a graph holds one of these, whose result is used: it is neither dropped nor run twice.
    """
    call = _CALLS[int(number)]
    if call.stored is not None:
        key, value = call.stored.update(key, value)
    attend = ALL_ATTENTION_FUNCTIONS[call.backend]
    out = attend(call.attention, query, key, value, None, scaling=scaling, dropout=0.0, rows=call.rows)[0]
    return out.contiguous()


@rows_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, number: Tensor, scaling: float) -> Tensor:
    B, H, M, E = query.shape
    return query.new_empty(B, M, H, E)


class Compiled:
    """The compiled layers of one attached model, made as they are first run.

    Args:
        backend: of `torch.compile`.
        attention: registered name of the routed attention.
    """

    def __init__(self, backend: str | Callable[..., Any], attention: str) -> None:
        self.backend, self.attention = backend, attention
        self._layers: dict[int, Callable[..., Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """A copied model compiles its own layers: a compiled one keeps running those it was made of."""
        return {**self.__dict__, "_layers": {}}

    def bind(self, layer: Any, index: int, stored: Any, rows: Rows) -> Callable[..., Any]:
        """One call of a layer, to be made once, with what the stock forward takes beside rows and cache."""
        if index not in self._layers:
            self._layers[index] = torch.compile(layer._stock_forward, backend=self.backend, dynamic=True)
        return functools.partial(self._run, self._layers[index], _Call(layer.self_attn, self.attention, stored, rows))

    @staticmethod
    def _run(forward: Callable[..., Any], call: _Call, x: Tensor, **kwargs: Any) -> Any:
        number = next(_NUMBERS)
        _CALLS[number] = call
        ticket = Ticket(torch.tensor(number))
        try:
            return forward(x, past_key_values=ticket, rows=ticket, **kwargs)
        finally:
            del _CALLS[number]
