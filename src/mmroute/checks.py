"""Does a pruner keep its contract? No model needed: a made-up batch and a made-up site stand in for the engine.

    from mmroute.checks import check_pruner
    check_pruner(MyPruner(vision_keep=0.4))     # silent, or AssertionError saying what broke

The suite runs the same checks on every file in `prune/`, and `mmroute check FILE` on a file of yours.

Legend: B batch, N positions of this call, D hidden, H query heads, K key-value heads, E head dim.
"""

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmroute.config import resolved
from mmroute.prune import _rank
from mmroute.prune.base import NEEDS, Keep, Look, Pruner, Site
from mmroute.select import Group, group_positions
from mmroute.tokens import Modality, Tokens
from mmroute.trace import Shape

__all__ = ["Case", "check_pruner", "made_up", "walk"]

D, H, K, E = 16, 4, 2, 8
Segment = tuple[int, Modality, int]

TEXT, VISION = Modality.TEXT, Modality.VISION
RAGGED: tuple[tuple[Segment, ...], ...] = (
    ((0, TEXT, 4), (0, VISION, 9), (0, TEXT, 3), (0, VISION, 5), (0, TEXT, 6), (1, TEXT, 5), (1, VISION, 7)),
    ((0, TEXT, 3), (0, VISION, 12), (0, TEXT, 5), (1, TEXT, 3)),
    ((0, TEXT, 6), (1, TEXT, 4)),
)
"""Per row (hop, modality, positions): two images and a second hop, one image, no image at all."""


@dataclass
class Case:
    """A batch as the engine would hand it over."""

    x: Float[Tensor, "B N D"]
    tokens: Tokens
    relevance: Float[Tensor, "B N"]
    """Levels 2, 1, 0: needed, board, background."""

    def hidden(self, layer: int) -> Float[Tensor, "B N D"]:
        """Hidden states that enter a layer."""
        return self.x.roll(layer, dims=-1)

    def sources(self, layer: int) -> dict[str, Callable[..., Any]]:
        """What a site at `layer` offers; each is a fixed function of one row, so batches do not matter."""
        valid = self.tokens.valid
        return {
            "normed": lambda x: x * x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt().to(x.dtype),
            "final_normed": lambda x: 2 * x * x.float().square().mean(-1, keepdim=True).add(1e-6).rsqrt().to(x.dtype),
            "qk": lambda x: (
                _project(x, H, 10 * layer + 1).transpose(1, 2),
                _project(x, K, 10 * layer + 2).transpose(1, 2),
            ),
            "keys": lambda at: _project(self.hidden(at), K, 10 * at + 3) * valid[:, :, None, None],
            "row": lambda: self.attention_row(layer),
            "relevance": lambda: self.relevance,
            "embeddings": lambda: self.hidden(0),
            "tower": lambda: Look(_project(self.x, 1, 7)[..., 0, 0].float(), _project(self.x, 1, 8)[:, :, 0], flops=1),
        }

    def groups(self) -> list[Group]:
        return group_positions(self.tokens, num_hops=int(self.tokens.hop.max()) + 1)[0]

    def site(
        self,
        pruner: Pruner,
        layer: int,
        num_layers: int,
        groups: list[Group] | None = None,
        memo: dict[Any, Any] | None = None,
    ) -> Site:
        """What the engine hands to `pruner` at a layer; only what it `needs`."""
        memo = {} if memo is None else memo
        shape = made_up_shape(num_layers)
        competing = self.groups() if groups is None else groups

        def rows() -> Tensor:
            asked = layer if pruner.action == "kv_only" else layer - 1
            named = pruner.queries(self.tokens, self.site(pruner, asked, num_layers, competing, memo))
            assert named is not None, f"{type(pruner).__name__} reads rows at layer {layer} but names no queries"
            columns, weights = named
            share = self.attention_map(layer).gather(2, columns[:, None, :, None].expand(-1, H, -1, self.x.shape[1]))
            return torch.einsum("bgq,bhqn->bhgn", weights, share)

        sources = {k: v for k, v in {**self.sources(layer), "rows": rows}.items() if k in pruner.needs}
        return Site(layer, num_layers, pruner.training, competing, memo, shape, sources)

    def attention_map(self, layer: int) -> Float[Tensor, "B H N N"]:
        """Attention of every position at the layer whose rows a site at `layer` reads; padding sees only itself."""
        query, key = (_project(self.hidden(layer), H, 10 * layer + seed).float() for seed in (5, 6))
        N = self.x.shape[1]
        sees = torch.ones(N, N, dtype=torch.bool).tril() & self.tokens.valid[:, None, :]
        sees = (sees | torch.eye(N, dtype=torch.bool))[:, None]
        logits = torch.einsum("bqhe,bkhe->bhqk", query, key) / E**0.5
        return torch.softmax(logits.masked_fill(~sees, float("-inf")), dim=-1)

    def attention_row(self, layer: int) -> Float[Tensor, "B N"]:
        """Attention of each row's last position at the layer before, mean over heads."""
        return self.attention_map(layer)[:, :, -1].mean(1)

    def row(self, b: int) -> "Case":
        """One row alone, without its padding."""
        real = self.tokens.valid[b]
        cut = {f.name: getattr(self.tokens, f.name)[b : b + 1, real] for f in dataclasses.fields(Tokens)}
        cut["position"] = torch.arange(int(real.sum()))[None]
        return Case(self.x[b : b + 1, real], Tokens(**cut), self.relevance[b : b + 1, real])

    def to(self, dtype: torch.dtype) -> "Case":
        return Case(self.x.to(dtype), self.tokens, self.relevance)


