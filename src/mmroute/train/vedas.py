"""Teaches a model to think in latents: `mmroute train vedas --recipe latent`.

A run is a list of stages. In each, the first groups of a written rationale are replaced by latent steps; what is left
is written. A stage may supervise each latent with the state it stands for, through the model's own head, and a later
one take that away. The backbone must be able to write the rationale before.

Legend: B batch, D hidden, K copies of image tokens.

Source: Vedas (arXiv 2604.10500), curriculum and loss of section 3; Coconut's multi-stage training.
Deviates: supervised latents (`supervise`), states in place of sentences (`steps: states`) and gated stages are ours,
    after trials in which the printed curriculum stayed at chance; gradient runs through all latents (`latent_grad:
    full`), the release cuts it; one number of latents for all rows of a step, so that nothing is padded.
"""

import json
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from mmroute import recipe as recipes
from mmroute.bench.items import load_task
from mmroute.bench.schema import commit_of_source
from mmroute.cache import Chunk, RaggedCache
from mmroute.config import options, overrides, parse, read_yaml
from mmroute.engine.attach import Routed, attach
from mmroute.engine.controller import MAX_HOPS
from mmroute.errors import ConfigError, InputError
from mmroute.rollout import Edit, Rollout, start
from mmroute.tasks.base import Generated, Spec
from mmroute.think.base import Thought
from mmroute.train.coherence import TokenSR, coherence_loss
from mmroute.train.delta import save_delta
from mmroute.train.examples import IGNORED
from mmroute.train.follow import Follower
from mmroute.train.lessons import Lesson, Teacher
from mmroute.train.loop import Journal, Optimisers, Progress, load_state, rate_at, replacing, save_state
from mmroute.train.recipe import SHIPPED, Ramp, as_yaml, at, find_recipe, merge
from mmroute.train.steps import Splitter
from mmroute.train.tuning import Tuning

__all__ = ["Stage", "TrainConfig", "VedasRun", "read_recipe", "train_vedas"]

logger = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


@options
class Stage:
    """One stretch of the curriculum."""

    name: str
    steps: Annotated[int, Field(ge=1)] | None = None
    """Updates at most."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """In place of `steps`, passes over `epoch_items` items."""
    latents: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """Groups that latents replace, from the first."""
    keep_last: bool = False
    """Leave every item its last group, however short it is."""
    mix: Share = 0.0
    """Share of the steps that replace fewer groups, any number of them alike."""
    written: Share = 0.2
    """Rows of whole written chains under their own cue, as a share of the others."""
    supervise: Ramp = ((0.0, 0.0),)
    """Weight of the loss that reads each latent's state through the head, over the stage."""
    muon: Rate = 2e-3
    """Peak rate of the backbone's matrices under `full`."""
    adamw: Rate = 7e-4
    """Peak rate of the rest under `full`, of everything under `lora`."""
    new: Rate = 1e-3
    """Peak rate of routers, step vectors, placeholders and the network of the closer look."""
    warmup: Annotated[int, Field(ge=1)] = 20
    floor: Share = 0.05
    """Share of the peak at the end of the cosine."""
    reset_optimizer: bool = True
    until: Share | None = None
    """The stage ends as soon as held-out items are this accurate; looked at every `gate_every` steps."""
    on_cap: Literal["go_on", "stop"] = "go_on"
    """What to do when `until` is not met by the end: go on, or end the run at the last stage that met its own."""


