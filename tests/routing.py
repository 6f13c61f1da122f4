"""What the equality tests route with: keep masks that are given, and whole stories told chunk by chunk.

Legend: B batch, N positions of one call, T columns of a whole story, C slots of one layer's cache.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import families
import torch
from torch import Tensor

from mmroute.backbones import Family
from mmroute.prune.base import Keep, Pruner, Site, Slots
from mmroute.tokens import NUM_MODALITIES, Modality, Tokens

__all__ = ["Constant", "Forced", "Longest", "Story", "distance", "nested", "play", "scattered", "tell"]


def distance(a: Tensor, b: Tensor, where: Tensor | None = None) -> float:
    """Largest absolute difference, at the positions of `where` (B, N)."""
    if where is not None:
        a, b = a[where], b[where]
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item()


class Forced(Pruner):
    """Keeps what it is told, by layer and logical column, in prompts, chunks and single decode steps alike."""

    def __init__(
        self,
        masks: Sequence[Tensor],
        action: Literal["skip", "drop"] = "skip",
        stays: Sequence[Tensor] | None = None,
    ) -> None:
        """`masks` and `stays` are (B, T) per layer: who runs, and who is still stored after a hop close."""
        super().__init__()
        self.masks, self.stays = list(masks), stays
        self.action = action  # type: ignore[misc]

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float:
        return 0.5  # only says that something is left out

    def counts(self, group: Any, layer: int, num_layers: int) -> list[int]:
        return [-1] * len(group.size)  # never "all of them", so every layer asks

    def scores(self, x: Tensor, tokens: Tokens, site: Site) -> Tensor:
        raise AssertionError("`keep` is overridden, so nobody may ask for scores")

    def keep(self, x: Tensor, tokens: Tokens, site: Site) -> Keep:
        mask = self.masks[site.layer].gather(1, tokens.position) & tokens.valid
        ran = torch.stack([(mask & (tokens.modality == m)).sum(1) for m in range(NUM_MODALITIES)], dim=1)
        return Keep(mask, ran.tolist())

    decode = keep

    def close(self, slots: Slots, closing: Tensor, layer: int) -> Tensor:
        assert self.stays is not None
        return self.stays[layer].gather(1, slots.position.clamp(min=0)) & slots.valid


class Constant(Pruner):
    """All scores equal: ties decide everything."""

    def rate(self, layer: int, num_layers: int, hop: int, modality: Modality) -> float | None:
        return None if modality is Modality.LATENT else 0.5

    def scores(self, x: Tensor, tokens: Tokens, site: Site) -> Tensor:
        return torch.zeros(tokens.shape)


class Longest(Constant):
    """Scores that depend on what a position holds, and on nothing else: the length of its hidden state."""

    def scores(self, x: Tensor, tokens: Tokens, site: Site) -> Tensor:
        return x.float().norm(dim=-1)


@dataclass
class Story:
    """A prompt, observations with their images, and single generated positions, as one sequence and as its chunks."""

    whole: dict[str, Tensor]
    """One batch of everything, with explicit `position_ids`."""
    spans: list[tuple[int, int]]
    """Columns of each chunk."""
    images: list[dict[str, Tensor]]
    """Image tensors of each chunk; empty where it brings none."""
    hops: list[int]
    """Hop of each chunk."""

    @property
    def real(self) -> Tensor:
        """(B, T) bool."""
        return self.whole["attention_mask"].bool()

    @property
    def hop(self) -> Tensor:
        """(B, T): hop of each column."""
        columns = [torch.full((end - start,), h) for (start, end), h in zip(self.spans, self.hops, strict=True)]
        return torch.cat(columns).expand(self.real.shape[0], -1)

    def chunk(self, i: int) -> dict[str, Tensor]:
        """Keywords of the forward call that enters chunk i on a cache."""
        start, end = self.spans[i]
        out = {
            "input_ids": self.whole["input_ids"][:, start:end],
            "attention_mask": self.whole["attention_mask"][:, :end],
            "position_ids": self.whole["position_ids"][..., start:end],
            **self.images[i],
        }
        if "mm_token_type_ids" in self.whole and self.images[i]:
            out["mm_token_type_ids"] = self.whole["mm_token_type_ids"][:, start:end]
        return out


def tell(
    name: str, model: Any, family: Family, pads: Sequence[int], observations: int = 1, tail: int = 4, seed: int = 1
) -> Story:
    """A prompt, `observations` chunks with a new image each, and `tail` single positions after each of them."""
    B = len(pads)
    generator = torch.Generator().manual_seed(seed)
    chunks: list[Mapping[str, Tensor]] = [families.make_inputs(name, model, B, list(pads), seed=seed)]
    hops = [0]
    for h in range(1, observations + 1):
        chunks.append(families.make_hop(name, model, B, seed=seed + 10 * h))
        hops.append(h)
        for _ in range(tail):
            ids = torch.randint(100, 480, (B, 1), generator=generator)
            chunks.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            hops.append(h)
    whole = families.join(name, *chunks)
    whole["position_ids"] = family.positions(
        model, whole["input_ids"], whole["attention_mask"], whole.get("image_grid_thw")
    )
    spans, at = [], 0
    for chunk in chunks:
        width = chunk["input_ids"].shape[1]
        spans.append((at, at + width))
        at += width
    images = [{k: c[k] for k in ("pixel_values", "image_grid_thw", "image_sizes") if k in c} for c in chunks]
    return Story(whole, spans, images, hops)


@dataclass
class Played:
    """What a story told chunk by chunk gave."""

    cache: Any
    logits: list[Tensor] = field(default_factory=list)

    @property
    def all(self) -> Tensor:
        """(B, T, V)."""
        return torch.cat(self.logits, dim=1)


def play(model: Any, story: Story, cache: Any, close: Any = None, chunks: range | None = None) -> Played:
    """Enters the chunks of a story one by one.

    Args:
        model: an attached model.
        story: what to enter.
        cache: a routed cache.
        close: a pruner; then each hop is closed before the next one begins.
        chunks: which of them; default all.
    """
    out = Played(cache)
    for i in chunks if chunks is not None else range(len(story.spans)):
        if story.hops[i] != cache.hop:
            if close is not None:
                cache.close_hop(close)
            cache.start_hop(story.hops[i])
        out.logits.append(model(**story.chunk(i), past_key_values=cache, use_cache=True).logits)
    return out


def scattered(story: Story, layers: int, share: float = 0.55, seed: int = 7) -> list[Tensor]:
    """Random keep masks, per layer and row; some decode steps run nowhere, some layers keep little."""
    generator = torch.Generator().manual_seed(seed)
    shape = story.real.shape
    return [(torch.rand(shape, generator=generator) < share) & story.real for _ in range(layers)]


def nested(story: Story, layers: int, share: float = 0.8, seed: int = 7) -> list[Tensor]:
    """Keep masks for `drop`: within each chunk what left never comes back; ends of chunks and delimiters stay."""
    protected = torch.zeros_like(story.real)
    for _, end in story.spans:
        protected[:, end - 1] = True
    ids = story.whole["input_ids"]
    protected |= (ids == families.VISION_START) | (ids == families.VISION_END)
    generator = torch.Generator().manual_seed(seed)
    alive, out = story.real, []
    for _ in range(layers):
        alive = alive & ((torch.rand(story.real.shape, generator=generator) < share) | protected)
        out.append(alive)
    return out
