"""Gradients through routing: the dense executor, where every position runs and gates decide what counts, the gate that
both executors put on a layer's update, and a cache that gradients flow through.

Legend: B batch, N positions of this call.

Source: DARE, straight-through selection with an additive mask in training.
Deviates: the paper masks hidden states; here keys are gated inside the softmax (`gated.py`), and the update by z.
    Scaling hidden states instead would be undone by the next norm.
"""

import copy
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mmroute.cache import RaggedCache
from mmroute.engine.gated import Gate
from mmroute.prune.base import Keep
from mmroute.ragged import RaggedLayer
from mmroute.tokens import Tokens

__all__ = ["GrowingCache", "GrowingLayer", "grown", "key_gate", "update_gate"]


def update_gate(keep: Keep) -> Float[Tensor, "B N"] | None:
    """What multiplies a layer's update, x + gate (f(x) - x); None is 1.

    At the positions that run, the straight-through mask is 1 with the gradient of the soft choice. So one gate serves
    both executors: the dense one reads it everywhere, the physical one where positions ran.
    """
    if keep.z is None or keep.gain is None:
        return keep.z if keep.gain is None else keep.gain
    return keep.z * keep.gain


def key_gate(keep: Keep, tokens: Tokens) -> Gate:
    """What each query of a dense call sees: keys gated by `z`, or by `alive` in the query's hop; padding by nobody.

    A pruned position goes on seeing itself (its update is gated off), so no softmax row is empty.

    Args:
        keep: with its straight-through `z`.
    """
    assert keep.z is not None
    if keep.alive is None:
        return Gate(keep.z[:, None], tokens.valid)
    return Gate(keep.alive, tokens.valid, tokens.hop.clamp(max=keep.alive.shape[1] - 1))


class GrowingLayer(RaggedLayer):
    """One layer of a differentiable session: what has been stored is never written again, only followed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._own()
        return super().update(key_states, value_states, *args, **kwargs)

    def shorten(self, lengths: list[int]) -> None:
        self._own()
        super().shorten(lengths)

    def adopt(self, other: "GrowingLayer") -> None:
        """Takes the state of a copy that has run."""
        self.__dict__.update(other.__dict__)

    def _own(self) -> None:
        for name in ("keys", "values", "pos", "score"):
            stored = getattr(self, name)
            if stored is not None:
                setattr(self, name, stored.clone())


class GrowingCache(RaggedCache):
    """A routed cache for training hop by hop: each call leaves new tensors, and the graph runs through all of them."""

    layer_class = GrowingLayer

    def fork(self) -> "GrowingCache":
        """An independent continuation; what is stored so far is shared, gradients of both add up."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        twin.depth = [cache.fork() for cache in self.depth]
        twin.trace = copy.deepcopy(self.trace)
        twin._chunks = list(self._chunks)
        return twin


def grown(call: Callable[..., Any], stored: GrowingLayer, x: Tensor) -> tuple[Any, GrowingLayer]:
    """A stock layer call on a copy of what is stored, which it returns; pure, so checkpointing may run it twice."""
    twin = copy.copy(stored)
    return call(x, past_key_values=_OneLayer(twin)), twin


class _OneLayer:
    """What a layer's attention sees of a cache."""

    def __init__(self, layer: GrowingLayer) -> None:
        self.layer = layer

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layer.update(keys, values)