@options
class TrainConfig:
    """The `train` section of a recipe."""

    tasks: dict[str, Annotated[float, Field(gt=0)]]
    """Weight of each world, `name` or `name:preset`."""
    stages: Annotated[list[Stage], Field(min_length=1)]
    batch: Annotated[int, Field(ge=1)] = 32
    epoch_items: Annotated[int, Field(ge=0)] = 0
    """Items of one epoch, for stages that count in epochs."""
    steps: Literal["states", "chain"] = "states"
    """What a rationale consists of: the words that name a state, each a group, or the whole steps."""
    groups: Annotated[int, Field(ge=1)] | None = None
    """Merge the steps to at most this many groups; S in the paper."""
    splitter: Splitter = "given"
    """How a rationale in plain English is cut into steps."""
    latents_per_group: Annotated[int, Field(ge=1)] = 1
    """Latent steps that replace a group; the last of them is supervised."""
    latent_grad: Annotated[str, Field(pattern=r"^(full|none|truncated:\d+)$")] = "full"
    """How far gradients run back through latents: all steps, none, or the last n (`truncated:n`)."""
    recon_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the closer look; 1.0 in the paper up to 3B, 0.2 at 7B."""
    window_share: Share = 0.3
    """Side of its window as a share of the grid's."""
    window_cells: tuple[int, int] | None = None
    """Rows and columns of the window in place of a share."""
    backbone: Literal["full", "lora", "frozen"] = "full"
    embeddings: bool = True
    """Under `full`, train the word embeddings too."""
    lora_rank: Annotated[int, Field(ge=1)] = 64
    lora_alpha: Annotated[int, Field(ge=1)] = 16
    lora_targets: str = "qkvogud"
    """First letters of the projections with adapters."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Rate = 1.0
    """Largest norm of the gradient."""
    seed: Annotated[int, Field(ge=0)] = 0
    save_every: Annotated[int, Field(ge=1)] = 100
    gate_every: Annotated[int, Field(ge=1)] = 50
    eval_every: Annotated[int, Field(ge=1)] = 100
    eval_items: Annotated[int, Field(ge=1)] = 96
    """Held-out items per task at each look."""

    def length(self, stage: Stage) -> int:
        """Steps of a stage at most.

        Raises:
            ConfigError: it names neither steps nor epochs, or both, or epochs of nothing.
        """
        if (stage.steps is None) == (stage.epochs is None) or (stage.epochs and not self.epoch_items):
            raise ConfigError(
                f"stage {stage.name}: give either steps or epochs, and epoch_items with the latter (given "
                f"{stage.steps}, {stage.epochs}, {self.epoch_items})"
            )
        return stage.steps or math.ceil(stage.epochs * self.epoch_items / self.batch)  # type: ignore[operator]


def read_recipe(name: str, sets: list[str] | None = None) -> recipes.Recipe:
    """A training recipe by its shipped name or a path, with `--set` changes; stages are addressed by index.

    Raises:
        ConfigError: no such recipe, or a value that it does not allow.
    """
    changes = overrides(sets or [])
    data = merge(read_yaml(find_recipe(name, SHIPPED / "vedas")), changes)
    if "tasks" in (changes.get("train") or {}):
        data["train"]["tasks"] = changes["train"]["tasks"]  # other tasks, not further ones
    recipe = parse(recipes.Recipe, {"name": Path(name).stem, **data}, f"recipe {name}")
    for kind in ("prune", "deepen", "think"):
        recipe.build(kind)  # a wrong option is reported before a model is loaded
    return recipe


def train_vedas(
    recipe: recipes.Recipe, model: Any, out: Path, resume: bool = False, followers: Sequence[Follower] = ()
) -> Path:
    """Trains what a recipe says and writes `out/latent`: routers and other parts, and the backbone's new weights.

    Args:
        recipe: thinks in latents and has a `train` section.
        model: a loaded stock model with its processor; its weights are put back at the end.
        out: folder of the run.
        resume: go on from the state in `out`.
        followers: who hears each line of the log.

    Returns:
        The folder that a recipe's `trained` takes.

    Raises:
        ConfigError: the recipe cannot be trained so, or the folder's state belongs to another one.
        InputError: the folder holds a run and `resume` is off.
    """
    commit, dirty = commit_of_source()
    with VedasRun(recipe, model, out, resume, followers) as run:
        run.train()
        results = {
            "command": "mmroute " + " ".join(sys.argv[1:]),
            "commit": commit,
            "dirty": dirty,
            "base": Path(model.name_or_path).name,
            "device": model.device.type,
            "steps": run.progress.step,
            "cpu_s": run.progress.cpu_s,
            "held_out": "split val, answer and all that is written right, as inference thinks; by number of groups",
            "tasks": run.look(4 * run.config.eval_items),
        }
        return run.write(results)


@dataclass
class Worked:
    """What one pass over a lesson gave."""

    answer: Tensor
    """Cross-entropy of what is written."""
    supervised: Tensor
    """Cross-entropy of the states that latents stand for; 0 where none does."""
    coherence: Tensor
    right: list[bool]
    """[row]: whether every written word is the most likely one."""
    states_right: float
    """Share of the supervised latents whose state the head reads off."""


class VedasRun:
    """One run in one folder: `state.safetensors`, `log.jsonl`, and at its end `latent`."""

    def __init__(
        self,
        recipe: recipes.Recipe,
        model: Any,
        out: Path,
        resume: bool = False,
        followers: Sequence[Follower] = (),
    ) -> None:
        """Opens the folder and attaches the model; see `train_vedas`. Use it as a context manager."""
        think = recipe.build("think")
        if recipe.train is None or think.style != "latent":
            raise ConfigError(
                f"recipe {recipe.name}: training latents needs think.name coconut, ivtlr, vedas or pause, and a "
                "section `train`"
            )
        self.recipe, self.out, self.think = recipe, out, think
        self.config = c = parse(TrainConfig, recipe.train, "train")
        self.lengths = [c.length(stage) for stage in c.stages]
        self.state = out / "state.safetensors"
        if self.state.exists() and not resume:
            raise InputError(f"{out} holds a run already; add --resume to go on with it, or give another --out")
        self.tasks: dict[str, Generated] = {}
        for name in c.tasks:
            task = load_task(name)
            if not isinstance(task, Generated):
                raise ConfigError(f"train.tasks: {name} is no generated world; those know the right chains")
            self.tasks[name] = task
        self.model, self._stack = model, ExitStack()
        self.tuning = Tuning(model, c.backbone, c.lora_rank, c.lora_alpha, c.lora_targets, c.seed, c.embeddings)
        self._stack.callback(self.tuning.restore)
        try:
            parts = {"prune": recipe.build("prune"), "deepen": recipe.build("deepen"), "think": think}
            self.routed: Routed = attach(model, prefix_tokens=recipe.prefix_tokens, executor="physical", **parts)
            self._stack.callback(self.routed.detach)
            hidden = self.routed.controller.shape.hidden
            self.sr = TokenSR(hidden, c.seed).to(model.device) if c.recon_weight else None
            self.learners = _Learners(model, self.routed.parts, self.sr, c)
            self.teacher = Teacher(self.routed, think, c.steps, c.groups, c.splitter)
            self.progress = Progress(recipe=json.dumps(asdict(replace(recipe, trained=None))))
            if resume and self.state.exists():
                saved = load_state(self.state, model, self.learners)  # type: ignore[arg-type]
                if saved.recipe != self.progress.recipe:
                    raise ConfigError(f"{out} was started with another recipe; give the same one, or another --out")
                self.progress = saved
            self.journal = Journal(out / "log.jsonl", self.progress.log_bytes, followers)
        except BaseException:
            self._stack.close()
            raise
        self._held: dict[tuple[str, int], list[list[tuple[Generated, Spec]]]] = {}

    def __enter__(self) -> "VedasRun":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    # ------------------------------------------------------------------ the loop

    @property
    def stage(self) -> Stage:
        return self.config.stages[min(self.progress.phase, len(self.config.stages) - 1)]

    def train(self, stop_after: int | None = None) -> Progress:
        """Runs the stages that are left.

        Args:
            stop_after: steps after which to return early, unsaved, as if killed; for tests.
        """
        started, before = time.process_time(), self.progress.cpu_s
        progress, c = self.progress, self.config
        self.journal.begin(progress.step, sum(self.lengths))
        while not progress.finished:
            if progress.phase_step == 0 and self.stage.reset_optimizer:
                self.learners.reset()
            entry = self.step()
            progress.step += 1
            progress.phase_step += 1
            progress.cpu_s = round(before + time.process_time() - started, 1)
            self.journal.write(step=progress.step, stage=self.stage.name, **entry, cpu_s=progress.cpu_s)
            self._look_and_advance()
            if progress.step % c.save_every == 0 or progress.finished:
                progress.log_bytes = self.journal.num_bytes
                save_state(self.state, self.model, self.learners, progress)  # type: ignore[arg-type]
            if progress.step == stop_after:
                break
        return progress

    def _look_and_advance(self) -> None:
        """Looks at held-out items where it is time to, and goes to the next stage where this one is over."""
        progress, stage = self.progress, self.stage
        length = self.lengths[progress.phase]
        over = progress.phase_step == length
        gate = stage.until is not None and (over or progress.phase_step % self.config.gate_every == 0)
        if gate or progress.step % self.config.eval_every == 0:
            look = self.look(self.config.eval_items)
            self.journal.write(step=progress.step, look=look)
            logger.info("step %d, %s: %s", progress.step, stage.name, {k: v["accuracy"] for k, v in look.items()})
            passed = stage.until is not None and min(v["accuracy"] for v in look.values()) >= stage.until
            if over and gate and not passed and stage.on_cap == "stop":
                self.journal.write(step=progress.step, stopped=stage.name)
                logger.warning("stage %s did not reach %s; the run ends here", stage.name, stage.until)
                progress.finished = True
            over = over or (gate and passed)
        if over:
            progress.phase, progress.phase_step = progress.phase + 1, 0
            progress.finished = progress.finished or progress.phase == len(self.config.stages)

    def step(self) -> dict[str, Any]:
        """One update; what it draws depends on the seed and the step alone."""
        c, stage, progress = self.config, self.stage, self.progress
        rng = np.random.default_rng([c.seed, progress.step])
        done = progress.phase_step / self.lengths[progress.phase]
        weight = at(stage.supervise, done)
        self.model.train()
        drawn, latents = self._drawn(rng, c.batch), stage.latents
        if stage.mix and rng.random() < stage.mix:
            most = 10**6 if latents == "all" else latents
            latents = int(rng.integers(min(most, max(self._count(drawn, "all"), 1))))
        worked = self.work(self.teacher.lesson(drawn, "latent"), latents, stage.keep_last)
        total = worked.answer + weight * worked.supervised
        if self.sr is not None:
            total = total + c.recon_weight * worked.coherence
        total.backward()
        entry = {"loss": worked.answer.item()}
        if weight:
            entry |= {"supervised": worked.supervised.item(), "states_right": worked.states_right}
        if self.sr is not None:
            entry["coherence"] = worked.coherence.item()
        rows = round(c.batch * stage.written)
        if rows:
            written = self.written(self.teacher.lesson(self._drawn(rng, rows), "cot"))
            (written * stage.written).backward()
            entry["written"] = written.item()
        share = rate_at(progress.phase_step, self.lengths[progress.phase], stage.warmup, stage.floor)
        entry["norm"] = self.learners.step(share, stage)
        return {name: round(value, 5) for name, value in entry.items()} | {"latents": self._count(drawn, latents)}

    def _drawn(self, rng: np.random.Generator, rows: int) -> list[tuple[Generated, Spec]]:
        """Items of one world and length, so that all rows take as many latents."""
        names = list(self.tasks)
        weights = np.array([self.config.tasks[name] for name in names])
        task = self.tasks[names[int(rng.choice(len(names), p=weights / weights.sum()))]]
        size = task.sizes[int(rng.integers(len(task.sizes)))]
        length = int(rng.integers(1, task.max_length(size) + 1))
        return [(task, task.stream(rng, size, length)) for _ in range(rows)]

    def _count(self, drawn: Sequence[tuple[Generated, Spec]], latents: int | str) -> int:
        """Latent groups of the first item, for the log and for mixing."""
        groups, _ = self.teacher._worked(*drawn[0], "latent")
        return len(groups) if latents == "all" else min(int(latents), len(groups))

    # ------------------------------------------------------------------ passes

    def work(self, lesson: Lesson, latents: int | Literal["all"], keep_last: bool = False) -> Worked:
        """One pass over a lesson as inference takes it: prompt, latent steps, then all that is written at once.

        Args:
            lesson: under the latent cue.
            latents: groups that latents replace.
            keep_last: leave every row its last group.

        Raises:
            ConfigError: a row needs more latents than the recipe's `think.num_latents`.
        """
        replaced = [min(len(g) - keep_last, len(g) if latents == "all" else latents) for g in lesson.groups]
        counts = self._counts(replaced, latents)
        training = torch.is_grad_enabled()
        short = max(counts) < MAX_HOPS - 2  # one pass tells no more hops apart
        if training and self.config.latent_grad == "none" and self.sr is None and short and not self._deepstack:
            rollout, H, labels = self._one_pass(lesson, counts, replaced)
        else:
            rollout, H, labels = self._chunks(lesson, counts, replaced, training)
        learned = labels != IGNORED
        logits = self._head(H[learned])
        loss = F.cross_entropy(logits, labels[learned])
        right = learned.clone()
        right[learned] = logits.argmax(-1) == labels[learned]
        supervised, share = self._supervised(rollout, lesson, counts, replaced)
        coherence = loss.new_zeros(())
        if self.sr is not None and rollout.thoughts and training:
            c = self.config
            pictures, grids = lesson.images(), lesson.grids
            coherence = coherence_loss(
                self.routed, rollout, rollout.shares, self.sr, pictures, grids, c.window_share, c.window_cells
            )
        return Worked(loss, supervised, coherence, (right | ~learned).all(1).tolist(), share)

    @property
    def _deepstack(self) -> bool:
        """Whether images reach inner layers too, which a pass over embeddings alone would leave out."""
        return self.routed.family.name == "qwen3_vl"

    def _counts(self, replaced: list[int], latents: int | str) -> list[int]:
        """[row]: latent steps. With a fixed number every row takes as many, whatever it has to say."""
        c, limit = self.config.latents_per_group, self.think.num_latents
        fixed = getattr(self.think.config, "stop", "fixed") == "fixed"
        wanted = [c * n for n in replaced]
        if fixed:
            wanted = [limit if latents == "all" else min(limit, c * int(latents))] * len(replaced)
        if max(c * n for n in replaced) > limit:
            raise ConfigError(
                f"an item has {max(replaced)} groups to replace, think.num_latents allows {limit} latents of "
                f"{c} each; raise it to {c * max(replaced)}, or merge the steps with train.groups"
            )
        return wanted

    def _prompt(self, lesson: Lesson, cache: RaggedCache) -> Rollout:
        """Enters the prompts; the latent steps are still to be taken."""
        valid = lesson.mask.bool()
        given: dict[str, Any] = dict(lesson.inputs)
        if "inputs_embeds" not in given:
            given["input_ids"] = lesson.ids
        cache.next = Chunk(
            modality=lesson.modality,
            valid=valid,
            protected=self.routed.controller.delimiters[lesson.ids],
            watch=self.think.needs_row,
        )
        h = self.routed.controller.base(
            **given, attention_mask=lesson.mask, position_ids=lesson.positions, past_key_values=cache
        ).last_hidden_state
        last = lesson.mask.sum(1) - 1
        mind = start(
            cache,
            self.think,
            hidden=h[torch.arange(len(h), device=h.device), last],
            modality=lesson.modality,
            valid=valid,
            positions=lesson.positions if lesson.positions.ndim == 3 else lesson.positions[None],
            grids=lesson.grids,
            seeds=torch.arange(len(h), device=h.device),
        )
        return Rollout(self.routed, self.think, cache, mind, lesson.mask)

    def _chunks(
        self, lesson: Lesson, counts: list[int], replaced: list[int], training: bool
    ) -> tuple[Rollout, Float[Tensor, "B M D"], Tensor]:
        """As inference runs, on a cache that gradients flow through."""
        cache = self.routed.new_cache(differentiable=training)
        rollout = self._prompt(lesson, cache)
        rollout.edit = self._cut(max(counts))
        mind = rollout.run(counts)
        ids, labels = self._written(lesson, replaced)
        valid = labels != IGNORED
        cache.start_hop(mind.step + 1)
        cache.next = Chunk(modality=torch.zeros_like(ids), valid=valid, generated=valid)
        places = mind.next_position[:, None] + torch.arange(ids.shape[1], device=ids.device)
        h = self.routed.controller.base(
            inputs_embeds=self._words(ids),
            attention_mask=torch.cat([rollout.mask, valid.to(rollout.mask.dtype)], 1),
            position_ids=places.expand_as(ids) if lesson.positions.ndim == 2 else places.expand(3, -1, -1),
            past_key_values=cache,
        ).last_hidden_state
        return rollout, torch.cat([mind.hidden[:, None], h[:, :-1]], 1), labels

    def _cut(self, steps: int) -> Edit | None:
        """Detaches what is fed back but for the last n steps."""
        kind, _, number = self.config.latent_grad.partition(":")
        if kind == "full":
            return None
        first = steps - int(number or 0)

        def edit(step: int, thought: Thought) -> Thought:
            if step >= first:
                return thought
            # The closer look goes on learning through the weights of the copies; the answer does not.
            return replace(thought, embeds=thought.embeds.detach()) if self.sr is None else _latent_cut(thought)

        return edit

    def _one_pass(
        self, lesson: Lesson, counts: list[int], replaced: list[int]
    ) -> tuple[Rollout, Float[Tensor, "B M D"], Tensor]:
        """`latent_grad: none`: the steps are taken without gradient, then all is entered at once as given."""
        with torch.no_grad():
            rollout = self._prompt(lesson, self.routed.new_cache())
            mind = rollout.run(counts)
        ids, labels = self._written(lesson, replaced)
        thoughts = rollout.thoughts
        embeds = lesson.inputs.get("inputs_embeds")
        if embeds is None:
            embeds = self._entered(lesson)
        valid = labels != IGNORED
        axes = lesson.positions if lesson.positions.ndim == 3 else lesson.positions[None]
        tail = (mind.next_position[:, None] + torch.arange(ids.shape[1], device=ids.device)).expand(len(axes), -1, -1)
        places = torch.cat([axes, *(t.places for t in thoughts), tail], 2)
        mask = torch.cat([rollout.mask.bool(), valid], 1)
        hop = [torch.full_like(t.modality, i) for i, t in enumerate(thoughts, 1)]
        nothing = [torch.zeros_like(t.valid) for t in thoughts]
        h = self.routed.controller.base(
            inputs_embeds=torch.cat([embeds, *(t.embeds for t in thoughts), self._words(ids)], 1),
            modality=torch.cat([lesson.modality, *(t.modality for t in thoughts), torch.zeros_like(ids)], 1),
            hop_ids=torch.cat([torch.zeros_like(lesson.ids), *hop, torch.full_like(ids, len(thoughts) + 1)], 1),
            generated=torch.cat([torch.zeros_like(lesson.mask, dtype=torch.bool), *nothing, valid], 1),
            protected=torch.cat([self.routed.controller.delimiters[lesson.ids], *nothing, valid & False], 1),
            attention_mask=mask.long(),
            position_ids=places if lesson.positions.ndim == 3 else places[0],
            use_cache=False,
        ).last_hidden_state
        before = mask.shape[1] - ids.shape[1]
        column = torch.arange(before, device=ids.device)
        row = torch.arange(len(h), device=ids.device)
        last = torch.where(mask[:, :before], column, -1).amax(1)
        # What was fed back, with gradient: supervision reads the states that this pass computes.
        ends = [lesson.mask.sum(1) - 1]
        start_of = lesson.ids.shape[1]
        for thought in thoughts:
            start_of += thought.valid.shape[1]
            ends.append(torch.where(thought.valid[:, -1], start_of - 1, ends[-1]))
        rollout.fed = [h[row, end] for end in ends[:-1]]
        return rollout, torch.cat([h[row, last][:, None], h[:, before:-1]], 1), labels

    def _entered(self, lesson: Lesson) -> Tensor:
        """Embeddings of the prompts with their images in place."""
        features = torch.cat(self.routed.family.image_features(self.model, lesson.inputs))
        words = self._words(lesson.ids)
        at = self.routed.controller.table[lesson.ids] == 1
        return words.masked_scatter(at[..., None].expand_as(words), features.to(words.dtype))

    def written(self, lesson: Lesson) -> Tensor:
        """Cross-entropy of whole written chains, in one pass."""
        with torch.enable_grad():
            _, H, labels = self._chunks(lesson, [0] * len(lesson.ids), [0] * len(lesson.ids), training=True)
        learned = labels != IGNORED
        return F.cross_entropy(self._head(H[learned]), labels[learned])

    def _written(self, lesson: Lesson, replaced: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(B, M) ids of what latents do not replace, and the same with `IGNORED` behind each row's end."""
        rows = [
            [*(i for group in groups[n:] for i in group), *answer]
            for groups, n, answer in zip(lesson.groups, replaced, lesson.answers, strict=True)
        ]
        labels = torch.full((len(rows), max(map(len, rows))), IGNORED)
        for b, row in enumerate(rows):
            labels[b, : len(row)] = torch.tensor(row)
        labels = labels.to(lesson.device)
        return labels.clamp(min=0), labels

    def _supervised(
        self, rollout: Rollout, lesson: Lesson, counts: list[int], replaced: list[int]
    ) -> tuple[Tensor, float]:
        """Each latent against the last word of the group it ends; steps behind the last group repeat its word."""
        if not rollout.fed:
            return self._nothing(lesson), 0.0
        c = self.config.latents_per_group
        want = torch.full((len(counts), len(rollout.fed)), IGNORED)
        for b, (count, groups, n) in enumerate(zip(counts, lesson.groups, replaced, strict=True)):
            for t in range(c - 1, count, c):
                if n:
                    want[b, t] = groups[min(t // c, n - 1)][-1]
        want = want.to(lesson.device)
        learned = want != IGNORED
        if not bool(learned.any()):
            return self._nothing(lesson), 0.0
        logits = self._head(torch.stack(rollout.fed, 1)[learned])
        right = (logits.argmax(-1) == want[learned]).float().mean()
        return F.cross_entropy(logits, want[learned]), float(right)

    def _nothing(self, lesson: Lesson) -> Tensor:
        return torch.zeros((), device=lesson.device)

    def _head(self, h: Float[Tensor, "n D"]) -> Tensor:
        return self.routed.family.head(self.model, h).float()

    def _words(self, ids: Tensor) -> Tensor:
        return self.routed.family.text_model(self.model).embed_tokens(ids)

    # ------------------------------------------------------------------ looking

    @torch.no_grad()
    def look(self, items: int) -> dict[str, dict[str, Any]]:
        """By task, on held-out items: share whose written rest is right word by word, by number of groups too."""
        self.model.eval()
        stage, out = self.stage, {}
        for name, task in self.tasks.items():
            right: dict[int, list[bool]] = defaultdict(list)
            states = []
            for drawn in self._held_out(name, task, items):
                lesson = self.teacher.lesson(drawn, "latent")
                worked = self.work(lesson, stage.latents, stage.keep_last)
                states.append(worked.states_right)
                for groups, good in zip(lesson.groups, worked.right, strict=True):
                    right[len(groups)].append(good)
            every = [good for rows in right.values() for good in rows]
            out[name] = {
                "n": len(every),
                "accuracy": round(float(np.mean(every)), 4),
                "states": round(float(np.mean(states)), 4),
                "by_groups": {str(n): round(float(np.mean(rows)), 4) for n, rows in sorted(right.items())},
            }
        return out

    def _held_out(self, name: str, task: Generated, items: int) -> list[list[tuple[Generated, Spec]]]:
        if (name, items) not in self._held:
            specs = [(task, task.spec("val", i)) for i in range(items)]
            self._held[name, items] = [specs[i : i + 48] for i in range(0, items, 48)]
        return self._held[name, items]

    # ------------------------------------------------------------------ writing

    def write(self, results: Mapping[str, Any]) -> Path:
        """`out/latent`: what was added, the recipe, the figures, and the backbone's new weights if it learned."""
        folder = self.out / "latent"
        self.model.eval()
        self.routed.save_pretrained(folder)
        save_delta(folder, self.tuning.before, self.tuning.weights(), self.model.config.name_or_path)
        recipe = {k: v for k, v in asdict(replace(self.recipe, trained=None)).items() if v is not None}
        about = {"recipe.yaml": as_yaml(json.loads(json.dumps(recipe))), "RESULTS.json": json.dumps(results, indent=1)}
        for name, text in about.items():
            with replacing(folder / name) as beside:
                beside.write_text(text.rstrip() + "\n")
        return folder


def _latent_cut(thought: Thought) -> Thought:
    """Only the latent itself is cut off."""
    embeds = torch.cat([thought.embeds[:, :-1], thought.embeds[:, -1:].detach()], 1)
    return replace(thought, embeds=embeds)


class _Learners:
    """Everything that an update moves, and what a resumed run needs of it."""

    def __init__(self, model: nn.Module, parts: nn.Module, sr: TokenSR | None, config: TrainConfig) -> None:
        self.model, self.parts, self.sr, self.config = model, parts, sr, config
        self.reset()

    def reset(self) -> None:
        """Optimisers without a past."""
        new = [*self.parts.parameters(), *([] if self.sr is None else self.sr.parameters())]
        mine = {id(p) for p in new}
        self.new_parameters = new
        own = nn.ParameterDict()  # the backbone's, under names that say which are embeddings
        for name, p in self.model.named_parameters():
            if p.requires_grad and id(p) not in mine:
                own[name.replace(".", "/")] = p
        self.backbone = Optimisers(own, self.config.weight_decay) if len(own) else None
        self.new = torch.optim.AdamW(new, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0) if new else None

    def step(self, share: float, stage: Stage) -> float:
        """One update at this share of the peak rates; clears the gradients. Returns the gradient's norm."""
        both = () if self.backbone is None else (self.backbone.muon, self.backbone.adamw)
        weights = [p for optimiser in both for group in optimiser.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_([*weights, *self.new_parameters], self.config.clip))
        if self.backbone is not None:
            lora = self.config.backbone == "lora"
            self.backbone.step(share * (stage.adamw if lora else stage.muon), share * stage.adamw)
        if self.new is not None:
            for group in self.new.param_groups:
                group["lr"] = share * stage.new
            self.new.step()
            self.new.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """All moments and the weights that are not the model's, by name."""
        out = {} if self.backbone is None else {f"backbone.{k}": v for k, v in self.backbone.tensors().items()}
        if self.new is not None:
            for index, state in self.new.state_dict()["state"].items():
                out |= {f"new.{index}.{key}": value for key, value in state.items()}
        if self.sr is not None:
            out |= {f"sr.{name}": value for name, value in self.sr.state_dict().items()}
        return out | {f"buffer.{name}": value for name, value in self.parts.named_buffers()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes what `tensors` gave."""
        by_owner: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            owner, _, rest = name.partition(".")
            by_owner[owner][rest] = value
        if self.backbone is not None:
            self.backbone.load(by_owner["backbone"])
        if self.new is not None:
            state: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for name, value in by_owner["new"].items():
                index, key = name.split(".", 1)
                state[int(index)][key] = value
            self.new.load_state_dict({"state": dict(state), "param_groups": self.new.state_dict()["param_groups"]})
        if self.sr is not None:
            self.sr.load_state_dict(by_owner["sr"])
        for name, value in self.parts.named_buffers():
            value.copy_(by_owner["buffer"][name])
