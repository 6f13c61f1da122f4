"""What can rank vision in place of a router: DARE's training-free scores, and its controls at a router's own counts.

Legend: B batch, N positions of this call, D hidden, Q queries whose attention is read.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmroute.prune import _rank
from mmroute.prune.base import Site
from mmroute.select import hashed
from mmroute.tokens import Modality, Tokens

__all__ = ["last_queries", "needs_of", "vision_scores"]

_NEEDS = {"last_row": {"row"}, "received": {"rows"}, "knorm": {"qk"}, "oracle": {"relevance"}}
_RECEIVED = 16
"""Last queries of a row whose attention `received` averages."""


def needs_of(scorer: str) -> set[str]:
    """What a scorer asks the engine for; see `prune.base.NEEDS`."""
    return _NEEDS.get(scorer, set())


def vision_scores(scorer: str, x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
    """Larger stays; read at vision positions only, and without a gradient.

    Args:
        scorer: one of `last_row`, `received`, `diverse`, `knorm`, `oracle`.
        x: hidden states before the layer.
        tokens: the positions of this call.
        site: of the layer.
    """
    match scorer:
        case "last_row":
            return site.row.detach().float()
        case "received":
            return site.rows.detach().float().mean((1, 2))
        case "diverse":
            return _diverse(x, tokens, site)
        case "knorm":
            return -_rank.key_norm(site.qk(x)[1].transpose(1, 2)).detach()
    assert scorer == "oracle", scorer
    tie = hashed(tokens, 0, site.layer)
    return _rank.lexicographic(site.relevance, tie, tokens.valid)


def last_queries(tokens: Tokens) -> tuple[Int[Tensor, "B Q"], Float[Tensor, "B 1 Q"]] | None:
    """The last positions of each row and equal weights, for `received`; None where a call brings none."""
    if not tokens.valid.any():
        return None
    column = torch.arange(tokens.shape[1], device=tokens.valid.device)
    last = torch.where(tokens.valid, column, -1).amax(1, keepdim=True)
    at = (last - torch.arange(_RECEIVED, device=column.device)).clamp(min=0)
    return at, torch.full((tokens.shape[0], 1, _RECEIVED), 1 / _RECEIVED, device=column.device)


def _diverse(x: Float[Tensor, "B N D"], tokens: Tokens, site: Site) -> Float[Tensor, "B N"]:
    """Minus the turn at which a vision position is the farthest by cosine from all taken before."""
    B, N = tokens.shape
    score = torch.zeros(B, N + 1, device=x.device)
    for group in site.groups:
        if group.modality == Modality.VISION and any(group.width):
            inside = _rank.competing(group)
            unit = nn.functional.normalize(
                x.detach().float().gather(1, group.free[..., None].expand(-1, -1, x.shape[-1])), dim=-1
            )
            turn = _rank.most_spread(unit, inside, max(group.width))
            score = score.scatter(1, group.free.masked_fill(~inside, N), -turn.float())
    return score[:, :N]
