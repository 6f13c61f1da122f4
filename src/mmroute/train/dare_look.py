"""What a run of DARE's training shows of itself: held-out chains as inference runs them, what each layer kept, and how
much of what was needed is in it.

Legend: B batch, N columns.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from mmroute.engine.controller import Controller
from mmroute.prune import _closing
from mmroute.prune._rates import ROUTED
from mmroute.prune.base import Keep, Pruner
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Trace
from mmroute.train.chains import Chains
from mmroute.train.dare_passes import Passes
from mmroute.train.examples import IGNORED

__all__ = ["held_out", "kept_in_training", "rate_table"]


_REPORTED_HOPS = 4


@torch.no_grad()
def held_out(passes: Passes, batches: Sequence[Chains]) -> dict[str, Any]:
    """Chains and words that come out right, the ones before given, and what was kept by layer; hop by hop on a cache.

    Args:
        passes: of a model in evaluation mode whose traces are full.
        batches: of one task.
    """
    chains, words, seen = [], [], []
    for batch in batches:
        said = passes.logits(passes.hop_by_hop(batch, differentiable=False), batch).argmax(-1)
        learned = batch.labels != IGNORED
        right = learned.clone()
        right[learned] = said == batch.labels[learned]
        chains += (right | ~learned).all(1).tolist()
        words.append(float((right & learned).sum() / learned.sum()))
        assert passes.routed.trace is not None
        seen.append(_kept_at_inference(passes.routed.trace, batch))
    return {
        "n": len(chains),
        "chain": round(float(np.mean(chains)), 4),
        "word": round(float(np.mean(words)), 4),
        **{key: np.round(np.mean([s[key] for s in seen], 0), 3).tolist() for key in seen[0]},
    }


def rate_table(pruner: Pruner, layers: int, hops: int) -> list[list[list[float]]]:
    """[text, vision][hop][layer]: share of what enters that runs, as inference reads it."""
    shares = [[[pruner.rate(i, layers, h, m) for i in range(layers)] for h in range(hops)] for m in ROUTED]
    return [[[1.0 if share is None else share for share in row] for row in rows] for rows in shares]


def kept_in_training(controller: Controller, pruner: Pruner, batch: Chains) -> dict[str, Any]:
    """What the last call of stage A kept, by layer, and the rates that it asked for, of the first hops."""
    tokens = controller.tokens
    assert tokens is not None
    masks = {i: keep.mask for i, keep in controller.aux.items()}
    found = {key: np.round(values, 3).tolist() for key, values in _shares(tokens, masks, batch).items()}
    logits = {i: keep.logits for i, keep in controller.aux.items()}
    spread = [value.detach()[tokens.valid].std().item() for value in logits.values() if value is not None]
    return {
        "layers": sorted(masks),
        **found,
        "rates": np.round(rate_table(pruner, controller.shape.layers, _REPORTED_HOPS), 4).tolist(),
        "logit_std": [round(x, 3) for x in spread],
        "noise_overlap": _overlap(controller.aux, tokens),
        "found_by_last_hop": _by_hop(controller.aux, tokens),
    }


def _overlap(keeps: Mapping[int, Keep], tokens: Tokens) -> dict[str, list[float | None]]:
    """By modality and layer: share of the chosen positions of the prompt that would be chosen without noise."""
    out: dict[str, list[float | None]] = {}
    for m in ROUTED:
        among = tokens.valid & ~tokens.generated & ~tokens.protected & (tokens.modality == m) & (tokens.hop == 0)
        shares: list[float | None] = []
        out[m.name.lower()] = shares
        for keep in keeps.values():
            count = (keep.mask & among).sum(1).float()
            if keep.logits is None or not count.any():
                shares.append(None)
                continue
            clean = _closing.best(keep.logits.detach(), among, torch.zeros_like(among), count, torch.ones_like(count))
            shares.append(round(float((keep.mask & clean).sum() / count.sum()), 3))
    return out


def _by_hop(keeps: Mapping[int, Keep], tokens: Tokens) -> dict[str, list[list[float | None]]]:
    """[hop][layer] by modality: share of the hop's positions whose keys the last hop still finds."""
    last = int(tokens.hop[tokens.valid].max())
    out: dict[str, list[list[float | None]]] = {}
    for m in ROUTED:
        rows: list[list[float | None]] = []
        out[m.name.lower()] = rows
        for hop in range(min(last + 1, _REPORTED_HOPS)):
            of = tokens.valid & (tokens.modality == m) & (tokens.hop == hop)
            found = [k.mask if k.alive is None else k.mask & (k.alive[:, -1].detach() > 0.5) for k in keeps.values()]
            rows.append([round(float((f & of).sum() / of.sum()), 3) if of.any() else None for f in found])
    return out


def _kept_at_inference(trace: Trace, batch: Chains) -> dict[str, list[float]]:
    """By layer: shares that entered, and what is still cached of the text at the end."""
    call, tokens = trace.calls[0], _tokens(batch)
    masks = {}
    for index, layer in enumerate(call.layers):
        mask = torch.zeros_like(tokens.valid)
        for row, columns in enumerate(layer.kept or []):
            mask[row, columns] = True
        masks[index] = mask
    found = _shares(tokens, masks, batch)
    end = trace.calls[-1].layers
    total = batch.mask.sum()
    found["cached"] = [sum(layer.stored) / float(total) for layer in end]
    return found


def _tokens(batch: Chains) -> Tokens:
    valid = batch.mask.bool()
    nothing = torch.zeros_like(valid)
    position = torch.arange(valid.shape[1], device=valid.device).expand_as(batch.ids)
    return Tokens(batch.modality, batch.hop, valid, nothing, batch.generated, position)


def _shares(tokens: Tokens, masks: Mapping[int, Bool[Tensor, "B N"]], batch: Chains) -> dict[str, list[float]]:
    """By layer, of the prompt: share of vision and text that ran, and recall, precision and lift of what is needed."""
    given = tokens.valid & ~tokens.generated & (tokens.hop == 0)
    vision = given & (tokens.modality == Modality.VISION)
    text = given & (tokens.modality == Modality.TEXT)
    out: dict[str, list[float]] = defaultdict(list)
    for mask in masks.values():
        kept = float((mask & vision).sum() / vision.sum())
        out["vision"].append(kept)
        out["text"].append(float((mask & text).sum() / text.sum()))
        for name, truth in (("needed", batch.needed), ("board", batch.board)):
            if truth is None:
                continue
            chosen = mask[vision].view(truth.shape)
            hit = float((chosen & truth).sum())
            recall = hit / float(truth.sum())
            out[f"{name}_recall"].append(recall)
            out[f"{name}_precision"].append(hit / max(float(chosen.sum()), 1.0))
            out[f"{name}_lift"].append(recall / kept if kept else 0.0)
    return dict(out)
