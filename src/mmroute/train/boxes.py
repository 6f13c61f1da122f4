"""Trains a small LLaVA to look again where its thoughts point: `mmroute train backbone --recipe boxes`.

Each hop of a text names an object and its box; the image features under the box enter behind it, and what follows may
read them. Looking is what takes long (`backbone.py`): at first most steps learn where things lie, and beside the words
each vision token learns to name where it lies and what it shows.

Legend: B batch, N positions, P vision tokens of one image, C tiles of one side, D hidden.

Source: VoCoT (NAACL 2025, arXiv 2405.16919): chains that alternate words, boxes and the features under them;
    cross-entropy on words alone.
Deviates: from scratch, tower and all, in one phase; read-outs and naming loss are ours; boxes are those of cells.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from mmroute import hub
from mmroute.config import options
from mmroute.recipe import Recipe as Routing
from mmroute.tasks import _skins
from mmroute.tasks._texts import IMAGE, PAD
from mmroute.tasks.base import Generated, Spec
from mmroute.think.base import LookingThinker
from mmroute.train.box_model import TILE, WORDS, Shape, build, make_processor, merged
from mmroute.train.examples import seen_tiles
from mmroute.train.naming import IGNORED, names_of_tiles, naming_loss
from mmroute.train.recipe import Ramp, at
from mmroute.train.scratch import ScratchRecipe, ScratchRun, accuracy, answered
from mmroute.train.stories import BOX_END, boxed

__all__ = ["Batch", "Recipe", "Run", "collate", "exam", "story"]

_INDEX = {word: i for i, word in enumerate(WORDS)}
_SLACK = 16
"""Words that a chain may run over the longest right one before it is cut."""


@options
class Recipe(ScratchRecipe):
    """All that decides the weights, but for the seed."""

    family: Literal["llava"]
    task: str = "gridspatial"
    model: Shape = Shape()
    place: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the naming loss."""
    place_layer: Annotated[int, Field(ge=0)] = 0
    """Text layers after which vision tokens name themselves; 0 is as they enter, as words do, so that the first layer
    finds one in the other."""
    probe: Ramp = ((0.0, 0.6), (0.4, 0.4), (0.6, 0.1))
    """Share of steps that learn where things lie, without a chain, by the share of the run that is over."""


def story(task: Generated, spec: Spec, think: LookingThinker) -> tuple[list[int], list[int], list[int]]:
    """An item as token ids: its prompt, and what follows, with placeholders where image features stand; and the cells
    of these features.

    Args:
        task: a world whose hops look at cells.
        spec: one item.
        think: places boxes in the grid of features.
    """
    prompt, rest, cells = _ids(task.words(spec, "cot").prompt), list[int](), list[int]()
    for piece in boxed(task, spec):
        rest += _ids(piece.words)
        if piece.box is not None:
            top, left, rows, columns = think.window(piece.box, spec.canvas, spec.canvas)
            under = [r * spec.canvas + c for r in range(top, top + rows) for c in range(left, left + columns)]
            rest += [_INDEX[IMAGE]] * len(under)
            cells += under
    return prompt, rest, cells


def _ids(words: Sequence[str]) -> list[int]:
    return [_INDEX[word] for word in merged(words)]


@dataclass(frozen=True)
class _Text:
    """One item as token ids."""

    prompt: list[int]
    rest: list[int]
    cells: list[int]
    """Vision tokens that stand at the placeholders of `rest`, in order."""
    learned: list[bool]
    """[word of `rest`]."""


def _chain(task: Generated, spec: Spec, think: LookingThinker) -> _Text:
    prompt, rest, cells = story(task, spec, think)
    return _Text(prompt, rest, cells, [token != _INDEX[IMAGE] for token in rest])