def made_up_shape(num_layers: int) -> Shape:
    """Sizes of the made-up model."""
    return Shape(hidden=D, layers=num_layers, heads=H, kv_heads=K, head_dim=E, mlp=32, vocab=64, itemsize=4)


def made_up(rows: Sequence[Sequence[Segment]] = RAGGED, seed: int = 0, prefix_tokens: int = 2) -> Case:
    """A left-padded batch with random hidden states; padding holds large numbers that no one may look at.

    Args:
        rows: per row its segments (hop, modality, positions).
        prefix_tokens: protected first positions of each hop; the last of each hop is protected too.
    """
    sizes = [sum(n for _, _, n in row) for row in rows]
    B, N = len(rows), max(sizes)
    valid, protected = torch.zeros(B, N, dtype=torch.bool), torch.zeros(B, N, dtype=torch.bool)
    modality, hop = torch.zeros(B, N, dtype=torch.long), torch.zeros(B, N, dtype=torch.long)
    x, relevance = torch.full((B, N, D), 1e3), torch.full((B, N), 9.0)
    for b, (row, size) in enumerate(zip(rows, sizes, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + b)
        start = N - size
        valid[b, start:] = True
        x[b, start:] = torch.randn(size, D, generator=generator)
        relevance[b, start:] = torch.randint(0, 3, (size,), generator=generator).float()
        modality[b, start:] = torch.tensor([int(m) for _, m, n in row for _ in range(n)])
        hops = [h for h, _, n in row for _ in range(n)]
        hop[b, start:] = torch.tensor(hops)
        for h in set(hops):
            first, end = start + hops.index(h), start + hops.index(h) + hops.count(h)
            protected[b, first : min(first + prefix_tokens, end)] = True
            protected[b, end - 1] = True
    position = torch.arange(N).expand(B, N)
    return Case(x, Tokens(modality, hop, valid, protected, torch.zeros_like(valid), position), relevance)


def walk(pruner: Pruner, case: Case, num_layers: int = 6) -> list[Keep]:
    """The choices of all layers, as the engine asks for them: `drop` competes among survivors, and where every group
    keeps all its candidates no one asks."""
    tokens = case.tokens
    groups = case.groups()
    memo: dict[str, Any] = {}
    out = []
    for layer in range(num_layers):
        site = case.site(pruner, layer, num_layers, groups, memo)
        whole = all(
            pruner.counts(g, layer, num_layers) == [p + w for p, w in zip(g.protected, g.width, strict=True)]
            for g in groups
        )
        if not pruner.acts(layer, num_layers) or (whole and not pruner.syncs):
            out.append(_all(tokens, groups))
            continue
        keep = pruner.keep(case.hidden(layer), tokens, site)
        out.append(keep)
        if pruner.action == "drop":
            groups = [_survivors(g, keep.mask, tokens) for g in groups]
    return out


def check_pruner(pruner: Pruner | type[Pruner], num_layers: int = 6) -> None:
    """Runs a pruner through what the engine relies on.

    Args:
        pruner: an instance, or a class that works without options.
        num_layers: depth of the made-up model.

    Raises:
        AssertionError: the first promise that is broken, in words.
    """
    if isinstance(pruner, type):
        pruner = pruner()
    pruner.fit(made_up_shape(num_layers))
    pruner.eval()
    name = type(pruner).__name__
    case = made_up()

    _check_declaration(pruner, name, num_layers)
    with _global_random_state_untouched(name):
        kept = walk(pruner, case, num_layers)
    for layer, keep in enumerate(kept):
        _check_keep(keep, pruner, case, layer, num_layers, f"{name}, layer {layer}")
    _same(kept, walk(pruner, case, num_layers), f"{name}: two equal calls keep different positions")
    for b in range(case.tokens.shape[0]):
        alone = walk(pruner, case.row(b), num_layers)
        for layer, (one, batch) in enumerate(zip(alone, kept, strict=True)):
            in_batch = batch.mask[b, case.tokens.valid[b]]
            assert torch.equal(one.mask[0], in_batch), (
                f"{name}, layer {layer}: row {b} alone keeps other positions than in its padded batch"
            )
    for rows in ([[(0, TEXT, 1)]], [[(0, TEXT, 2), (0, VISION, 1), (0, TEXT, 1)]], [[(0, TEXT, 5)], [(0, TEXT, 3)]]):
        small = made_up(rows)
        for layer, keep in enumerate(walk(pruner, small, num_layers)):
            _check_keep(keep, pruner, small, layer, num_layers, f"{name}, layer {layer}, rows {rows}")
    half = case.to(torch.bfloat16)
    for layer, keep in enumerate(walk(pruner, half, num_layers)):
        assert keep.ran == kept[layer].ran, f"{name}, layer {layer}: bfloat16 keeps other counts than float32"
    _check_copies(pruner, kept, case, num_layers, name)
    _check_gradients(pruner, case, num_layers, name)


def _check_declaration(pruner: Pruner, name: str, num_layers: int) -> None:
    assert pruner.action in ("skip", "drop", "kv_only"), f"{name}.action is {pruner.action!r}"
    assert set(pruner.needs) <= NEEDS, f"{name}.needs has {set(pruner.needs) - NEEDS}, known: {sorted(NEEDS)}"
    for depth in (num_layers, 32):
        for layer in range(depth):
            for hop in (0, 1, 5):
                for modality in Modality:
                    rate = pruner.rate(layer, depth, hop, modality)
                    assert rate is None or (isinstance(rate, float | int) and 0 <= rate <= 1), (
                        f"{name}.rate is {rate!r} at layer {layer} of {depth}; it is None or a number in [0, 1]"
                    )


def _check_keep(keep: Keep, pruner: Pruner, case: Case, layer: int, num_layers: int, where: str) -> None:
    tokens = case.tokens
    mask = keep.mask
    assert mask.dtype == torch.bool, f"{where}: mask is {mask.dtype}, not bool"
    assert tuple(mask.shape) == tokens.shape, f"{where}: mask has shape {tuple(mask.shape)}, not {tokens.shape}"
    assert not (mask & ~tokens.valid).any(), f"{where}: keeps padding"
    assert mask[tokens.protected & tokens.valid].all(), f"{where}: leaves out a protected position"
    counted = [[int((mask[b] & (tokens.modality[b] == m)).sum()) for m in Modality] for b in range(mask.shape[0])]
    assert keep.ran == counted, f"{where}: `ran` says {keep.ran}, the mask has {counted}"
    chooses = any(pruner.counts(g, layer, num_layers) != g.size for g in case.groups())
    if pruner.acts(layer, num_layers) and chooses and type(pruner).keep is Pruner.keep:
        scores = pruner.scores(case.hidden(layer), tokens, case.site(pruner, layer, num_layers))
        assert tuple(scores.shape) == tokens.shape, f"{where}: scores have shape {tuple(scores.shape)}"
        assert scores.is_floating_point(), f"{where}: scores are {scores.dtype}, not floating point"
        assert scores[tokens.valid].isfinite().all(), f"{where}: a score of a valid position is not finite"


def _check_copies(pruner: Pruner, kept: list[Keep], case: Case, num_layers: int, name: str) -> None:
    again = type(pruner)(**resolved(pruner.config)).eval()
    again.fit(made_up_shape(num_layers))
    again.load_state_dict(pruner.state_dict())
    _same(kept, walk(again, case, num_layers), f"{name}: rebuilt from its config and state, it keeps others")
    _same(kept, walk(copy.deepcopy(pruner), case, num_layers), f"{name}: a deep copy keeps others")


def _check_gradients(pruner: Pruner, case: Case, num_layers: int, name: str) -> None:
    learned = [(n, p) for n, p in pruner.named_parameters() if p.requires_grad]
    if not learned:
        return
    x = case.x.clone().requires_grad_()
    pruner.train()
    try:
        keeps = walk(pruner, Case(x, case.tokens, case.relevance), num_layers)
        learning = [(keep, keep.gain if keep.z is None else keep.z) for keep in keeps]
        gates = [gate.float().sum() + sum(keep.losses.values()) for keep, gate in learning if gate is not None]
        assert gates, f"{name} has parameters, but `keep` gives no straight-through mask z and no gain in training"
        torch.stack(gates).sum().backward()
    finally:
        pruner.eval()
    for parameter_name, parameter in learned:
        assert parameter.grad is not None, f"{name}: no gradient reaches {parameter_name}"
        parameter.grad = None
    assert x.grad is None or not x.grad.any(), f"{name}: a gradient reaches the backbone through the choice"


def _same(one: list[Keep], other: list[Keep], message: str) -> None:
    for layer, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a.mask, b.mask), f"{message} (layer {layer})"


