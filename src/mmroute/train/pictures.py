"""Trains a small Chameleon to draw its thoughts: `mmroute train backbone --recipe draw`; and examines one:

python -m mmroute.train.pictures src/mmroute/assets/draw --out results/drawn/frozenlake.json

Each hop of a text is the words of one listed action and the picture of what it leads to; then the answer. Pictures
enter and leave as codes of the exact atlas tokenizer, so no pixel is drawn in training. With `context: markov2` a text
shows the prompt's picture and the last one only, as MVoT's rows do, and teaches one hop.

Legend: B batch, N positions, V vocabulary.

Source: MVoT (arXiv 2501.07542): interleaved words and pictures, cross-entropy on both, token discrepancy on codes.
Deviates: from scratch instead of LoRA on Anole; no label smoothing; one text per trajectory where all pictures stay
    in view.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import typer
from jaxtyping import Int
from pydantic import Field
from torch import Tensor

from mmroute import hub
from mmroute.backbones.chameleon import BEGIN, END
from mmroute.backbones.load import load
from mmroute.bench.stats import wilson
from mmroute.config import options, parse, read_yaml, resolved
from mmroute.engine.attach import attach
from mmroute.errors import ConfigError
from mmroute.files import write_json
from mmroute.origin import origin_here
from mmroute.tasks._texts import PAD, VISION_END, VISION_START
from mmroute.tasks._visual import judge_drawings
from mmroute.tasks.base import Generated, Spec
from mmroute.train.discrepancy import code_distances, token_discrepancy
from mmroute.train.follow import Follower
from mmroute.train.loop import Journal, Optimisers, Progress, device_named, go_on, rate_at, refuse_old_run, save_state
from mmroute.train.picture_model import CODES, CUE, SEPARATOR, WORDS, Shape, build, write_folder
from mmroute.train.recipe import as_yaml, find_recipe, merge
from mmroute.train.tile_codes import TILE, picture

__all__ = ["Recipe", "Run", "draws", "story", "train_pictures"]

logger = logging.getLogger(__name__)

_IGNORED = -100
_BATCH = 50
_INDEX = {word: i for i, word in enumerate(WORDS)}


@options
class Recipe:
    """All that decides the weights, but for the seed."""

    family: Literal["chameleon"]
    """Tells this recipe from those of models that write words alone."""
    task: str = "frozenlake"
    preset: str = "nano"
    """Fixes the canvas; tiles without noise are read exactly."""
    prompt_order: Literal["image_first", "question_first"] = "question_first"
    """MVoT's order is the question first; then what a picture repeats stands at one distance before it."""
    context: Literal["accumulate", "markov2"] = "accumulate"
    """Which pictures a hop sees: all, or the prompt's and the last one."""
    model: Shape = Shape()
    steps: Annotated[int, Field(ge=1)] = 1200
    batch: Annotated[int, Field(ge=1)] = 16
    muon: Annotated[float, Field(gt=0)] = 8e-3
    """Peak rate of Muon, which trains the matrices."""
    adamw: Annotated[float, Field(gt=0)] = 3e-3
    """Peak rate of AdamW, which trains embeddings and norms."""
    warmup: Annotated[int, Field(ge=1)] = 40
    floor: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the peak at the end of the cosine."""
    discrepancy: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the token discrepancy beside cross-entropy."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    seed: Annotated[int, Field(ge=0)] = 0
    save_every: Annotated[int, Field(ge=1)] = 100
    eval_every: Annotated[int, Field(ge=1)] = 100
    """Steps between looks at held-out items, the words and pictures before given."""
    eval_items: Annotated[int, Field(ge=1)] = 48
    exam_items: Annotated[int, Field(ge=1)] = 200
    """Items of the split test that the finished model answers by itself."""


def _task(recipe: Recipe) -> Any:
    return hub.load("tasks", recipe.task, preset=recipe.preset, tile_px=TILE, prompt_order=recipe.prompt_order)


def draws(name: str) -> bool:
    """Whether a training recipe, by name or path, is one of these."""
    return read_yaml(find_recipe(name)).get("family") == "chameleon"


def story(task: Generated, spec: Spec) -> tuple[list[int], list[list[int]]]:
    """An item as token ids: its prompt, then its pieces: every hop with its picture, and the answer.

    Args:
        task: a world whose actions are listed, with one tile per cell.
        spec: one item.
    """
    words = task.words(spec, "cot")
    begin, end = words.prompt.index(VISION_START), words.prompt.index(VISION_END)
    drawn = [_picture(task, spec, hop) for hop in range(len(task.trace(spec)))]
    prompt = [*_ids(words.prompt[:begin]), *drawn[0], *_ids([*words.prompt[end + 1 : -1], CUE, SEPARATOR])]
    chain = task.chain(spec)
    hops = chain[len(chain) - (len(drawn) - 1) :]
    pieces = [[*_ids(hop[:2]), *codes] for hop, codes in zip(hops, drawn[1:], strict=True)]
    return prompt, [*pieces, _ids(words.response[sum(map(len, chain)) :])]


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
    labels = torch.full_like(ids, _IGNORED)
    for b, (given, learned) in enumerate(texts):
        end = len(given) + len(learned)
        ids[b, :end] = torch.tensor([*given, *learned])
        labels[b, len(given) : end] = ids[b, len(given) : end]
    return Batch(ids, labels)


class Run:
    """One training run in one folder: `state.safetensors`, `log.jsonl`, and at its end the model folder."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: str = "cpu",
        resume: bool = False,
        followers: Sequence[Follower] = (),
    ) -> None:
        """Opens the folder.

        Args:
            recipe: what to train; its seed too.
            out: folder of the run; made if missing.
            device: `cpu` or `cuda`.
            resume: go on from the folder's state; without a state it starts at the beginning.
            followers: who hears each line of the log.

        Raises:
            ConfigError: the device is missing, the world lists no actions, or the state belongs to another recipe.
            InputError: the folder holds a run and `resume` is off.
        """
        self.recipe, self.out, self.device = recipe, out, device_named(device)
        self.task: Generated = _task(recipe)
        if not hasattr(self.task, "moves"):
            raise ConfigError(
                f"task: {recipe.task} has no list of actions to draw; take frozenlake, maze or minibehavior"
            )
        self.canvas = self.task.preset.canvas
        self.model = build(recipe.model, self.canvas, recipe.seed).to(self.device)
        self.apart = code_distances(self.model.model.vqmodel)
        self.optimisers = Optimisers(self.model, recipe.weight_decay)
        self.state = out / "state.safetensors"
        refuse_old_run(self.state, resume)
        self.progress = go_on(self.state, self.model, self.optimisers, Progress(recipe=json.dumps(resolved(recipe))))
        self.journal = Journal(out / "log.jsonl", self.progress.log_bytes, followers)
        self._held: Batch | None = None

    def train(self, stop_after: int | None = None) -> Progress:
        """Runs the steps that are left.

        Args:
            stop_after: steps after which to return early, unsaved, as if killed; for tests.
        """
        started, before = time.process_time(), self.progress.cpu_s
        progress, recipe = self.progress, self.recipe
        self.journal.begin(progress.step, recipe.steps)
        while progress.step < recipe.steps and progress.step != stop_after:
            loss, apart = self.step(progress.step)
            progress.step += 1
            progress.cpu_s = round(before + time.process_time() - started, 1)
            self.journal.write(step=progress.step, loss=loss, discrepancy=apart, cpu_s=progress.cpu_s)
            over = progress.step == recipe.steps
            if over or progress.step % recipe.eval_every == 0:
                look = self.look()
                self.journal.write(step=progress.step, look=look, cpu_s=progress.cpu_s)
                logger.info("step %d: loss %.4f %s", progress.step, loss, look)
            if over or progress.step % recipe.save_every == 0:
                progress.log_bytes = self.journal.num_bytes
                save_state(self.state, self.model, self.optimisers, progress)
        return progress

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

    def batch(self, step: int) -> Batch:
        """The items of a step: a function of the seed and the step."""
        rng = np.random.default_rng([self.recipe.seed, step])
        specs = []
        for _ in range(self.recipe.batch):
            size = int(rng.choice(self.task.sizes))
            specs.append(self.task.stream(rng, size, int(rng.integers(1, self.task.max_length(size) + 1))))
        return collate(list(self.texts(specs, rng)))

    def step(self, number: int) -> tuple[float, float]:
        """One update. Returns cross-entropy and token discrepancy."""
        recipe = self.recipe
        logits, labels = self._logits(self.batch(number))
        loss = F.cross_entropy(logits, labels)
        codes = labels >= CODES
        apart = token_discrepancy(logits[codes][:, CODES:], labels[codes] - CODES, self.apart)
        (loss + recipe.discrepancy * apart).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip)
        share = rate_at(number, recipe.steps, recipe.warmup, recipe.floor)
        self.optimisers.step(share * recipe.muon, share * recipe.adamw)
        return round(loss.item(), 6), round(apart.item(), 6)

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """At every learned position, of all words: stock code hides those of codes."""
        ids, labels = batch.ids.to(self.device), batch.labels[:, 1:].to(self.device)
        h = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        learned = labels != _IGNORED
        return self.model.lm_head(h[learned]).float(), labels[learned]

    @torch.no_grad()
    def look(self) -> dict[str, float]:
        """On held-out items, all before given: shares of right codes, of pictures without a fault, of answers."""
        if self._held is None:
            specs = [self.task.spec("val", i) for i in range(self.recipe.eval_items)]
            self._held = collate(list(self.texts(specs, np.random.default_rng(1))))
        logits, labels = self._logits(self._held)
        hit, codes = logits.argmax(-1) == labels, labels >= CODES
        answers = labels.roll(1) == _INDEX["answer:"]
        whole = hit[codes].view(-1, self.canvas**2).all(1)
        return {
            "codes": round(float(hit[codes].float().mean()), 4),
            "pictures": round(float(whole.float().mean()), 4) if len(whole) else 0.0,
            "answers": round(float(hit[answers].float().mean()), 4) if bool(answers.any()) else 0.0,
        }


