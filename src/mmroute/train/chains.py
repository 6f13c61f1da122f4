"""Right chains of generated worlds for any model: one column range per hop, so that a batch can be run in one pass or
hop by hop. A hop may hold more than words: a picture that the model writes, or the image features under a box, which
have a range of their own behind the words that bring them.

Legend: B batch, N columns, P vision tokens of one image, D hidden.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from mmroute.interleave import cells_of, check_features
from mmroute.tasks import _skins
from mmroute.tasks._texts import VOCABULARY
from mmroute.tasks.base import Generated, Spec
from mmroute.think.base import LookingThinker, Thinker
from mmroute.tokens import Modality
from mmroute.train.decode import embed
from mmroute.train.examples import IGNORED, Batch, item
from mmroute.train.small_model import MERGE, PATCH
from mmroute.train.stories import Piece, told

__all__ = ["Chains", "Writer", "worlds"]


def worlds(names: Iterable[str], settings: Mapping[str, Any] | None = None) -> dict[str, Generated]:
    """Generated worlds, each by the `name` or `name:preset` it was asked for with.

    Args:
        names: which.
        settings: options that all of them get.

    Raises:
        ConfigError: no such task, or one that does not know the right chains.
    """
    found: dict[str, Generated] = {}
    for name in names:
        task = load_task(name, settings)
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
    """First column of each range: the prompt's, then of each hop its words and, where a row has any, its features."""
    hops: list[int]
    """[range]: the hop it belongs to."""
    inputs: dict[str, Tensor]
    """What the base model takes beside ids: image tensors, or the embeddings of everything."""
    needed: Bool[Tensor, "B P"] | None
    """Vision tokens that some hop looks at; None where tokens are not tiles."""
    board: Bool[Tensor, "B P"] | None

    @property
    def spans(self) -> list[tuple[int, int, int]]:
        """First column, end and hop of each range."""
        return list(zip(self.starts, [*self.starts[1:], self.ids.shape[1]], self.hops, strict=True))


