"""Pure tensor functions that several pruners rank with; none reads the device.

Legend: B batch, N positions of this call, W candidates of a group, D hidden, H query heads,
K key-value heads, E head dim.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmroute.select import Group
from mmroute.tokens import Tokens

__all__ = [
    "attention_of_last",
    "competing",
    "key_difference",
    "key_norm",
    "last_valid",
    "lexicographic",
    "most_spread",
    "rms_normed",
    "running",
]


def lexicographic(
    first: Float[Tensor, "B N"], second: Float[Tensor, "B N"], valid: Bool[Tensor, "B N"]
) -> Float[Tensor, "B N"]:
    """Scores that order by `first` and, where that ties, by `second`; -rank among the row's valid positions.

    Padding ranks last, so a row scores alone what it scores in a batch.
    """
    order = second.argsort(dim=1, descending=True, stable=True)
    primary = first.float().masked_fill(~valid, float("-inf")).gather(1, order)
    order = order.gather(1, primary.argsort(dim=1, descending=True, stable=True))
    rank = torch.arange(order.shape[1], device=order.device, dtype=torch.float32)
    return torch.empty_like(primary).scatter_(1, order, -rank.expand_as(primary))


def last_valid(valid: Bool[Tensor, "B N"]) -> Int[Tensor, " B"]:
    """Column of each row's last valid position."""
    columns = torch.arange(valid.shape[1], device=valid.device)
    return (columns * valid).amax(1)


def running(tokens: Tokens, groups: Sequence[Group]) -> Bool[Tensor, "B N"]:
    """Who may run this layer: protected and generated positions and each group's candidates."""
    B, N = tokens.shape
    mask = torch.zeros(B, N + 1, dtype=torch.bool, device=tokens.valid.device)
    mask[:, :N] = (tokens.protected | tokens.generated) & tokens.valid
    for group in groups:
        columns = group.free
        if min(group.width) < columns.shape[1]:
            width = torch.tensor(group.width, device=columns.device)
            beyond = torch.arange(columns.shape[1], device=columns.device) >= width[:, None]
            columns = columns.masked_fill(beyond, N)  # the spare column takes what is meaningless
        mask.scatter_(1, columns, True)
    return mask[:, :N]


def attention_of_last(
    q: Float[Tensor, "B H N E"], k: Float[Tensor, "B K N E"], tokens: Tokens, groups: Sequence[Group]
) -> Float[Tensor, "B N"]:
    """Attention of each row's last valid position to all that may run this layer, mean over heads."""
    B, H, _, E = q.shape
    K = k.shape[1]
    last = last_valid(tokens.valid).view(B, 1, 1, 1).expand(B, H, 1, E)
    q_BKGE = q.gather(2, last).view(B, K, H // K, E).float()
    logits_BKGN = q_BKGE @ k.float().transpose(2, 3) / E**0.5
    others = ~running(tokens, groups)
    return torch.softmax(logits_BKGN.masked_fill(others[:, None, None], float("-inf")), dim=-1).mean(dim=(1, 2))


def rms_normed(x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    """The stream over its root mean square, which is what routers read: raw residuals have outlier channels."""
    return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


def key_norm(keys: Float[Tensor, "B N K E"]) -> Float[Tensor, "B N"]:
    """L2 norm of each position's key, mean over key-value heads."""
    return keys.float().norm(dim=-1).mean(dim=-1)


def key_difference(keys: Float[Tensor, "B N K E"], valid: Bool[Tensor, "B N"]) -> Float[Tensor, "B N"]:
    """How far each key points away from the row's mean direction: -cosine, mean over key-value heads."""
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    unit = unit * valid[:, :, None, None]
    centre = torch.nn.functional.normalize(unit.sum(dim=1, keepdim=True), dim=-1)
    return -(unit * centre).sum(dim=-1).mean(dim=-1)


def competing(group: Group) -> Bool[Tensor, "B W"]:
    """Which entries of `group.free` are candidates; rows with fewer than the widest have meaningless ones behind."""
    slot = torch.arange(group.free.shape[1], device=group.free.device)
    return slot < torch.tensor(group.width, device=group.free.device)[:, None]


def most_spread(unit: Float[Tensor, "B W D"], inside: Bool[Tensor, "B W"], count: int) -> Int[Tensor, "B W"]:
    """Greedy max-min: in which order candidates are taken so that each is as far as can be from those before it.

    The first is the one farthest from its nearest neighbour. Distance is 1 - cosine, in steps of 2^-20: finer ones are
    rounding noise, and equal distances go to the lower column.

    Args:
        unit: directions of the candidates, of length 1.
        inside: which entries are candidates.
        count: how many are taken in the row that takes most.

    Returns:
        The turn of each candidate, from 0; W for those not taken.
    """
    B, W, D = unit.shape
    turn = torch.full((B, W), W, device=unit.device)
    slot = torch.arange(W, device=unit.device)
    near = torch.full((B, W), float("-inf"), device=unit.device)  # cosine to the nearest other
    for start in range(0, W, 256):  # a block of rows at a time: no W x W tensor
        block = slice(start, start + 256)
        cosine = unit[:, block] @ unit.transpose(1, 2)
        itself = slot[block, None] == slot
        near[:, block] = cosine.masked_fill(itself | ~inside[:, None], float("-inf")).amax(2)
    distance = _steps(1 - near)
    for nth in range(min(count, W)):
        pick = distance.masked_fill(~inside | (turn < W), float("-inf")).argmax(1, keepdim=True)
        turn = torch.where((slot == pick) & inside & (turn == W), nth, turn)
        chosen = unit.gather(1, pick[..., None].expand(B, 1, D))
        to_chosen = _steps(1 - (unit * chosen).sum(-1))
        distance = to_chosen if nth == 0 else torch.minimum(distance, to_chosen)
    return turn


def _steps(distance: Tensor) -> Tensor:
    return (distance * 2**20).round()