def _finds(task: Generated, spec: Spec) -> _Text:
    """Where each thing lies, in random order: looking, without a chain.

    What lies where is left out: no chain asks for it.
    """
    things = task._unique(spec)
    rest, learned = list[str](), list[bool]()
    for i in np.random.default_rng([spec.seed, 1]).permutation(len(things)):
        name, cell = things[int(i)]
        rest += [*merged(name), task.at(spec, cell), "."]
        learned += [*[False] * len(merged(name)), True, False]
    return _Text(_ids(task.words(spec, "probe").prompt), _ids(rest), [], learned)


@dataclass(frozen=True)
class Batch:
    """Texts padded on their right, with their pictures."""

    ids: Int[Tensor, "B N"]
    labels: Int[Tensor, "B N"]
    """What stands at this column where it is learned, else `IGNORED`."""
    source: Int[Tensor, "B N"]
    """At placeholders the vision token that stands there, else -1."""
    pixels: Float[Tensor, "B 3 px px"]
    named: Int[Tensor, "B P 3"]

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))


def collate(task: Generated, specs: Sequence[Spec], think: LookingThinker, probe: bool = False) -> Batch:
    """Items as one batch: their chains, or where things lie in their pictures."""
    texts = [_finds(task, spec) if probe else _chain(task, spec, think) for spec in specs]
    width = max(len(text.prompt) + len(text.rest) for text in texts)
    ids = torch.full((len(texts), width), _INDEX[PAD])
    labels = torch.full_like(ids, IGNORED)
    source = torch.full_like(ids, -1)
    for b, (spec, text) in enumerate(zip(specs, texts, strict=True)):
        row = torch.tensor([*text.prompt, *text.rest])
        learned = torch.tensor([*[False] * len(text.prompt), *text.learned])
        ids[b, : len(row)], labels[b, : len(row)] = row, row.where(learned, torch.tensor(IGNORED))
        source[b, : len(row)][row == _INDEX[IMAGE]] = torch.tensor([*range(spec.canvas**2), *text.cells])
    seen = [{tile: merged(words) for tile, words in seen_tiles(task, spec).items()} for spec in specs]
    named = names_of_tiles(seen, specs[0].canvas, _INDEX)
    return Batch(ids, labels, source, _pixels([task.codes(spec) for spec in specs]), named)


def _pixels(codes: Sequence[Int[np.ndarray, "C C"]]) -> Float[Tensor, "B 3 px px"]:
    """Pictures of tiles without noise as the stock processor gives them."""
    images = make_processor(len(codes[0])).image_processor
    tiles = torch.from_numpy(_skins.atlas(TILE, 0.0)[:, 0].astype(np.float32))[torch.from_numpy(np.stack(codes)).long()]
    pictures = tiles.permute(0, 5, 1, 3, 2, 4).flatten(2, 3).flatten(3, 4)
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    return (pictures * images.rescale_factor - mean) / std