@contextmanager
def _global_random_state_untouched(name: str) -> Iterator[None]:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    yield
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    assert torch.equal(before[0], after[0]), f"{name} draws from torch's global generator; hash instead"
    assert before[1:] == after[1:], f"{name} draws from a global generator; hash instead"


def _all(tokens: Tokens, groups: list[Group]) -> Keep:
    mask: Bool[Tensor, "B N"] = _rank.running(tokens, groups)
    ran = [[0] * len(Modality) for _ in range(mask.shape[0])]
    for group in groups:
        for b, (p, w) in enumerate(zip(group.protected, group.width, strict=True)):
            ran[b][group.modality] += p + w
    return Keep(mask, ran)


def _survivors(group: Group, mask: Bool[Tensor, "B N"], tokens: Tokens) -> Group:
    """The group with only those candidates that ran; reads the device, which the engine never does."""
    rows = [
        [c for c in free[:width] if mask[b, c]]
        for b, (free, width) in enumerate(zip(group.free.tolist(), group.width, strict=True))
    ]
    width = [len(row) for row in rows]
    free = torch.tensor([row + [0] * (max(width) - len(row)) for row in rows], dtype=torch.long)
    return dataclasses.replace(group, width=width, free=free.view(len(rows), max(width)))


def _project(x: Float[Tensor, "B N D"], heads: int, seed: int) -> Float[Tensor, "B N heads E"]:
    weight = torch.randn(x.shape[-1], heads * E, generator=torch.Generator().manual_seed(seed))
    return (x @ weight.to(x.dtype) / x.shape[-1] ** 0.5).unflatten(-1, (heads, E))
