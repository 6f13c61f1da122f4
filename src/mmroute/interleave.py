"""Hops that are not words alone: pictures that the model writes, and image features that a written box brings.

The loop of `reason.py` asks at two points of a step: what may come next (`limit`), and what follows from what has just
been entered (`follow`). Whoever answers knows sessions and token ids; the thinker knows what its hops look like.

Legend: B batch, N positions, W columns of what is entered, V vocabulary, D hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmroute.backbones.base import Canvas
from mmroute.cache import Chunk
from mmroute.errors import UnsupportedCall
from mmroute.think.base import Box, LookingThinker, Thinker, Window
from mmroute.tokens import Modality
from mmroute.trace import Call

if TYPE_CHECKING:
    from mmroute.engine.attach import Routed
    from mmroute.session import Session

__all__ = ["Drawing", "Interleaver", "Looking", "cells_of", "check_features", "interleaver"]

TAIL = 64
"""Tokens in which a box is looked for; four numbers and their brackets take half of them letter by letter."""


class Interleaver(ABC):
    """What one batch of conversations has in its thoughts beside words. It belongs to one session."""

    def __init__(self, session: "Session", relevance: Sequence[Sequence[float]] | None) -> None:
        self.session, self.relevance = session, relevance
        self.over: set[int] = set()
        """Conversations whose hop ended with what was entered last."""
        self.boxes: dict[int, list[Box]] = {}
        """By conversation: the boxes whose features entered."""

    def limit(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """The logits with what may not come next at minus infinity."""
        return logits

    @abstractmethod
    def follow(
        self, written: Sequence[list[int]], hops: Sequence[int], logits: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """Enters what follows from the last token of each row, and returns the logits behind it.

        Args:
            written: [conversation]: tokens so far, the last of which has been entered.
            hops: [row]: the hop each row is in.
            logits: behind that token.
        """

    def words(self, ids: Sequence[int]) -> list[int]:
        """Those of some written tokens that are words."""
        return list(ids)

    def pictures(self, ids: Sequence[int]) -> list[list[int]]:
        """The whole pictures among some written tokens, as token ids row by row."""
        return []

    def _given_relevance(self, vision: Sequence[Sequence[int]], mask: Tensor) -> Tensor | None:
        """(B, W): ground truth of entered vision positions; `vision` names by row which of the prompt's they repeat."""
        if self.relevance is None:
            return None
        out = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
        for i, (conversation, cells) in enumerate(zip(self.session.rows, vision, strict=True)):
            if cells:
                known = self.relevance[conversation]
                values = [known[c] for c in cells]
                out[i, mask.shape[1] - len(cells) :] = torch.tensor(values, dtype=torch.float32, device=mask.device)
        return out