class Run(ScratchRun[Recipe]):
    """Trains one model that looks again."""

    recipe_type: ClassVar[type] = Recipe
    tile_px: ClassVar[int] = TILE

    @cached_property
    def think(self) -> LookingThinker:
        return hub.load("think", "boxes")

    def build(self) -> Any:
        return build(self.recipe.model, self.canvas, self.recipe.seed)

    def processor(self) -> Any:
        return make_processor(self.canvas)

    @classmethod
    def exam(cls, folder: Path, recipe: Recipe) -> dict[str, Any]:
        return exam(folder, recipe)

    @property
    def weights(self) -> Mapping[str, float]:
        return {"place": self.recipe.place}

    def losses(self, number: int) -> dict[str, Tensor]:
        """Cross-entropy of words, and how badly vision tokens name themselves."""
        rng = self.rng(number)
        probe = bool(rng.random() < at(self.recipe.probe, number / self.recipe.steps))
        batch = collate(self.task, self.drawn(rng), self.think, probe).to(self.device)
        logits, early = self._run(batch)
        learned = batch.labels[:, 1:] != IGNORED
        loss = F.cross_entropy(logits, batch.labels[:, 1:][learned])
        return {"loss": loss, "place": naming_loss(early, batch.named, self.model.lm_head.weight)}

    def _run(self, batch: Batch) -> tuple[Float[Tensor, "M V"], Float[Tensor, "B P D"]]:
        """Logits at every learned position, and early states of the prompt's vision tokens."""
        features = torch.stack(list(self.model.model.get_image_features(pixel_values=batch.pixels).pooler_output))
        words = self.model.get_input_embeddings()(batch.ids)
        index = batch.source.clamp(min=0)[..., None].expand(-1, -1, words.shape[-1])
        embeds = torch.where((batch.source >= 0)[..., None], features.gather(1, index), words)
        out = self.model.model.language_model(inputs_embeds=embeds, use_cache=False, output_hidden_states=True)
        learned = batch.labels[:, 1:] != IGNORED
        # The prompt's placeholders come first in every row; their number is the same.
        size = batch.named.shape[1]
        first = (batch.source >= 0).long().argmax(1)
        at = (first[:, None] + torch.arange(size, device=first.device))[..., None].expand(-1, -1, words.shape[-1])
        early = out.hidden_states[self.recipe.place_layer].gather(1, at)
        return self.model.lm_head(out.last_hidden_state[:, :-1][learned]).float(), early

    @cached_property
    def _held(self) -> tuple[Batch, Batch]:
        specs = self.held_out()
        chain, probe = (collate(self.task, specs, self.think, each).to(self.device) for each in (False, True))
        return chain, probe

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """On held-out items, all before given: shares of right words, boxes, chains, answers, and of things found."""
        chain, probe = self._held
        hit, learned = self._right(chain)
        labels = chain.labels[:, 1:]
        answers = torch.zeros_like(learned)
        answers[:, 1:] = labels[:, :-1] == _INDEX["answer:"]
        found, asked = self._right(probe)
        return {
            "words": _share(hit[learned]),
            "boxes": _share(_whole_boxes(hit, labels)),
            "chains": _share((hit | ~learned).all(1)),
            "answers": _share(hit[answers]),
            "finds": _share(found[asked]),
        }

    def _right(self, batch: Batch) -> tuple[Bool[Tensor, "B M"], Bool[Tensor, "B M"]]:
        """Which learned words are the most likely one, and which are learned at all."""
        logits, _ = self._run(batch)
        labels = batch.labels[:, 1:]
        learned = labels != IGNORED
        hit = learned.clone()
        hit[learned] = logits.argmax(-1) == labels[learned]
        return hit, learned


def _whole_boxes(hit: Bool[Tensor, "B M"], labels: Int[Tensor, "B M"]) -> Bool[Tensor, " boxes"]:
    """Whether the numbers of each box are right; they and their commas stand before its end."""
    ends = labels == _INDEX[BOX_END]
    whole = torch.ones_like(hit)
    for back in range(1, 8):
        whole[:, back:] &= hit[:, :-back]
    return whole[ends]


def _share(hit: Tensor) -> float:
    return round(float(hit.float().mean()), 4) if hit.numel() else 0.0


def exam(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What the finished model answers and where it looks by itself, item by item of the split test.

    Args:
        folder: the checkpoint.
        recipe: it was trained by.

    Returns:
        Accuracy with its interval; `boxes`, the share of hops that point at what they should, all of them and no other.
    """
    task, think = Run.world(recipe), hub.load("think", "boxes")
    specs = [task.spec("test", i) for i in range(recipe.exam_items)]
    longest = max(len(story(task, spec, think)[1]) for spec in specs) + _SLACK
    found = list(answered(folder, task, Routing(think={"name": "boxes"}), recipe.exam_items, longest))
    right = [
        [_near(box, hop.boxes[0]) for box, hop in zip(answer.boxes, sample.hops, strict=False)]
        + [False] * abs(len(answer.boxes) - len(sample.hops))
        for sample, answer in found
    ]
    pointed = [hit for row in right for hit in row]
    return {**accuracy(task, found), "boxes": round(sum(pointed) / len(pointed), 4)}


def _near(box: Sequence[float], wanted: Sequence[float]) -> bool:
    return max(abs(a - b) for a, b in zip(box, wanted, strict=True)) < 1e-3
