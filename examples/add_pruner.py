"""Which positions go on: the vision positions whose state is farthest from the image's mean, from a layer on.

python examples/add_pruner.py FOLDER_OR_HUB_ID maze.png "Which exit is reached?"

Legend: B batch, N positions, D hidden.
Source: none, an example.
Deviates: nothing to deviate from.
Checked: contract (`mmroute check`).
"""

import sys
from typing import Annotated, Any

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

import mmroute
from mmroute.config import options
from mmroute.cost import keep_shares
from mmroute.prune.base import Pruner, Site
from mmroute.tokens import Modality, Tokens

__all__ = ["Unusual"]


class Unusual(Pruner):
    """Training-free: background looks alike, so what is unlike the mean stays."""

    @options
    class Config:
        vision_keep: Annotated[float, Field(ge=0, le=1)] = 0.5
        """Share of vision positions that runs each layer from `start_layer` on."""
        start_layer: Annotated[int, Field(ge=0)] = 1
        """First layer, counted from 0, that prunes."""

    config: Config

    def acts(self, layer: int, num_layers: int) -> bool:
        return layer >= self.config.start_layer

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        return self.config.vision_keep if modality is Modality.VISION else None  # None: all of them

    def scores(self, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
        vision = (tokens.valid & (tokens.modality == Modality.VISION))[..., None]
        mean = (x.float() * vision).sum(1, keepdim=True) / vision.sum(1, keepdim=True).clamp(min=1)
        return (x.float() - mean).norm(dim=-1)  # larger stays; only free positions are read


def main(model_name: str, image: Any, question: str) -> float:
    with mmroute.attach(mmroute.load(model_name), prune=Unusual(vision_keep=0.3)) as routed:
        answer = routed.answer(question, image, max_new_tokens=16)
    print(f"{answer.text!r}, with {keep_shares(answer.trace)['vision']:.0%} of vision positions")
    return keep_shares(answer.trace)["vision"]


if __name__ == "__main__":
    main(*sys.argv[1:4])
