"""Trains a small stock model from scratch on stories, in one phase: what `pictures.py` and `boxes.py` share.

A story is a prompt and the right chain, with pictures or image features among its words (`stories.py`). All that a step
draws comes from the seed and the step, so a killed run goes on as if it had not been (`loop.py`).
"""

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mmroute import hub
from mmroute.backbones.load import load
from mmroute.bench.items import Prompts, relevance
from mmroute.bench.stats import wilson
from mmroute.config import options, parse, read_yaml, resolved
from mmroute.origin import origin_here
from mmroute.processes import device_named
from mmroute.reason import Answer
from mmroute.recipe import Recipe, equip
from mmroute.tasks.base import Generated, Sample, Spec
from mmroute.train.folder import copy_weights, write_stock
from mmroute.train.follow import Follower
from mmroute.train.loop import Journal, Optimisers, Progress, go_on, rate_at, refuse_old_run, save_state
from mmroute.train.recipe import as_yaml, find_recipe, merge

__all__ = ["DECODING", "ScratchRecipe", "ScratchRun", "accuracy", "answered", "family_of", "train_scratch"]

logger = logging.getLogger(__name__)

DECODING = "greedy, weights as stored (bf16), computed in fp32"
"""How finished models are examined."""
_BATCH = 50


@options
class ScratchRecipe:
    """What every recipe of this kind says; a trainer adds its model and its losses."""

    family: str
    """Tells which trainer's recipe it is."""
    task: str
    preset: str = "nano"
    """Fixes the canvas."""
    prompt_order: Literal["image_first", "question_first"] = "image_first"
    start: str | None = None
    """Bundled name or folder of a checkpoint of the same shape, to begin with its weights; fresh ones if not given."""
    steps: Annotated[int, Field(ge=1)] = 1200
    batch: Annotated[int, Field(ge=1)] = 16
    muon: Annotated[float, Field(gt=0)] = 8e-3
    """Peak rate of Muon, which trains the matrices."""
    adamw: Annotated[float, Field(gt=0)] = 3e-3
    """Peak rate of AdamW, which trains embeddings and norms."""
    warmup: Annotated[int, Field(ge=1)] = 40
    floor: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the peak at the end of the cosine."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    seed: Annotated[int, Field(ge=0)] = 0
    save_every: Annotated[int, Field(ge=1)] = 100
    eval_every: Annotated[int, Field(ge=1)] = 100
    """Steps between looks at held-out items, the words before given."""
    eval_items: Annotated[int, Field(ge=1)] = 48
    exam_items: Annotated[int, Field(ge=1)] = 200
    """Items of the split test that the finished model answers by itself."""


R = TypeVar("R", bound=ScratchRecipe)


def family_of(name: str) -> str | None:
    """The family that a training recipe, by name or path, names; None for those of `backbone.py`, which name none."""
    return read_yaml(find_recipe(name)).get("family")


