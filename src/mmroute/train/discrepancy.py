"""MVoT's token discrepancy: a wrong code costs as much as it looks wrong.

Cross-entropy takes all wrong codes of a picture for equally wrong. The discrepancy is the expected distance, in the
codebook, between the code that is right and the one that the model would write.

Legend: N positions that are codes of pictures, T codes.

Source: MVoT (arXiv 2501.07542), token discrepancy loss; the released code for the distance.
Deviates: the paper names squared errors, its code takes Euclidean distances; ours are those of the code. Distances are
    divided by their mean over different codes, so that one weight fits every codebook; the release adds them as they
    are.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["code_distances", "token_discrepancy"]


def code_distances(vqmodel: Any) -> Float[Tensor, "T T"]:
    """How far the codes of a Chameleon's codebook lie apart, with mean 1 over different ones."""
    entries = vqmodel.quantize.embedding.weight.detach().double()
    apart = torch.cdist(entries, entries)
    return (apart * (len(apart) * (len(apart) - 1)) / apart.sum()).float()


def token_discrepancy(
    logits: Float[Tensor, "N T"], right: Int[Tensor, " N"], distances: Float[Tensor, "T T"]
) -> Float[Tensor, ""]:
    """Mean over positions of the distance to the right code that the model's choice is expected to have.

    Args:
        logits: of the codes alone, in the order of the codebook.
        right: the code that is right at each position.
        distances: from `code_distances`.

    Example:
        >>> apart = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> token_discrepancy(torch.zeros(3, 2), torch.tensor([0, 1, 0]), apart)
        tensor(0.5000)
    """
    return (logits.float().softmax(-1) * distances[right]).sum(-1).mean()
