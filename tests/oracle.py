"""The slow reference: stock layers on every position, keys that were not kept masked with -inf, no shortcut at all.

It shares no code with the engine. What the engine computes on the kept positions only, this computes on the full
sequence in one uncached forward: a query sees the kept keys before it, and a position not kept takes no update.

Legend: B batch, N positions of the whole sequence, m of them written anew, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmroute.backbones import Family

__all__ = ["closed_later", "masked_forward"]


@torch.no_grad()
def masked_forward(
    model: Any,
    family: Family,
    batch: Mapping[str, Tensor],
    keep: Sequence[Bool[Tensor, "B N"] | None],
    visible: Sequence[Bool[Tensor, "B N N"] | None] | None = None,
    again: Sequence[Sequence[Bool[Tensor, "B N"]]] | None = None,
    gain: float = 1.0,
    write: Sequence[tuple[Int[Tensor, "B m"], Float[Tensor, "B m D"]] | None] | None = None,
) -> Float[Tensor, "B N V"]:
    """What the logits are if each layer keeps these positions.

    Args:
        model: a stock model; an attached one is refused.
        family: its family.
        batch: the whole sequence with all its images; positions are worked out unless it holds `position_ids`.
        keep: for each layer the positions that run it; None is all of them. Padding never runs, whatever it says.
        visible: for each layer, which keys (last axis) each query may see, beside causality and `keep`: for evictions
            that only later hops notice. A query always sees itself.
        again: for each layer the positions of each further pass, which sees nobody else.
        gain: strength of those passes.
        write: for each layer, columns and the states that replace theirs before it runs.

    Returns:
        Logits of every position; those of padding mean nothing.
    """
    layers = family.text_model(model).layers
    if any("forward" in layer.__dict__ for layer in layers):
        raise ValueError("the oracle runs stock layers; give it a model that was never attached")
    if len(keep) != len(layers):
        raise ValueError(f"{len(keep)} keep masks for {len(layers)} layers")
    valid = batch["attention_mask"].bool()
    inputs = {key: value for key, value in batch.items() if value is not None}
    if "position_ids" not in inputs:
        inputs["position_ids"] = family.positions(
            model, inputs["input_ids"], inputs["attention_mask"], inputs.get("image_grid_thw")
        )
    kept = [valid if mask is None else mask & valid for mask in keep]
    seen = [None] * len(layers) if visible is None else visible
    more = [()] * len(layers) if again is None else again
    news = [None] * len(layers) if write is None else write
    with _stepping_in(layers, family.tuple_out, kept, seen, more, gain, news):
        return model(**inputs, use_cache=False).logits


def closed_later(hop: Int[Tensor, "B N"], stays: Bool[Tensor, "B N"]) -> Bool[Tensor, "B N N"]:
    """Visibility after hop closes: inside its own hop a key is seen by all, by later hops only if it `stays`."""
    same_hop = hop[:, :, None] == hop[:, None, :]
    return same_hop | stays[:, None, :]


@contextmanager
def _stepping_in(
    layers: Sequence[Any],
    tuple_out: bool,
    kept: Sequence[Tensor],
    visible: Sequence[Tensor | None],
    again: Sequence[Sequence[Tensor]],
    gain: float,
    write: Sequence[tuple[Tensor, Tensor] | None],
) -> Iterator[None]:
    for layer, keep, see, more, new in zip(layers, kept, visible, again, write, strict=True):
        layer.forward = _masked(type(layer).forward.__get__(layer), tuple_out, keep, see, more, gain, new)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _masked(
    stock: Callable[..., Any],
    tuple_out: bool,
    keep: Tensor,
    visible: Tensor | None,
    again: Sequence[Tensor],
    gain: float,
    write: tuple[Tensor, Tensor] | None,
) -> Callable[..., Any]:
    def one_pass(hidden: Tensor, runs: Tensor, visible: Tensor | None, args: Any, kwargs: Any) -> tuple[Tensor, Any]:
        N = hidden.shape[1]
        causal = torch.ones(N, N, dtype=torch.bool, device=hidden.device).tril()
        sees = causal & runs[:, None, :]
        if visible is not None:
            sees = sees & visible
        sees = sees | torch.eye(N, dtype=torch.bool, device=hidden.device)  # a softmax over nothing is NaN
        mask = torch.zeros(sees.shape, dtype=hidden.dtype, device=hidden.device).masked_fill(~sees, float("-inf"))
        out = stock(hidden, *args, **{**kwargs, "attention_mask": mask[:, None]})
        return (out[0], out[1:]) if tuple_out else (out, ())

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if write is not None:
            columns, states = write
            hidden = hidden.clone()
            for row in range(hidden.shape[0]):
                hidden[row, columns[row]] = states[row]
        ran, rest = one_pass(hidden, keep, visible, args, kwargs)
        held = torch.where(keep[..., None], ran, hidden)
        for runs in again:
            ran, _ = one_pass(held, runs, None, args, kwargs)
            held = torch.where(runs[..., None], held + gain * (ran - held), held)
        return (held, *rest) if tuple_out else held

    return forward
