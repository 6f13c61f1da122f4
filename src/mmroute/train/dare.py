"""Trains DARE's routers on generated worlds, and those of its controls: `mmroute train dare --recipe dare-lh`.

Stage A finds: the dense executor, noise that falls to nothing, rates that come down (vision first, then text), and
gradients for what was left out. Stage B settles: routers and rates stand still, the backbone gets used to them, hop by
hop on a cache, as inference runs. The backbone must be able to do the task unrouted before.

Source: DARE trains routers and backbone together with straight-through gates.
Deviates: two stages; schedules, rates of learning and clipping are ours (see `dare_config.py`).
"""

import json
import logging
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmroute import recipe as recipes
from mmroute.config import parse
from mmroute.engine.attach import Routed, attach
from mmroute.errors import ConfigError
from mmroute.origin import origin_here
from mmroute.prune._gates import Relaxation
from mmroute.prune.dare import Dare
from mmroute.prune.mod import MoD
from mmroute.prune.symmetric import Symmetric
from mmroute.tasks.base import Generated, Spec
from mmroute.train.chains import Chains, Writer, worlds
from mmroute.train.dare_cliff import cliff_of
from mmroute.train.dare_config import TrainConfig
from mmroute.train.dare_distil import distil
from mmroute.train.dare_learners import Learners
from mmroute.train.dare_look import held_out, kept_in_training, rate_table
from mmroute.train.dare_losses import routing_losses
from mmroute.train.dare_passes import Passes
from mmroute.train.delta import begun_from
from mmroute.train.examples import IGNORED
from mmroute.train.follow import Follower
from mmroute.train.loop import Journal, Optimisers, Progress, go_on, rate_at, refuse_old_run, save_state
from mmroute.train.trained import write_trained
from mmroute.train.tuning import Tuning

__all__ = ["DareRun", "train_dare"]

logger = logging.getLogger(__name__)

_LORA_TARGETS = "qkvo"
_LOOKED_AT_ONCE = 48
_DISTILLED_FROM = 64
"""Chains whose attention `init: distill` fits routers to."""


def train_dare(
    recipe: recipes.Recipe, model: Any, out: Path, resume: bool = False, followers: Sequence[Follower] = ()
) -> Path:
    """Trains what a recipe says and writes `out/router`: routers, rates, and the backbone's new weights if it learned.

    Where the recipe names no cutoff layer the model's information cliff is measured first.

    Args:
        recipe: prunes with `dare`, `symmetric` or `mod` and has a `train` section.
        model: a loaded stock model with its processor; its weights are put back at the end.
        out: folder of the run.
        resume: go on from the state in `out`.
        followers: who hears each line of the log.

    Returns:
        The folder that a recipe's `trained` takes.

    Raises:
        ConfigError: the recipe has nothing that can be trained so, or the folder's state belongs to another one.
        InputError: the folder holds a run and `resume` is off.
    """
    origin = origin_here()
    recipe = _with_cutoff(recipe, model)
    with DareRun(recipe, model, out, resume, followers) as run:
        run.train()
        look = run.look(4 * run.config.eval_items)
        results = {
            **origin,
            "base": model.config.name_or_path,
            "steps": run.progress.step,
            "cpu_s": run.progress.cpu_s,
            "rates": run.rates(),
            "held_out": "teacher-forced chains of the split val, every word right; hop by hop on a cache",
            "tasks": look,
        }
        return run.write(results)


def _with_cutoff(recipe: recipes.Recipe, model: Any) -> recipes.Recipe:
    """The recipe with the first deep layer of vision; as it is where it names one or needs none."""
    pruner = recipe.build("prune")
    if not isinstance(pruner, Dare) or recipe.train is None or recipe.prune is None:
        return recipe  # what is wrong with it, the run says
    if pruner.config.cutoff_layer is not None or pruner.config.vision_keep == 1:
        return recipe
    config = parse(TrainConfig, recipe.train, "train")
    cliff = cliff_of(model, recipe.build("think"), worlds(config.tasks, config.task))
    logger.info("the information cliff is at layer %d: --set prune.cutoff_layer=%d", *[cliff.cutoff_layer] * 2)
    return replace(recipe, prune={**recipe.prune, "cutoff_layer": cliff.cutoff_layer})


