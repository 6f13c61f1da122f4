"""Written chains of generated worlds for any model: one column range per hop, so that a batch can be run in one pass
or hop by hop.

Legend: B batch, N columns, P vision tokens of one image, D hidden.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmroute.backbones.images import prepare
from mmroute.bench.items import load_task
from mmroute.engine.attach import Routed
from mmroute.errors import ConfigError
from mmroute.tasks import _skins
from mmroute.tasks._texts import VOCABULARY
from mmroute.tasks.base import Generated, Spec
from mmroute.think.base import Thinker
from mmroute.tokens import Modality
from mmroute.train.decode import embed
from mmroute.train.examples import IGNORED, Batch, item
from mmroute.train.small_model import MERGE, PATCH

__all__ = ["Chains", "Writer", "worlds"]


def worlds(names: Iterable[str]) -> dict[str, Generated]:
    """Generated worlds, each by the `name` or `name:preset` it was asked for with.

    Raises:
        ConfigError: no such task, or one that does not know the right chains.
    """
    found: dict[str, Generated] = {}
    for name in names:
        task = load_task(name)
        if not isinstance(task, Generated):
            raise ConfigError(f"train.tasks: {name} is no generated world; those know the right chains")
        found[name] = task
    return found


@dataclass(frozen=True)
class Chains:
    """A teacher-forced batch: prompts from the left, then each hop in its own columns, with gaps in shorter rows."""

    ids: Int[Tensor, "B N"]
    mask: Int[Tensor, "B N"]
    labels: Int[Tensor, "B N"]
    """What stands at a column the model has to write, else `IGNORED`."""
    hop: Int[Tensor, "B N"]
    generated: Bool[Tensor, "B N"]
    modality: Int[Tensor, "B N"]
    positions: Tensor
    """(B, N), or (3, B, N) where positions have a time, a row and a column."""
    starts: list[int]
    """First column of each hop, the prompt's included."""
    inputs: dict[str, Tensor]
    """What the base model takes beside ids: image tensors, or the embeddings of everything."""
    needed: Bool[Tensor, "B P"] | None
    """Vision tokens that some hop looks at; None where tokens are not tiles."""
    board: Bool[Tensor, "B P"] | None

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Columns of each hop."""
        return list(zip(self.starts, [*self.starts[1:], self.ids.shape[1]], strict=True))


class Writer:
    """Turns specs into batches for one attached model."""

    def __init__(self, routed: Routed, think: Thinker) -> None:
        self.routed, self.think = routed, think
        self.tokenizer = routed.processor.tokenizer
        config = routed.model.config
        known = self.tokenizer.get_vocab()
        vision = getattr(config, "vision_config", None)
        # The small models: a vision token is one tile wherever it lies, so distinct tiles are encoded once.
        self.small = (
            config.get_text_config().vocab_size == len(VOCABULARY)
            and all(known.get(word) == i for i, word in enumerate(VOCABULARY))
            and getattr(vision, "window_size", None) == PATCH * MERGE
            and not getattr(vision, "fullatt_block_indexes", True)
        )
        self.index = {word: i for i, word in enumerate(VOCABULARY)}
        self._atlases: dict[tuple[float, str], Tensor] = {}
        self._begins: dict[int, bool] = {}

    def batch(self, drawn: Sequence[tuple[Generated, Spec]]) -> Chains:
        """Questions with their right chains."""
        prompts, tiles, inputs = self._prompts(drawn)
        ends = self.routed.model.generation_config.eos_token_id
        end = (ends[0] if isinstance(ends, list) else ends) if ends is not None else self.tokenizer.eos_token_id
        answers = [self._hops([*self._ids(" ".join(task.words(spec, "cot").response)), end]) for task, spec in drawn]
        hops = max(map(len, answers))
        widths = [max(map(len, prompts))]
        widths += [max(len(a[h]) if h < len(a) else 0 for a in answers) for h in range(hops)]
        starts = np.cumsum([0, *widths])[:-1].tolist()
        pad = self.tokenizer.pad_token_id or 0
        shape = (len(drawn), sum(widths))
        ids, mask = np.full(shape, pad), np.zeros(shape, dtype=np.int64)
        for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            for start, piece in zip(starts, [prompt, *answer], strict=False):
                ids[b, start : start + len(piece)], mask[b, start : start + len(piece)] = piece, 1
        device = self.routed.model.device
        hop = torch.arange(len(widths), device=device).repeat_interleave(torch.tensor(widths, device=device))
        all_ids, all_mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        hop = hop.expand(shape)
        generated = (hop > 0) & all_mask.bool()
        controller, family, model = self.routed.controller, self.routed.family, self.routed.model
        grids = inputs.get("image_grid_thw")
        if tiles is not None:
            side = tiles.shape[1]
            grids = torch.tensor([[1, side * MERGE, side * MERGE]] * len(drawn), device=device)
        positions = family.positions(model, all_ids, all_mask, grids)
        if tiles is not None:
            inputs = {"inputs_embeds": self._embedded(all_ids, tiles, drawn[0][0])}
        elif "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (all_ids == model.config.image_token_id).long()
        modality = controller.table[all_ids].masked_fill(~all_mask.bool(), int(Modality.TEXT))
        needed, board = self._relevant(drawn, modality)
        labels = all_ids.masked_fill(~generated, IGNORED)
        return Chains(all_ids, all_mask, labels, hop, generated, modality, positions, starts, inputs, needed, board)

    def _prompts(
        self, drawn: Sequence[tuple[Generated, Spec]]
    ) -> tuple[list[list[int]], Int[np.ndarray, "B side side"] | None, dict[str, Tensor]]:
        if self._tiled(drawn):
            items = [item(task, spec, "cot") for task, spec in drawn]
            prompts = [[self.index[word] for word in each.words.prompt] for each in items]
            return prompts, np.stack([each.tiles for each in items]), {}
        return self._chats([task.messages(task.sample(spec), self.think.style) for task, spec in drawn])

    def _tiled(self, drawn: Sequence[tuple[Generated, Spec]]) -> bool:
        """Whether one look at each distinct tile serves the whole batch."""
        alike = {(task.skin, task.noise, task.preset.look, spec.canvas) for task, spec in drawn}
        return self.small and len(alike) == 1 and drawn[0][0].skin == "tiles"

    def _chats(self, chats: list[list[dict[str, Any]]]) -> tuple[list[list[int]], None, dict[str, Tensor]]:
        """Prompts of any model, without their padding, and their image tensors."""
        batch = prepare(self.routed.model, self.routed.processor, chats)
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        prompts = [[i for i, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]
        kept = {k: batch[k] for k in self.routed.family.image_kwargs(batch)}
        return prompts, None, kept

    def _embedded(self, ids: Tensor, tiles: Int[np.ndarray, "B side side"], task: Generated) -> Float[Tensor, "B N D"]:
        side = tiles.shape[1]
        first = int((self.routed.controller.table[ids[0]] == Modality.VISION).nonzero()[0])
        rows = torch.from_numpy(tiles.reshape(len(tiles), -1)).to(ids.device)
        batch = Batch(ids, ids, rows, ids.new_zeros(len(ids), side * side, 3), first, side)
        look = (task.noise, task.preset.look)
        if look not in self._atlases:
            pixels = _skins.atlas(PATCH * MERGE, *look)
            flat = torch.tensor(pixels.reshape(-1, *pixels.shape[2:]), dtype=torch.float32, device=ids.device)
            self._atlases[look] = flat
        return embed(self.routed.model, batch, self._atlases[look], torch.float32)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(re.sub(r"<\|im_end\|>\s*$", "", text).strip(), add_special_tokens=False)["input_ids"]

    def _hops(self, written: list[int]) -> list[list[int]]:
        """Cut where the thinker begins a hop, as `reason.answer_many` does."""
        out: list[list[int]] = [[]]
        for i, token in enumerate(written):
            if token not in self._begins:
                self._begins[token] = self.think.starts_hop(self.tokenizer.decode([token]))
            if i and self._begins[token]:
                out.append([])
            out[-1].append(token)
        return out

    def _relevant(
        self, drawn: Sequence[tuple[Generated, Spec]], modality: Tensor
    ) -> tuple[Bool[Tensor, "B P"] | None, Bool[Tensor, "B P"] | None]:
        tiles = drawn[0][1].canvas ** 2
        if any(task.skin != "tiles" or spec.canvas**2 != tiles for task, spec in drawn):
            return None, None
        if bool(((modality == Modality.VISION).sum(1) != tiles).any()):
            return None, None
        needed = np.zeros((len(drawn), tiles), dtype=bool)
        board = np.zeros_like(needed)
        for b, (task, spec) in enumerate(drawn):
            for hop in range(len(task.trace(spec)) + 1):
                needed[b, task.relevant(spec, hop)] = True
            board[b, task.board(spec)] = True
        device = modality.device
        return torch.from_numpy(needed).to(device), torch.from_numpy(board).to(device)
