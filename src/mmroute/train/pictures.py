"""Trains a small Chameleon to draw its thoughts: `mmroute train backbone --recipe draw`; and examines one:

python -m mmroute.train.pictures src/mmroute/assets/draw --recipe dare-image --out results/drawn/pictures/dare.json

Each hop of a text is the words of one listed action and the picture of what it leads to; then the answer. Pictures
enter and leave as codes of the exact atlas tokenizer, so no pixel is drawn in training. With `context: markov2` a text
shows the prompt's picture and the last one only, as MVoT's rows do, and teaches one hop.

Legend: B batch, N positions, V vocabulary.

Source: MVoT (arXiv 2501.07542): interleaved words and pictures, cross-entropy on both, token discrepancy on codes.
Deviates: from scratch instead of LoRA on Anole; no label smoothing; one text per trajectory where all pictures stay
    in view.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
import typer
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from mmroute import recipe as recipes
from mmroute.backbones.chameleon import BEGIN, END
from mmroute.bench.stats import wilson
from mmroute.config import options, parse, read_yaml
from mmroute.cost import keep_shares
from mmroute.errors import ConfigError
from mmroute.files import write_json
from mmroute.origin import origin_here
from mmroute.recipe import Recipe as Routing
from mmroute.tasks._texts import PAD, VISION_END, VISION_START
from mmroute.tasks._visual import judge_drawings
from mmroute.tasks.base import Generated, Spec
from mmroute.train.discrepancy import code_distances, token_discrepancy
from mmroute.train.naming import IGNORED
from mmroute.train.picture_model import CODES, CUE, SEPARATOR, WORDS, Shape, build, make_processor
from mmroute.train.scratch import DECODING, ScratchRecipe, ScratchRun, accuracy, answered
from mmroute.train.stories import drawn
from mmroute.train.tile_codes import TILE, picture

__all__ = ["Recipe", "Run", "exam", "story"]

_INDEX = {word: i for i, word in enumerate(WORDS)}


@options
class Recipe(ScratchRecipe):
    """All that decides the weights, but for the seed."""

    family: Literal["chameleon"]
    task: str = "frozenlake"
    prompt_order: Literal["image_first", "question_first"] = "question_first"
    """MVoT's order is the question first; then what a picture repeats stands at one distance before it."""
    context: Literal["accumulate", "markov2"] = "accumulate"
    """Which pictures a hop sees: all, or the prompt's and the last one."""
    model: Shape = Shape()
    discrepancy: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the token discrepancy beside cross-entropy."""


def story(task: Generated, spec: Spec) -> tuple[list[int], list[list[int]]]:
    """An item as token ids: its prompt, then its pieces: every hop with its picture, and the answer.

    Args:
        task: a world whose actions are listed, with one tile per cell.
        spec: one item.
    """
    words = task.words(spec, "cot")
    begin, end = words.prompt.index(VISION_START), words.prompt.index(VISION_END)
    first = _picture(task, spec, 0)
    prompt = [*_ids(words.prompt[:begin]), *first, *_ids([*words.prompt[end + 1 : -1], CUE, SEPARATOR])]
    pieces = drawn(task, spec)
    shown = [[] if piece.state is None else _picture(task, spec, piece.state) for piece in pieces]
    return prompt, [[*_ids(piece.words), *codes] for piece, codes in zip(pieces, shown, strict=True)]


def _ids(words: Sequence[str]) -> list[int]:
    return [_INDEX[word] for word in words]


def _picture(task: Generated, spec: Spec, hop: int) -> list[int]:
    return [_INDEX[BEGIN], *(CODES + int(code) for code in task.codes(spec, hop).reshape(-1)), _INDEX[END]]


@dataclass(frozen=True)
class Batch:
    """Texts padded on their right."""

    ids: Int[Tensor, "B N"]
    labels: Int[Tensor, "B N"]
    """What stands at this column where it is learned, else -100."""


def collate(texts: Sequence[tuple[list[int], list[int]]]) -> Batch:
    """Texts as one batch; of each, what is given and what is learned."""
    width = max(len(given) + len(learned) for given, learned in texts)
    ids = torch.full((len(texts), width), _INDEX[PAD])
    labels = torch.full_like(ids, IGNORED)
    for b, (given, learned) in enumerate(texts):
        end = len(given) + len(learned)
        ids[b, :end] = torch.tensor([*given, *learned])
        labels[b, len(given) : end] = ids[b, len(given) : end]
    return Batch(ids, labels)


class Run(ScratchRun[Recipe]):
    """Trains one model that draws."""

    recipe_type: ClassVar[type] = Recipe
    tile_px: ClassVar[int] = TILE

    @classmethod
    def world(cls, recipe: ScratchRecipe) -> Generated:
        """
        Raises:
            ConfigError: it lists no actions.
        """
        task = super().world(recipe)
        if not hasattr(task, "moves"):
            raise ConfigError(
                f"task: {recipe.task} has no list of actions to draw; take frozenlake, maze or minibehavior"
            )
        return task

    def build(self) -> Any:
        return build(self.recipe.model, self.canvas, self.recipe.seed)

    def processor(self) -> Any:
        return make_processor(self.canvas)

    @classmethod
    def exam(cls, folder: Path, recipe: Recipe) -> dict[str, Any]:
        return exam(folder, recipe)

    @cached_property
    def apart(self) -> Tensor:
        """Distances of all codes to each other."""
        return code_distances(self.model.model.vqmodel)

    def texts(self, specs: Sequence[Spec], rng: np.random.Generator) -> Iterator[tuple[list[int], list[int]]]:
        """What is given and what is learned of each item; one hop of it where only the last picture is seen."""
        for spec in specs:
            prompt, pieces = story(self.task, spec)
            if self.recipe.context == "accumulate":
                yield prompt, [token for piece in pieces for token in piece]
            else:
                hop = int(rng.integers(len(pieces)))
                before = [token for piece in pieces[:hop] for token in piece[:2]]
                shown = pieces[hop - 1][2:] if hop else []
                yield [*prompt, *before, *shown], pieces[hop]

    @property
    def weights(self) -> Mapping[str, float]:
        return {"discrepancy": self.recipe.discrepancy}

    def losses(self, number: int) -> dict[str, Tensor]:
        """Cross-entropy of words and codes, and token discrepancy of codes."""
        rng = self.rng(number)
        logits, labels = self._logits(collate(list(self.texts(self.drawn(rng), rng))))
        codes = labels >= CODES
        apart = token_discrepancy(logits[codes][:, CODES:], labels[codes] - CODES, self.apart)
        return {"loss": F.cross_entropy(logits, labels), "discrepancy": apart}

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """At every learned position, of all words: stock code hides those of codes."""
        ids, labels = batch.ids.to(self.device), batch.labels[:, 1:].to(self.device)
        h = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        learned = labels != IGNORED
        return self.model.lm_head(h[learned]).float(), labels[learned]

    @cached_property
    def _held(self) -> Batch:
        return collate(list(self.texts(self.held_out(), np.random.default_rng(1))))

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """On held-out items, all before given: shares of right codes, of pictures without a fault, of answers."""
        logits, labels = self._logits(self._held)
        hit, codes = logits.argmax(-1) == labels, labels >= CODES
        answers = labels.roll(1) == _INDEX["answer:"]
        whole = hit[codes].view(-1, self.canvas**2).all(1)
        return {
            "codes": round(float(hit[codes].float().mean()), 4),
            "pictures": round(float(whole.float().mean()), 4) if len(whole) else 0.0,
            "answers": round(float(hit[answers].float().mean()), 4) if bool(answers.any()) else 0.0,
        }


def exam(folder: Path, recipe: Recipe, routing: Routing | None = None) -> dict[str, Any]:
    """What the finished model answers and draws by itself, item by item of the split test.

    Args:
        folder: the checkpoint.
        recipe: it was trained by.
        routing: how it is routed; unrouted if None. It sees the pictures that it was trained to see.

    Returns:
        Accuracy with its interval; `v_acc`, `v_red`, `v_ratio` as `tasks._visual` defines them, means over items;
        `drawn_right`, the share of items without a fault in any picture, with its interval; `keep`, the shares of
        vision and text positions that ran, over all layers.

    Raises:
        ConfigError: the routing thinks in something else than pictures.
    """
    task = Run.world(recipe)
    asked = routing or Routing(think={"name": "image"})
    if (asked.think or {}).get("name") != "image":
        raise ConfigError(
            f"recipe {asked.name} draws nothing to judge; take one with think.name image, or add --set think.name=image"
        )
    asked = replace(asked, think={**(asked.think or {}), "context": recipe.context})
    longest = (task.preset.canvas**2 + 4) * (task.preset.hops[1] + 1)
    found = list(answered(folder, task, asked, recipe.exam_items, longest))
    judged = []
    for sample, answer in found:
        pictures = [picture([token - CODES for token in each]) for each in answer.pictures]
        judged.append(judge_drawings(task, Spec.from_dict(sample.meta["spec"]), pictures[: len(sample.hops)]))
    means = {
        name: round(sum(getattr(each, name) for each in judged) / len(judged), 4)
        for name in ("v_acc", "v_red", "v_ratio")
    }
    right = sum(each.v_steps == each.hops for each in judged)
    shares = [keep_shares(answer.trace) for _, answer in found]
    return {
        **accuracy(task, found),
        **means,
        "drawn_right": round(right / len(judged), 4),
        "drawn_right_ci95": [round(bound, 4) for bound in wilson(right, len(judged))],
        "keep": {name: round(fmean(share[name] for share in shares), 4) for name in ("vision", "text")},
    }


def main(
    folder: Path,
    out: Annotated[Path, typer.Option(help="Result file.")],
    items: Annotated[int, typer.Option(help="Items of the split test.")] = 200,
    recipe: Annotated[str, typer.Option(help="How it is routed: name or .yaml file.")] = "image",
    set_: Annotated[list[str] | None, typer.Option("--set", help="path=value for --recipe; repeatable.")] = None,
) -> None:
    """Examines a checkpoint folder that this trainer wrote, by the recipe in it."""
    routing = recipes.read(recipe, set_)
    trained_by = parse(Recipe, {**read_yaml(folder / "recipe.yaml"), "exam_items": items}, "recipe")
    results = {
        "schema": "drawn/1",
        **origin_here("python -m mmroute.train.pictures"),
        "recipe": routing.name,
        "prune": routing.prune,
        "trained": routing.trained or "none",
        "preset": trained_by.preset,
        "split": "test",
        "context": trained_by.context,
        "decoding": DECODING,
        "tasks": {trained_by.task: exam(folder, trained_by, routing)},
    }
    write_json(out, results)


if __name__ == "__main__":
    typer.run(main)