@dataclass(frozen=True)
class _Hop:
    words: list[int]
    """What is written, codes of a picture included."""
    cells: Sequence[int] = ()
    """Vision tokens of the row's image that enter behind it."""


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
        answers = self._answers(drawn, inputs)
        pad = self.tokenizer.pad_token_id or 0
        pieces: list[list[Sequence[int]]] = [[prompt] for prompt in prompts]
        hops, brought = [0], [False]
        for h in range(max(map(len, answers))):
            own = [answer[h] if h < len(answer) else _Hop([]) for answer in answers]
            for column, is_brought in (([o.words for o in own], False), ([o.cells for o in own], True)):
                if any(column):
                    hops.append(h + 1)
                    brought.append(is_brought)
                    for row, piece in zip(pieces, column, strict=True):
                        row.append(piece)
        widths = [max(len(row[i]) for row in pieces) for i in range(len(hops))]
        starts = np.cumsum([0, *widths])[:-1].tolist()
        shape = (len(drawn), sum(widths))
        ids, mask, source = np.full(shape, pad), np.zeros(shape, dtype=np.int64), np.full(shape, -1)
        for b, row in enumerate(pieces):
            for start, piece, is_brought in zip(starts, row, brought, strict=True):
                here = (b, slice(start, start + len(piece)))
                mask[here] = 1
                ids[here] = self.routed.model.config.image_token_id if is_brought else piece
                if is_brought:
                    source[here] = piece
        device = self.routed.model.device
        spread = torch.tensor(widths, device=device)
        hop = torch.tensor(hops, device=device).repeat_interleave(spread).expand(shape)
        is_word = ~torch.tensor(brought, device=device).repeat_interleave(spread)
        all_ids, all_mask = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        generated = (hop > 0) & is_word & all_mask.bool()
        controller, family, model = self.routed.controller, self.routed.family, self.routed.model
        grids = inputs.get("image_grid_thw")
        if tiles is not None:
            side = tiles.shape[1]
            grids = torch.tensor([[1, side * MERGE, side * MERGE]] * len(drawn), device=device)
        positions = family.positions(model, all_ids, all_mask, grids)
        if tiles is not None:
            inputs = {"inputs_embeds": self._embedded(all_ids, tiles, drawn[0][0])}
        elif isinstance(self.think, LookingThinker):
            inputs = {"inputs_embeds": self._looked(all_ids, torch.from_numpy(source).to(device), inputs)}
        elif "mm_token_type_ids" in inputs:
            inputs["mm_token_type_ids"] = (all_ids == model.config.image_token_id).long()
        modality = controller.table[all_ids].masked_fill(~all_mask.bool(), int(Modality.TEXT))
        needed, board = self._relevant(drawn, modality.masked_fill(hop > 0, int(Modality.TEXT)))
        labels = all_ids.masked_fill(~generated, IGNORED)
        return Chains(
            all_ids, all_mask, labels, hop, generated, modality, positions, starts, hops, inputs, needed, board
        )

    # ------------------------------------------------------------------ what is written

    def _answers(self, drawn: Sequence[tuple[Generated, Spec]], inputs: Mapping[str, Tensor]) -> list[list[_Hop]]:
        """[row][hop], as `reason.answer_many` would cut them."""
        ends = self.routed.model.generation_config.eos_token_id
        end = (ends[0] if isinstance(ends, list) else ends) if ends is not None else self.tokenizer.eos_token_id
        stories = [told(task, spec, self.think) for task, spec in drawn]
        if stories[0] is None:
            texts = [task.words(spec, "cot").response for task, spec in drawn]
            return [[_Hop(hop) for hop in self._hops([*self._ids(" ".join(text)), end])] for text in texts]
        answers = []
        pictures, grids = self._pictures(drawn, stories), self._grids(inputs)
        for story, grid in zip(stories, grids, strict=True):
            hops = []
            for piece in story or []:
                words = self._ids(" ".join(piece.words))
                hops.append(
                    _Hop([*words, *(next(pictures) if piece.state is not None else [])], self._under(words, grid))
                )
            hops[-1].words.append(end)
            answers.append(hops)
        return answers

    def _pictures(
        self, drawn: Sequence[tuple[Generated, Spec]], stories: Sequence[Sequence[Piece] | None]
    ) -> Iterator[list[int]]:
        """The pictures of all rows' hops, one after the other, as the model would write them."""
        routed = self.routed
        shown = [
            task.draw(spec, task.trace(spec)[piece.state])
            for (task, spec), story in zip(drawn, stories, strict=True)
            for piece in story or []
            if piece.state is not None
        ]
        if not shown:
            return
        canvas = routed.family.canvas(routed.model, routed.processor)
        for codes in routed.family.read_pictures(routed.model, routed.processor, shown):
            yield [canvas.begin, *codes, canvas.end]

    def _grids(self, inputs: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """[row]: rows and columns of its image's vision tokens."""
        if isinstance(self.think, LookingThinker):
            check_features(self.routed)
        return self.routed.family.image_grid(self.routed.model, inputs)

    def _under(self, words: list[int], grid: tuple[int, int]) -> list[int]:
        """The cells under the box that words end with."""
        if not isinstance(self.think, LookingThinker):
            return []
        box = self.think.box_at(self.tokenizer.decode(words, skip_special_tokens=False))
        return [] if box is None else cells_of(self.think.window(box, *grid), grid[1])

    @torch.no_grad()
    def _looked(self, ids: Tensor, source: Int[Tensor, "B N"], inputs: Mapping[str, Tensor]) -> Float[Tensor, "B N D"]:
        """Embeddings of everything: words, the prompts' images, and the features under boxes."""
        family, model = self.routed.family, self.routed.model
        features = torch.stack(family.image_features(model, inputs))
        given = (self.routed.controller.table[ids] == Modality.VISION) & (source < 0)
        at = torch.where(given, given.cumsum(1) - 1, source + family.lead(model) * (source >= 0))
        words = model.get_input_embeddings()(ids)
        shown = features.gather(1, at.clamp(min=0)[..., None].expand_as(words)).to(words.dtype)
        return torch.where((at >= 0)[..., None], shown, words)

    # ------------------------------------------------------------------ what is given

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