class ScratchRun(ABC, Generic[R]):
    """One training run in one folder: `state.safetensors`, `log.jsonl`, and at its end the model folder."""

    recipe_type: ClassVar[type]
    tile_px: ClassVar[int]
    """Pixels of one side of a tile, one image token each."""

    def __init__(
        self,
        recipe: R,
        out: Path,
        device: str = "cpu",
        resume: bool = False,
        followers: Sequence[Follower] = (),
    ) -> None:
        """Opens the folder.

        Args:
            recipe: what to train; its seed too.
            out: folder of the run; made if missing.
            device: `cpu`, `cuda` or `auto`.
            resume: go on from the folder's state; without a state it starts at the beginning.
            followers: who hears each line of the log.

        Raises:
            ConfigError: the device is missing, the world does not fit, or the state belongs to another recipe.
            InputError: the folder holds a run and `resume` is off.
        """
        self.recipe, self.out, self.device = recipe, out, device_named(device)
        self.task: Generated = self.world(recipe)
        self.canvas = self.task.preset.canvas
        self.model = self.build()
        if recipe.start is not None:
            copy_weights(recipe.start, self.model)
        self.model.to(self.device)
        self.optimisers = Optimisers(self.model, recipe.weight_decay)
        self.state = out / "state.safetensors"
        refuse_old_run(self.state, resume)
        self.progress = go_on(self.state, self.model, self.optimisers, Progress(recipe=json.dumps(resolved(recipe))))
        self.journal = Journal(out / "log.jsonl", self.progress.log_bytes, followers)

    # ------------------------------------------------------------------ what a trainer fills in

    @abstractmethod
    def build(self) -> Any:
        """The stock model with fresh weights, in fp32."""

    @abstractmethod
    def losses(self, number: int) -> dict[str, Tensor]:
        """The losses of a step, by name; the first one's weight is 1."""

    @property
    @abstractmethod
    def weights(self) -> Mapping[str, float]:
        """Weights of the other losses."""

    @abstractmethod
    def look(self) -> dict[str, float]:
        """On held-out items, all before given: what is right, as shares."""

    @abstractmethod
    def processor(self) -> Any:
        """The stock processor of the finished model."""

    @classmethod
    @abstractmethod
    def exam(cls, folder: Path, recipe: R) -> dict[str, Any]:
        """What the finished model answers by itself, item by item of the split test."""

    # ------------------------------------------------------------------ what all do

    @classmethod
    def world(cls, recipe: ScratchRecipe) -> Any:
        """The world that a recipe names."""
        return hub.load(
            "tasks", recipe.task, preset=recipe.preset, tile_px=cls.tile_px, prompt_order=recipe.prompt_order
        )

    def train(self, stop_after: int | None = None) -> Progress:
        """Runs the steps that are left.

        Args:
            stop_after: steps after which to return early, unsaved, as if killed; for tests.
        """
        started, before = time.process_time(), self.progress.cpu_s
        progress, recipe = self.progress, self.recipe
        self.journal.begin(progress.step, recipe.steps)
        while progress.step < recipe.steps and progress.step != stop_after:
            losses = self.step(progress.step)
            progress.step += 1
            progress.cpu_s = round(before + time.process_time() - started, 1)
            self.journal.write(step=progress.step, **losses, cpu_s=progress.cpu_s)
            over = progress.step == recipe.steps
            if over or progress.step % recipe.eval_every == 0:
                look = self.look()
                self.journal.write(step=progress.step, look=look, cpu_s=progress.cpu_s)
                logger.info("step %d: %s %s", progress.step, losses, look)
            if over or progress.step % recipe.save_every == 0:
                progress.log_bytes = self.journal.num_bytes
                save_state(self.state, self.model, self.optimisers, progress)
        return progress

    def step(self, number: int) -> dict[str, float]:
        """One update. Returns the losses."""
        recipe, losses = self.recipe, self.losses(number)
        total = torch.stack([self.weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        share = rate_at(number, recipe.steps, recipe.warmup, recipe.floor)
        self.optimisers.step(share * recipe.muon, share * recipe.adamw)
        return {name: round(loss.item(), 6) for name, loss in losses.items()}

    def rng(self, number: int) -> np.random.Generator:
        """What a step draws from: a function of the seed and the step."""
        return np.random.default_rng([self.recipe.seed, number])

    def drawn(self, rng: np.random.Generator) -> list[Spec]:
        """The items of a step."""
        specs = []
        for _ in range(self.recipe.batch):
            size = int(rng.choice(self.task.sizes))
            specs.append(self.task.stream(rng, size, int(rng.integers(1, self.task.max_length(size) + 1))))
        return specs

    def held_out(self) -> list[Spec]:
        """The items that `look` looks at."""
        return [self.task.spec("val", i) for i in range(self.recipe.eval_items)]


def train_scratch(
    kind: type[ScratchRun[Any]],
    name: str,
    changes: dict[str, Any],
    out: Path,
    device: str = "cpu",
    resume: bool = False,
    followers: Sequence[Follower] = (),
) -> Path:
    """Trains what a recipe says, examines it, and writes the checkpoint folder `out/model`.

    Args:
        kind: the trainer.
        name: of a shipped recipe, or a path.
        changes: laid over it.
        out: folder of the run.
        device: `cpu`, `cuda` or `auto`.
        resume: go on from the state in `out`.
        followers: who hears each line of the log.

    Returns:
        The checkpoint folder.

    Raises:
        ConfigError, InputError: see `ScratchRun`, or a value that the recipe does not allow.
        MmrouteError: the disk is full; the last state is intact.
    """
    recipe: Any = parse(kind.recipe_type, merge(read_yaml(find_recipe(name)), changes), "recipe")
    origin = origin_here()
    run = kind(recipe, out, device, resume, followers)
    progress = run.train()
    results: dict[str, Any] = {
        **origin,
        "device": run.device.type,
        "steps": progress.step,
        "cpu_s": progress.cpu_s,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "decoding": DECODING,
        "preset": recipe.preset,
        "split": "test",
    }
    folder, text = out / "model", as_yaml(resolved(recipe))
    write_stock(folder, run.model, run.processor(), text, results)
    results["tasks"] = {recipe.task: kind.exam(folder, recipe)}
    write_stock(folder, run.model, run.processor(), text, results)
    return folder


def answered(
    folder: Path, task: Generated, routing: Recipe, items: int, longest: int
) -> Iterator[tuple[Sample, Answer]]:
    """Items of the split test with what a checkpoint answers by itself, in fp32.

    Args:
        folder: the checkpoint.
        task: asks.
        routing: how it is routed and thinks.
        items: how many.
        longest: tokens after which an answer is cut.
    """
    samples = list(task.samples("test", items))
    with equip(load(folder, dtype=torch.float32), routing) as (routed, think):
        for asked in Prompts(samples, _BATCH).batches(routed, task, think):
            known = relevance(routed, asked.samples, asked.batch)
            answers = routed.answer_many(
                asked.chats, think=think, max_new_tokens=longest, relevance=known, prepared=asked.batch
            )
            yield from zip(asked.samples, answers, strict=True)


def accuracy(task: Generated, found: Sequence[tuple[Sample, Answer]]) -> dict[str, Any]:
    """Share of right answers with its 95 % interval, beside chance."""
    right = sum(task.score(sample, answer.text).correct == 1 for sample, answer in found)
    return {
        "n": len(found),
        "accuracy": round(right / len(found), 4),
        "ci95": [round(bound, 4) for bound in wilson(right, len(found))],
        "chance": task.card.chance,
    }
