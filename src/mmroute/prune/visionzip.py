"""Which positions go on: VisionZip keeps, before the first layer, the tokens its vision tower looks at most, and sums
the rest up in a few.

Legend: B batch, N positions, D hidden, E width of a tower's key.
Source: VisionZip (CVPR 2025, arXiv 2412.04467): dominant tokens by the tower's attention (of its class position; where
    there is none, attention received from all), contextual tokens by key similarity: of the rest every step-th is a
    target, the others join the most similar one, and their mean is added to it. 54 dominant to 10 contextual.
Deviates: shares are of the full count and rounded up, contextual tokens inside; a target keeps its slot and position;
    the score and the key of a token merged from patches are the means of theirs; where a tower attends in windows, the
    queries and keys of that block are compared over the whole picture, since within a window of one token all receive
    alike; keys are compared unrotated. Each picture's attention is its own, but several pictures of a hop are ranked
    together. Vision positions that are protected stay beside them.
Checked: twin (tests/unit/prune/test_visionzip.py; on LLaVA the scores equal the stock tower's own attention maps);
    not run against the release.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmroute.config import options
from mmroute.prune._cuts import EntryCut
from mmroute.prune.base import Keep, Site
from mmroute.select import top
from mmroute.tokens import Modality, Tokens

__all__ = ["VisionZip"]


class VisionZip(EntryCut):
    """Training-free: one cut before layer 0, blind to the question; what is dropped is partly merged."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision positions that runs, in every layer, merged ones included."""
        contextual: Annotated[float, Field(ge=0, le=1)] = 10 / 64
        """Share of these that sums up what is dropped."""

    needs = frozenset({"tower"})
    config: Config

    def keep(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Keep:
        take = {i: self.counts(group, site.layer, site.num_layers) for i, group in enumerate(site.groups)}
        merged, stays, flops = x, torch.zeros(tokens.shape, device=x.device), 0
        for i, group in enumerate(site.groups):
            for b, width in enumerate(group.width):
                room = take[i][b] - group.protected[b]
                if group.modality != Modality.VISION or not 0 < room < width:
                    continue  # behind the cut nothing is left to choose
                columns = group.free[b, :width]
                look = site.tower
                flops = flops or look.flops
                few = round(self.config.contextual * room)
                order = look.score[b, columns].argsort(descending=True, stable=True)
                stays[b, columns[order[: room - few]]] = 1.0
                if few == 0:
                    continue
                rest = columns[order[room - few :].sort().values]
                targets, others = _every(rest, few)
                stays[b, targets] = 1.0
                unit = torch.nn.functional.normalize(look.keys[b].float(), dim=-1)
                nearest = (unit[others] @ unit[targets].T).argmax(1)
                members = torch.nn.functional.one_hot(nearest, few).T.to(x.dtype)
                mean = members @ x[b, others] / members.sum(1, keepdim=True).clamp(min=1)
                merged = merged.index_put((torch.tensor(b, device=x.device), targets), x[b, targets] + mean)
                flops += 2 * len(others) * few * (look.keys.shape[-1] + x.shape[-1])
        keep = Keep(*top(stays, tokens, site.groups, take), extra_flops=flops)
        if merged is not x:
            keep.write = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]), merged
        return keep

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        return site.tower.score


def _every(rest: Tensor, few: int) -> tuple[Tensor, Tensor]:
    """`few` of the columns, evenly from the first on, and the others."""
    step = len(rest) // few
    at = [i * step for i in range(few)]
    others = [i for i in range(len(rest)) if i % step or i >= few * step]
    return rest[torch.tensor(at, device=rest.device)], rest[torch.tensor(others, dtype=torch.long, device=rest.device)]
