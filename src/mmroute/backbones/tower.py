"""What a vision tower looks at, read while it runs: attention and keys of its last block but one, token by token.

Nothing of the tower is changed: its block's input is kept until the text model asks, and queries and keys are computed
from it once more. That, and every comparison, is charged to who asked.

Legend: P patches of one picture, D width of the tower, H heads, E head dim.
"""

import sys
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmroute.errors import UnsupportedBackbone

__all__ = ["ClipTower", "Look", "QwenTower", "Tower", "tower_of"]


@dataclass(frozen=True)
class Look:
    """One number and one key for each vision position, in the order in which they enter the text model."""

    score: Tensor
    """(tokens,) attention of the class position, or received from all where there is none."""
    keys: Tensor
    """(tokens, E) mean over heads, unrotated."""
    flops: int


_SEEN = threading.local()
"""What the tower's hooks hand to the text model's, in the same forward call and thread."""


@dataclass(frozen=True)
class Tower(ABC):
    """Where a model's pictures are read, and how to make a `Look` of it."""

    model: nn.Module
    blocks: Any
    has_class: bool = False
    """Whether a position before the patches stands for the whole picture, and the text model is not given it."""

    @abstractmethod
    def look(self, hidden: Tensor, given: dict[str, Any], grids: Tensor | None) -> Look:
        """What the block looks at.

        Args:
            hidden: the block's input.
            given: the keywords it got.
            grids: (pictures, 3) in patches, where the tower is told them.
        """

    @property
    def block(self) -> Any:
        """The last block but one; of a single one, that."""
        return self.blocks[max(len(self.blocks) - 2, 0)]

    def watch(self) -> list[RemovableHandle]:
        """Starts to see; the handles end it."""
        return [
            self.model.register_forward_pre_hook(self._before_tower, with_kwargs=True),
            self.block.register_forward_pre_hook(self._before_block, with_kwargs=True),
        ]

    def _before_tower(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        _SEEN.grids = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)

    def _before_block(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        _SEEN.block = (args[0] if args else kwargs["hidden_states"]).detach(), kwargs

    @torch.no_grad()
    def take(self) -> Look | None:
        """What was seen in this call; None if no picture came."""
        seen, grids = getattr(_SEEN, "block", None), getattr(_SEEN, "grids", None)
        _SEEN.block = _SEEN.grids = None
        if seen is None:
            return None
        hidden, given = seen
        return self.look(hidden, given, grids)


class QwenTower(Tower):
    """Attention that each patch receives from its whole picture, then the mean over the patches of a token."""

    def look(self, hidden: Tensor, given: dict[str, Any], grids: Tensor | None) -> Look:
        assert grids is not None
        visual: Any = self.model
        attention, merge = self.block.attn, visual.spatial_merge_size**2
        S, H = hidden.shape[0], attention.num_heads
        q, k, _ = attention.qkv(self.block.norm1(hidden)).reshape(S, 3, H, -1).permute(1, 0, 2, 3).unbind(0)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        turned_q, turned_k = rotate(q, k, *given["position_embeddings"])
        score = torch.empty(S, device=hidden.device)
        start, pairs = 0, 0
        for size in grids.prod(-1).tolist():
            here = slice(start, start + size)
            received = torch.zeros(size, device=hidden.device)
            for h in range(H):  # a head at a time: no H x P x P tensor
                logits = turned_q[here, h].float() @ turned_k[here, h].float().T * attention.scaling
                received += logits.softmax(-1).mean(0) / H
            score[here] = received
            start, pairs = start + size, pairs + size * size
        score = score.view(-1, merge).mean(1)
        keys = k.float().mean(1).view(S // merge, merge, -1).mean(1)
        if hasattr(visual, "window_size"):  # its tokens lie window by window
            find = sys.modules[type(visual).__module__].get_vision_window_index
            index, _ = find(
                grids,
                spatial_merge_size=visual.spatial_merge_size,
                window_size=visual.window_size,
                patch_size=visual.patch_size,
                kwargs={},
            )
            order = torch.argsort(index.to(score.device))
            score, keys = score[order], keys[order]
        D = hidden.shape[-1]
        return Look(score, keys, 2 * S * D * 3 * D + 2 * D * pairs)


class ClipTower(Tower):
    """Attention of the class position, summed over heads."""

    def look(self, hidden: Tensor, given: dict[str, Any], grids: Tensor | None) -> Look:
        attention = self.block.self_attn
        pictures, positions, D = hidden.shape
        x = self.block.layer_norm1(hidden)
        q = attention.q_proj(x[:, :1]).view(pictures, 1, -1, attention.head_dim).transpose(1, 2)
        k = attention.k_proj(x).view(pictures, positions, -1, attention.head_dim)
        row = (q.float() @ k.float().permute(0, 2, 3, 1) * attention.scale).softmax(-1).sum(1)[:, 0]
        row[:, 0] = torch.inf  # where a text model is given the class position too, it stays
        keys, first = k.float().mean(2), int(self.has_class)
        flops = 2 * pictures * (positions + 1) * D * D + 2 * pictures * positions * D
        return Look(row[:, first:].flatten(), keys[:, first:].flatten(0, 1), flops)


def tower_of(family: str, model: Any) -> Tower:
    """The tower of a model.

    Raises:
        UnsupportedBackbone: the family has none, or one whose blocks are not known here.
    """
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        return QwenTower(model.model.visual, model.model.visual.blocks)
    tower = getattr(model.model, "vision_tower", None)
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList)] if tower is not None else []
    # LLaVA-NeXT sees an image whole and in tiles; which of these a text position stands for is not read here.
    if (
        family != "llava_next"
        and tower is not None
        and lists
        and hasattr(lists[0][0], "layer_norm1")
        and hasattr(lists[0][0], "self_attn")
    ):
        alone = getattr(model.config, "vision_feature_select_strategy", "default") == "default"
        return ClipTower(tower, lists[0], has_class=alone)
    raise UnsupportedBackbone(
        f"{family}: no vision tower whose attention can be read, so visionzip cannot rank; take divprune, which reads "
        "embeddings alone"
    )