def exam(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What the finished model answers and draws by itself, item by item of the split test.

    Args:
        folder: the checkpoint.
        recipe: it was trained by.

    Returns:
        Accuracy with its interval; `v_acc`, `v_red`, `v_ratio` as `tasks._visual` defines them, means over items.
    """
    task = _task(recipe)
    think = hub.load("think", "image", context=recipe.context)
    samples = list(task.samples("test", recipe.exam_items))
    longest = (task.preset.canvas**2 + 4) * (task.preset.hops[1] + 1)
    right, drawn = 0, []
    with attach(load(folder, dtype=torch.float32)) as routed:
        for start in range(0, len(samples), _BATCH):
            part = samples[start : start + _BATCH]
            chats = [task.messages(sample, think.style) for sample in part]
            for sample, answer in zip(
                part, routed.answer_many(chats, think=think, max_new_tokens=longest), strict=True
            ):
                right += task.score(sample, answer.text).correct == 1
                pictures = [picture([token - CODES for token in each]) for each in answer.pictures]
                drawn.append(judge_drawings(task, Spec.from_dict(sample.meta["spec"]), pictures[: len(sample.hops)]))
    n = len(samples)
    return {
        "n": n,
        "accuracy": round(right / n, 4),
        "ci95": [round(bound, 4) for bound in wilson(right, n)],
        **{name: round(sum(getattr(each, name) for each in drawn) / n, 4) for name in ("v_acc", "v_red", "v_ratio")},
        "chance": task.card.chance,
    }


def train_pictures(
    name: str,
    changes: dict[str, Any],
    out: Path,
    device: str = "cpu",
    resume: bool = False,
    followers: Sequence[Follower] = (),
) -> Path:
    """Trains what a recipe says, examines it, and writes the checkpoint folder `out/model`.

    Args:
        name: of a shipped recipe, or a path.
        changes: laid over it.
        out: folder of the run.
        device: `cpu` or `cuda`.
        resume: go on from the state in `out`.
        followers: who hears each line of the log.

    Returns:
        The checkpoint folder.

    Raises:
        ConfigError, InputError: see `Run`, or a value that the recipe does not allow.
        MmrouteError: the disk is full; the last state is intact.
    """
    recipe = parse(Recipe, merge(read_yaml(find_recipe(name)), changes), "recipe")
    origin = origin_here()
    run = Run(recipe, out, device, resume, followers)
    progress = run.train()
    results = {
        **origin,
        "device": device,
        "steps": progress.step,
        "cpu_s": progress.cpu_s,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "decoding": "greedy, drawn thoughts, weights as stored (bf16), computed in fp32",
        "preset": recipe.preset,
        "split": "test",
    }
    folder, text = out / "model", as_yaml(resolved(recipe))
    write_folder(folder, run.model, run.canvas, text, results)
    results["tasks"] = {recipe.task: exam(folder, recipe)}
    write_folder(folder, run.model, run.canvas, text, results)
    return folder


def main(
    folder: Path,
    out: Annotated[Path, typer.Option(help="Result file.")],
    items: Annotated[int, typer.Option(help="Items of the split test.")] = 200,
) -> None:
    """Examines a checkpoint folder that this trainer wrote, by the recipe in it."""
    recipe = parse(Recipe, {**read_yaml(folder / "recipe.yaml"), "exam_items": items}, "recipe")
    results = {
        "schema": "drawn/1",
        **origin_here("python -m mmroute.train.pictures"),
        "preset": recipe.preset,
        "split": "test",
        "context": recipe.context,
        "decoding": "greedy, drawn thoughts, weights as stored (bf16), computed in fp32",
        "tasks": {recipe.task: exam(folder, recipe)},
    }
    write_json(out, results)


if __name__ == "__main__":
    typer.run(main)