class DareRun:
    """One run in one folder: `state.safetensors`, `log.jsonl`, and at its end `router`."""

    def __init__(
        self,
        recipe: recipes.Recipe,
        model: Any,
        out: Path,
        resume: bool = False,
        followers: Sequence[Follower] = (),
    ) -> None:
        """Opens the folder and attaches the model; see `train_dare`. Use it as a context manager."""
        pruner = recipe.build("prune")
        if not isinstance(pruner, Dare | Symmetric | MoD) or recipe.train is None:
            raise ConfigError(
                f"recipe {recipe.name}: training needs prune.name dare, symmetric or mod, and a section `train`"
            )
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        if not any(pruner.acts(layer, layers) for layer in range(layers)):
            raise ConfigError(
                f"recipe {recipe.name}: prune leaves every layer whole, so there is no router to train; give a "
                f"keep below 1 and a first_layer below {layers}"
            )
        self.recipe, self.out, self.pruner = recipe, out, pruner
        self.config = parse(TrainConfig, recipe.train, "train")
        self.state = out / "state.safetensors"
        refuse_old_run(self.state, resume)
        self.tasks = worlds(self.config.tasks, self.config.task)
        if self.config.init == "distill" and not isinstance(pruner, Dare):
            raise ConfigError("train.init distill is for prune.name dare; leave it out for its controls")
        if self.config.start is not None and self.config.init == "distill":
            raise ConfigError("train.start brings routers, train.init distill makes new ones; give one of them")
        self.model, self._stack = model, ExitStack()
        rank = self.config.lora_rank
        self.tuning = Tuning(model, self.config.backbone, rank, 2 * rank, _LORA_TARGETS, self.config.seed, False)
        backbone = Optimisers(model, 0.01) if self.config.backbone != "frozen" else None
        self.routed: Routed = attach(model, prune=pruner, prefix_tokens=recipe.prefix_tokens, executor="dense")
        self._stack.callback(self._restore)
        self.learners = Learners(backbone, pruner, self.config, self.routed.controller.shape.hidden)
        self.passes = Passes(self.routed, pruner)
        self.writer = Writer(self.routed, recipe.build("think"))
        fresh = Progress(recipe=json.dumps(asdict(replace(recipe, trained=None))))
        try:
            self._stack.enter_context(begun_from(self.config.start, self.routed, self.config.backbone))
            self.progress = go_on(self.state, model, self.learners, fresh)
        except BaseException:
            self._stack.close()
            raise
        if self.progress is fresh and self.config.init == "distill":
            rng = np.random.default_rng([self.config.seed, _DISTILLED_FROM, 0])  # no step draws these
            drawn = (self._drawn(rng) for _ in range(math.ceil(_DISTILLED_FROM / self.config.batch)))
            distil(self.passes, map(self.writer.batch, drawn))
        self.journal = Journal(out / "log.jsonl", self.progress.log_bytes, followers)
        self._held: dict[tuple[str, int, int], Chains] = {}

    def __enter__(self) -> "DareRun":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _restore(self) -> None:
        self.routed.detach()
        self.tuning.restore()

    # ------------------------------------------------------------------ the loop

    @property
    def dense_steps(self) -> int:
        """Steps of stage A."""
        return round(self.config.steps * self.config.dense_share)

    def train(self, stop_after: int | None = None) -> Progress:
        """Runs the steps that are left.

        Args:
            stop_after: steps after which to return early, unsaved, as if killed; for tests.
        """
        started, before = time.process_time(), self.progress.cpu_s
        progress, config = self.progress, self.config
        self.journal.begin(progress.step, config.steps)
        while progress.step < config.steps:
            entry = self.step()
            progress.step += 1
            progress.cpu_s = round(before + time.process_time() - started, 1)
            self.journal.write(step=progress.step, **entry, cpu_s=progress.cpu_s)
            if progress.step % config.eval_every == 0:
                look = self.look(config.eval_items)
                self.journal.write(step=progress.step, look=look)
                shown = {name: values["chain"] for name, values in look.items()}
                logger.info("step %d: loss %.4f, chains %s", progress.step, entry["loss"], shown)
            if progress.step % config.save_every == 0 or progress.step == config.steps:
                progress.log_bytes = self.journal.num_bytes
                save_state(self.state, self.model, self.learners, progress)
            if progress.step == stop_after:
                break
        return progress

    def step(self) -> dict[str, Any]:
        """One update; what it draws depends on the seed and the step alone."""
        config, step = self.config, self.progress.step
        finding = step < self.dense_steps
        batch = self.writer.batch(self._drawn(np.random.default_rng([config.seed, step])))
        self.model.train()
        learns = finding and self._is_learned
        wanted = self._unrouted(batch) if config.teacher_kl else None
        relax = self._relaxation(step / max(self.dense_steps, 1)) if learns else Relaxation(settled=True)
        if not isinstance(self.pruner, MoD):  # which has no soft stage, and rates that are given
            self.pruner.relax = relax
            self.pruner.export()
        if learns:
            h = self.passes.at_once(batch)
        else:
            with warnings.catch_warnings():  # a control has frozen parts by design
                warnings.filterwarnings("ignore", "training with every routing part frozen")
                h = self.passes.hop_by_hop(batch, differentiable=True)
        said = self.passes.logits(h, batch)
        loss = F.cross_entropy(said, batch.labels[batch.labels != IGNORED])
        parts: dict[str, float] = {}
        total = loss
        if wanted is not None:
            apart = F.kl_div(said.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
            total = total + config.teacher_kl * apart
            parts["teacher_kl"] = round(apart.item(), 6)
        if learns:
            routing, found = routing_losses(self.routed.controller.aux, self.pruner, config)
            total, parts = total + routing, parts | found
        entry: dict[str, Any] = {"stage": "A" if finding else "B", "loss": round(loss.item(), 6), **parts}
        if total.requires_grad:
            total.backward()
            entry |= self.learners.step(rate_at(step, config.steps, config.warmup, config.floor), learns)
        if learns:
            entry |= {"temperature": round(relax.temperature, 4), "noise": round(relax.noise, 4)}
            entry |= {"ramp": {"vision": round(relax.vision_ramp, 3), "text": round(relax.text_ramp, 3)}}
            tokens = self.routed.controller.tokens
            assert tokens is not None
            if isinstance(self.pruner, Dare):
                self.pruner.observe(tokens, self.routed.controller.aux)
            if (step + 1) % 25 == 0:
                entry |= kept_in_training(self.routed.controller, self.pruner, batch)
        return entry

    @property
    def _is_learned(self) -> bool:
        """Whether anything but the backbone learns; not where DARE's counts are filled by a control's scores."""
        return not isinstance(self.pruner, Dare) or self.pruner.config.scorer == "router"

    def rates(self) -> list[list[list[float]]]:
        """[text, vision][hop][layer]: share of what enters that runs."""
        hops = self.pruner.config.max_hops if isinstance(self.pruner, Dare) else 1
        return rate_table(self.pruner, self.routed.controller.shape.layers, hops)

    def _drawn(self, rng: np.random.Generator) -> list[tuple[Generated, Spec]]:
        names = list(self.tasks)
        weights = np.array([self.config.tasks[name] for name in names])
        out = []
        for _ in range(self.config.batch):
            task = self.tasks[names[int(rng.choice(len(names), p=weights / weights.sum()))]]
            size = task.sizes[int(rng.integers(len(task.sizes)))]
            out.append((task, task.stream(rng, size, int(rng.integers(1, task.max_length(size) + 1)))))
        return out

    def _relaxation(self, done: float) -> Relaxation:
        """How soft stage A is when the share `done` of it is over."""
        c = self.config

        def ramp(span: tuple[float, float]) -> float:
            return min(1.0, max(0.0, (done - span[0]) / max(span[1] - span[0], 1e-9)))

        cool = min(1.0, done / c.temperature_until)
        seed = c.seed * 1_000_003 + self.progress.step
        return Relaxation(
            temperature=c.temperature[0] * (c.temperature[1] / c.temperature[0]) ** cool,
            noise=c.noise * max(0.0, 1 - done / c.noise_until),
            vision_ramp=ramp(c.vision_ramp),
            text_ramp=ramp(c.text_ramp),
            gate_clip=c.gate_clip,
            hard_reduction=c.hard_reduction,
            ratio_side=c.ratio_side,
            generator=torch.Generator().manual_seed(seed),
        )

    def _unrouted(self, batch: Chains) -> Tensor:
        """What the model that was given says of each word to write; (words, vocabulary)."""
        with torch.no_grad(), self.tuning.original():
            return self.passes.logits(self.passes.unrouted(batch), batch)

    # ------------------------------------------------------------------ looking

    def look(self, items: int) -> dict[str, dict[str, Any]]:
        """By task, on held-out items and as inference runs: chains and words right, and what was kept."""
        self.model.eval()
        self.routed.full_trace = True
        out = {name: held_out(self.passes, self._val(name, items)) for name in self.tasks}
        self.routed.full_trace = False
        return out

    def _val(self, name: str, items: int) -> list[Chains]:
        out = []
        for start in range(0, items, _LOOKED_AT_ONCE):
            key = (name, start, min(start + _LOOKED_AT_ONCE, items))
            if key not in self._held:
                task = self.tasks[name]
                self._held[key] = self.writer.batch([(task, task.spec("val", i)) for i in range(*key[1:])])
            out.append(self._held[key])
        return out

    # ------------------------------------------------------------------ writing

    def write(self, results: Mapping[str, Any]) -> Path:
        """`out/router`: what was added, the recipe, the figures, and the backbone's new weights if it learned."""
        self.model.eval()
        return write_trained(self.out / "router", self.routed, self.tuning, self.recipe, results)