class Drawing(Interleaver):
    """Pictures as token ids: begun by the model, then a fixed number of codes and nothing else, then ended."""

    def __init__(
        self,
        session: "Session",
        canvas: Canvas,
        relevance: Sequence[Sequence[float]] | None = None,
        last_only: bool = False,
    ) -> None:
        """
        Args:
            session: after its prompt has entered.
            canvas: of the model.
            relevance: as `reason.answer_many` takes it.
            last_only: of the pictures written, later hops see the last one only.
        """
        super().__init__(session, relevance)
        assert session.ids is not None
        self.canvas, self.last_only, self.prompt = canvas, last_only, session.ids.shape[1]
        self._left: dict[int, int] = {}
        """By conversation that is in a picture: codes it has still to write."""
        self._hops: dict[int, list[int]] = {}
        """By conversation: the hop of each written token."""
        self._drawn = frozenset((canvas.begin, canvas.end, *canvas.codes))
        vocab, device = session.routed.controller.shape.vocab, session.ids.device
        never = torch.ones(3, vocab, dtype=torch.bool, device=device)
        never[0] = False
        never[0, [*session.routed.family.vision_ids(session.routed.model), canvas.end]] = True
        never[1, list(canvas.codes)] = False
        never[2, canvas.end] = False
        self._never = never
        """What may not come: among words, in a picture, at its end."""

    def limit(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """Codes in pictures only, and there nothing else; the end where a picture is whole."""
        state = [0 if (left := self._left.get(row)) is None else 1 if left else 2 for row in self.session.rows]
        return logits.masked_fill(self._never[torch.tensor(state, device=logits.device)], float("-inf"))

    def follow(
        self, written: Sequence[list[int]], hops: Sequence[int], logits: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        self.over = set()
        for i, (row, hop) in enumerate(zip(self.session.rows, hops, strict=True)):
            self._hops.setdefault(row, []).append(hop)
            value = written[row][-1]
            if row not in self._left:
                if value == self.canvas.begin:
                    self._left[row] = self.canvas.size
            elif value == self.canvas.end:
                del self._left[row]
                self.over.add(row)
            else:
                self._left[row] -= 1
                _count_as_vision(self.session.ledger.last, i)
        if self.over and self.last_only:
            return self._anew(written, hops, logits)
        return logits

    def words(self, ids: Sequence[int]) -> list[int]:
        return [value for value in ids if value not in self._drawn]

    def pictures(self, ids: Sequence[int]) -> list[list[int]]:
        ends = [i for i, value in enumerate(ids) if value == self.canvas.end]
        return [list(ids[end - self.canvas.size : end]) for end in ends]

    def _anew(self, written: Sequence[list[int]], hops: Sequence[int], logits: Tensor) -> Tensor:
        """Rows that have just ended a picture forget all behind the prompt, then read their words and that picture."""
        session, whole = self.session, self.canvas.size + 2
        texts: list[list[int]] = []
        numbers: list[list[int]] = []
        for row in session.rows:
            texts.append([])
            numbers.append([])
            if row in self.over:
                before = list(zip(written[row][:-whole], self._hops[row][:-whole], strict=True))
                kept = set(self.words(written[row]))
                said = [(value, hop) for value, hop in before if value in kept]
                last = list(zip(written[row][-whole:], self._hops[row][-whole:], strict=True))
                texts[-1], numbers[-1] = (list(side) for side in zip(*said, *last, strict=True))
        width, device = max(map(len, texts)), logits.device
        ids = torch.full((len(texts), width), self.canvas.end, device=device)
        mask = torch.zeros_like(ids)
        hop = torch.tensor(hops, device=device)[:, None].repeat(1, width)
        for i, (text, number) in enumerate(zip(texts, numbers, strict=True)):
            if text:
                ids[i, -len(text) :], mask[i, -len(text) :] = torch.tensor(text), 1
                hop[i, -len(text) :] = torch.tensor(number)
        due = [bool(text) for text in texts]
        session.forget(due, self.prompt, list(hops))
        session.cache.next = Chunk(hop=hop)
        vision = [list(range(self.canvas.size)) if d else [] for d in due]
        relevance = self._given_relevance(vision, mask[:, :-1])  # the end of the picture is no vision position
        if relevance is not None:
            relevance = torch.nn.functional.pad(relevance, (0, 1))
        fresh = session.enter({"input_ids": ids, "attention_mask": mask}, relevance, None)[:, -1]
        session.ledger.last.hop = list(hops)
        return fresh.where(torch.tensor(due, device=device)[:, None], logits)


class Looking(Interleaver):
    """Boxes in what is written: the features under each one enter behind it."""

    def __init__(
        self,
        session: "Session",
        think: LookingThinker,
        tokenizer: Any,
        batch: Mapping[str, Tensor],
        relevance: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """
        Args:
            session: after its prompt has entered.
            think: reads boxes and places them in the grid.
            tokenizer: of the model.
            batch: the prompt with its image tensors.
            relevance: as `reason.answer_many` takes it.

        Raises:
            UnsupportedCall: positions of this family have a row and a column, or its image features lie in no one grid.
        """
        super().__init__(session, relevance)
        family, model = session.routed.family, session.routed.model
        check_features(session.routed)
        self.think, self.tokenizer, self.batch, self.lead = think, tokenizer, batch, family.lead(model)
        self._grids = session.images_by_row(dict(batch)) if family.image_kwargs(batch) else [[] for _ in session.rows]
        counts = [len(grids) for grids in self._grids]
        self._image = [sum(counts[:i]) for i in range(len(counts))]
        """[conversation]: the number of its first image in the batch."""
        self._features: list[Tensor] | None = None
        vision = session.routed.controller.table[batch["input_ids"]] == int(Modality.VISION)
        self._first = vision.long().argmax(1).tolist()
        """[conversation]: logical column of its first vision position."""

    def follow(
        self, written: Sequence[list[int]], hops: Sequence[int], logits: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        self.over = set()
        windows: dict[int, Window] = {}
        for i, (row, hop) in enumerate(zip(self.session.rows, hops, strict=True)):
            box = self.think.box_at(self.tokenizer.decode(written[row][-TAIL:], skip_special_tokens=False))
            if box is not None and self._grids[row]:
                self.over.add(row)
                self.boxes.setdefault(row, []).append(box)
                windows[i] = self.think.window(box, *self._grids[row][0])
                self._note(row, hop, windows[i])
        return self._enter(windows, hops, logits) if windows else logits

    def _cells(self, row: int, window: Window) -> list[int]:
        """Places of a window's cells among the vision positions of the conversation's first image."""
        return [self.lead + cell for cell in cells_of(window, self._grids[row][0][1])]

    def features(self, row: int, window: Window) -> Float[Tensor, "n D"]:
        """Input embeddings of the cells of a window, row by row."""
        if self._features is None:  # one more look at the images, and only once a box asks for it
            self._features = self.session.routed.family.image_features(self.session.routed.model, self.batch)
        image = self._features[self._image[row]]
        return image[torch.tensor(self._cells(row, window), device=image.device)]

    def _enter(self, windows: Mapping[int, Window], hops: Sequence[int], logits: Tensor) -> Tensor:
        session = self.session
        found = {i: self.features(session.rows[i], window) for i, window in windows.items()}
        width = max(map(len, found.values()))
        like = next(iter(found.values()))
        embeds = like.new_zeros(len(hops), width, like.shape[1])
        mask = torch.zeros(len(hops), width, dtype=torch.long, device=like.device)
        for i, features in found.items():
            embeds[i, width - len(features) :], mask[i, width - len(features) :] = features, 1
        vision = [self._cells(session.rows[i], windows[i]) if i in windows else [] for i in range(len(hops))]
        fresh = session.insert(embeds, mask, list(hops), self._given_relevance(vision, mask))
        due = torch.tensor([i in windows for i in range(len(hops))], device=logits.device)
        return fresh.where(due[:, None], logits)

    def _note(self, row: int, hop: int, window: Window) -> None:
        """For the trace: which image positions are shown again."""
        self.session.ledger.replay(row, hop, [self._first[row] + cell for cell in self._cells(row, window)])


def cells_of(window: Window, width: int) -> list[int]:
    """Numbers of a window's cells in a grid of so many columns, row by row.

    Example:
        >>> cells_of((1, 0, 2, 2), 4)
        [4, 5, 8, 9]
    """
    top, left, rows, columns = window
    return [r * width + c for r in range(top, top + rows) for c in range(left, left + columns)]


def check_features(routed: "Routed") -> None:
    """Whether features under a box can be inserted.

    Raises:
        UnsupportedCall: positions of this family have a row and a column, or its image features lie in no one grid.
    """
    family, model = routed.family, routed.model
    one = torch.ones(1, 1, dtype=torch.long)
    if family.positions(model, one, one).ndim != 2 or family.lead(model) > 1:
        raise UnsupportedCall(
            f"{family.name}: features under a box are inserted where positions are plain numbers and an image has one "
            "grid; use llava (LLaVA-1.5, VolCano) or chameleon"
        )


def _count_as_vision(call: Call, row: int) -> None:
    """A step counts what it brings as a word; this one brought the code of a picture."""
    for counts in (call.new, *(layer.ran for layer in call.layers)):
        text, vision, latent = counts[row]
        counts[row] = [0, text + vision, latent]


def interleaver(
    session: "Session",
    think: Thinker,
    processor: Any,
    batch: Mapping[str, Tensor],
    relevance: Sequence[Sequence[float]] | None = None,
) -> Interleaver | None:
    """What a way to think has beside words; None where that is nothing.

    Args:
        session: after its prompt has entered.
        think: its way to think.
        processor: of the model.
        batch: the prompt with its image tensors.
        relevance: as `reason.answer_many` takes it.

    Raises:
        UnsupportedCall: this family cannot do it.
    """
    routed = session.routed
    if think.draws:
        canvas = routed.family.canvas(routed.model, processor)
        return Drawing(session, canvas, relevance, last_only=think.config.context == "markov2")
    if isinstance(think, LookingThinker):
        return Looking(session, think, processor.tokenizer, batch, relevance)
    return None
