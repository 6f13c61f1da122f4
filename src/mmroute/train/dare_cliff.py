"""Which layers of a model need its image, measured before DARE trains it: on written chains, or on chains with pictures
or boxes where it thinks in those.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mmroute import calibrate
from mmroute.engine.attach import attach
from mmroute.prune.schedule import Schedule
from mmroute.tasks.base import Generated
from mmroute.think.base import LookingThinker, Thinker
from mmroute.train.chains import Chains, Writer
from mmroute.train.dare_passes import Passes
from mmroute.train.examples import IGNORED

__all__ = ["cliff_of"]

_ITEMS = 64
_BATCH = 16


def cliff_of(model: Any, think: Thinker, tasks: Mapping[str, Generated]) -> calibrate.Cliff:
    """The information cliff on held-out items.

    Args:
        model: a loaded stock model with its processor.
        think: how it thinks.
        tasks: worlds by the name they were asked for with; each gives its share of the items.
    """
    if not think.draws and not isinstance(think, LookingThinker):
        return calibrate.measure_cliff(model, list(calibrate.gold(model, list(tasks), _ITEMS)))
    share = -(-_ITEMS // len(tasks))
    with attach(model) as routed:
        writer = Writer(routed, think)
        batches = [
            writer.batch([(task, task.spec("val", i)) for i in range(start, min(start + _BATCH, share))])
            for task in tasks.values()
            for start in range(0, share, _BATCH)
        ]
    layers = calibrate.num_layers(model)
    return calibrate.find_cliff(layers, share * len(tasks), lambda pruner: _loss(model, batches, pruner))


@torch.no_grad()
def _loss(model: Any, batches: Sequence[Chains], pruner: Schedule) -> calibrate.Loss:
    """Of right chains, hop by hop as inference runs them."""
    nll, words, exact, rows = 0.0, 0, 0, 0
    with attach(model, prune=pruner) as routed:
        passes = Passes(routed, pruner)
        for batch in batches:
            said = passes.logits(passes.hop_by_hop(batch, differentiable=False), batch)
            learned = batch.labels != IGNORED
            wanted = batch.labels[learned]
            nll += float(F.cross_entropy(said, wanted, reduction="sum"))
            words += len(wanted)
            right = learned.clone()
            right[learned] = said.argmax(-1) == wanted
            exact += int((right | ~learned).all(1).sum())
            rows += len(right)
    return calibrate.Loss(nll / words, exact / rows)
