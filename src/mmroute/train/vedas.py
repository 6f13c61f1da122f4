"""Teaches a model to think in latents: `mmroute train vedas --recipe latent`.

A run is a list of stages. In each, the first groups of a written rationale are replaced by latent steps; what is left
is written. A stage may supervise each latent with the state it stands for, through the model's own head, and a later
one take that away. The backbone must be able to write the rationale before.

The stages stand in `curriculum.py`, what one pass computes in `passes.py`, what an update moves in `learners.py`.

Source: Vedas (arXiv 2604.10500), training of section 3.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmroute import recipe as recipes
from mmroute.config import parse
from mmroute.engine.attach import Routed, attach
from mmroute.errors import ConfigError
from mmroute.origin import origin_here
from mmroute.tasks.base import Generated, Spec
from mmroute.think.base import LatentThinker
from mmroute.train.chains import worlds
from mmroute.train.curriculum import Stage, TrainConfig
from mmroute.train.delta import begun_from
from mmroute.train.follow import Follower
from mmroute.train.learners import Learners
from mmroute.train.lessons import Teacher
from mmroute.train.loop import Journal, Progress, go_on, rate_at, refuse_old_run, save_state
from mmroute.train.passes import Passes, Worked
from mmroute.train.ranks import Ranks
from mmroute.train.readout import Helpers
from mmroute.train.recipe import at
from mmroute.train.trained import write_trained
from mmroute.train.tuning import Tuning

__all__ = ["VedasRun", "train_vedas"]

logger = logging.getLogger(__name__)


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
    origin = origin_here()
    with VedasRun(recipe, model, out, resume, followers) as run:
        run.train()
        results = {
            **origin,
            "base": Path(model.name_or_path).name,
            "device": model.device.type,
            "processes": run.ranks.world,
            "steps": run.progress.step,
            "cpu_s": run.progress.cpu_s,
            "held_out": "split val, answer and all that is written right, as inference thinks; by number of groups",
            "tasks": run.ranks.told(lambda: run.look(4 * run.config.eval_items)),
        }
        return run.write(results) if run.ranks.writes else run.folder


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
        if recipe.train is None or not isinstance(think, LatentThinker):
            raise ConfigError(
                f"recipe {recipe.name}: training latents needs think.name coconut, ivtlr, vedas or pause, and a "
                "section `train`"
            )
        self.recipe, self.out, self.think, self.ranks = recipe, out, think, Ranks.launched(model.device)
        self.config = c = parse(TrainConfig, recipe.train, "train")
        self.lengths = [c.length(stage) for stage in c.stages]
        self.state = out / "state.safetensors"
        refuse_old_run(self.state, resume)
        self.tasks = worlds(c.tasks)
        self.model, self._stack = model, ExitStack()
        self.tuning = Tuning(model, c.backbone, c.lora_rank, c.lora_alpha, c.lora_targets, c.seed, c.embeddings)
        self._stack.callback(self.tuning.restore)
        try:
            parts = {"prune": recipe.build("prune"), "deepen": recipe.build("deepen"), "think": think}
            self.routed: Routed = attach(model, prefix_tokens=recipe.prefix_tokens, executor="physical", **parts)
            self._stack.callback(self.routed.detach)
            self._stack.enter_context(begun_from(c.start, self.routed, c.backbone))
            hidden = self.routed.controller.shape.hidden
            self.helpers = Helpers(hidden, c).to(model.device)
            self.learners = Learners(model, self.routed.parts, self.helpers, c, self.ranks)
            self.passes = Passes(self.routed, think, c, self.helpers, self.ranks)
            self.teacher = Teacher(self.routed, think, c)
            fresh = Progress(recipe=json.dumps(asdict(replace(recipe, trained=None))))
            self.progress = go_on(self.state, model, self.learners, fresh)
            log = out / "log.jsonl" if self.ranks.writes else None
            self.journal = Journal(log, self.progress.log_bytes, followers if self.ranks.writes else ())
        except BaseException:
            self._stack.close()
            raise
        self._held: dict[tuple[str, int], list[list[tuple[Generated, Spec]]]] = {}

    def __enter__(self) -> "VedasRun":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    @property
    def folder(self) -> Path:
        """Where the result is written."""
        return self.out / "latent"

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
                if self.ranks.writes:
                    save_state(self.state, self.model, self.learners, progress)
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
            look = self.ranks.told(lambda: self.look(self.config.eval_items))
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
        mine = self.ranks.share(drawn)
        worked = self.passes.work(self.teacher.lesson(mine, "latent"), latents, stage.keep_last)
        self.loss(worked, weight).backward()
        entry = {"loss": self.ranks.over_all(worked.answer)}
        if weight:
            entry |= {"supervised": self.ranks.over_all(worked.supervised), "states_right": worked.states_right}
            if c.readout_weight:
                entry["readout"] = self.ranks.over_all(worked.readout)
        if c.recon_weight:
            entry["coherence"] = self.ranks.over_all(worked.coherence)
        rows = round(c.batch * stage.written)
        if rows:
            written = self.passes.written(self.teacher.lesson(self.ranks.share(self._drawn(rng, rows)), "cot"))
            (written * stage.written).backward()
            entry["written"] = self.ranks.over_all(written)
        share = rate_at(progress.phase_step, self.lengths[progress.phase], stage.warmup, stage.floor)
        entry["norm"] = self.learners.step(share, stage)
        return {name: round(value, 5) for name, value in entry.items()} | {"latents": self._count(drawn, latents)}

    def loss(self, worked: Worked, supervise: float) -> Tensor:
        """What an update goes down, written chains apart."""
        c = self.config
        total = worked.answer + supervise * (worked.supervised + c.readout_weight * worked.readout)
        return total + c.recon_weight * worked.coherence if c.recon_weight else total

    def _drawn(self, rng: np.random.Generator, rows: int) -> list[tuple[Generated, Spec]]:
        """Items of one world and length, so that all rows take as many latents."""
        names = list(self.tasks)
        weights = np.array([self.config.tasks[name] for name in names])
        task = self.tasks[names[int(rng.choice(len(names), p=weights / weights.sum()))]]
        size = task.sizes[int(rng.integers(len(task.sizes)))]
        most, power = task.max_length(size), self.config.length_power
        if power:
            by_length = np.arange(1, most + 1) ** power
            length = 1 + int(rng.choice(most, p=by_length / by_length.sum()))
        else:  # a draw of its own, by which the bundled weights were trained
            length = int(rng.integers(1, most + 1))
        return [(task, task.stream(rng, size, length)) for _ in range(rows)]

    def _count(self, drawn: Sequence[tuple[Generated, Spec]], latents: int | str) -> int:
        """Latent groups of the first item, for the log and for mixing."""
        groups, _ = self.teacher._worked(*drawn[0], "latent")
        return len(groups) if latents == "all" else min(int(latents), len(groups))

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
                worked = self.passes.work(lesson, stage.latents, stage.keep_last)
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
        self.model.eval()
        return write_trained(self.folder, self.routed, self.tuning, self.recipe, results)
