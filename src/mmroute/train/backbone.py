"""Trains a small stock model from scratch on generated worlds: `mmroute train backbone --recipe tiny`.

Looking is the bottleneck: moves and copies are learned in a few hundred steps while the picture stays unread. So the
recipe teaches random read-outs first, on small pictures, while each vision token also learns to name its place and what
it shows; written chains come when held-out read-outs are right, and read-outs stay in the mix.
"""

import copy
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmroute import hub
from mmroute.config import resolved
from mmroute.origin import origin_here
from mmroute.processes import device_named
from mmroute.tasks import _skins
from mmroute.tasks._texts import EOS, MAX_COORDINATE, VOCABULARY
from mmroute.tasks.base import Generated
from mmroute.train.decode import embed, right
from mmroute.train.exam import examine_all
from mmroute.train.examples import IGNORED, Batch, collate, item, on_canvas
from mmroute.train.fast import Positions, run_text
from mmroute.train.folder import copy_weights, write_folder
from mmroute.train.follow import Follower
from mmroute.train.loop import Journal, Optimisers, Progress, go_on, rate_at, refuse_old_run, save_state
from mmroute.train.naming import naming_loss, place_words
from mmroute.train.recipe import Phase, Recipe, as_yaml, at
from mmroute.train.small_model import MERGE, PATCH, build
from mmroute.train.stream import Stream

__all__ = ["Run", "train_backbone"]

logger = logging.getLogger(__name__)

_WORKERS = 2
"""Processes that draw items ahead where the device does not wait for Python."""
_PLACE_SEED = 1
"""Keeps the randomness of held-out items apart from that of training steps, which starts with the run's seed."""


def train_backbone(
    recipe: Recipe, out: Path, device: str = "cpu", resume: bool = False, followers: Sequence[Follower] = ()
) -> Path:
    """Trains what the recipe says, examines it, and writes the checkpoint folder `out/model`.

    Args:
        recipe: from `recipe.load_recipe`.
        out: folder of the run.
        device: `cpu`, `cuda` or `auto`.
        resume: go on from the state in `out`.
        followers: who hears each line of the log.

    Returns:
        The checkpoint folder.

    Raises:
        ConfigError, InputError: see `Run`.
        MmrouteError: the disk is full; the last state is intact.
    """
    origin = origin_here()
    run = Run(recipe, out, device, resume, followers)
    progress = run.train()
    results = {
        **origin,
        "device": run.device.type,
        "steps": progress.step,
        "cpu_s": progress.cpu_s,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "preset": recipe.preset,
        "split": "test",
        "vision_tokens": run.side**2,
        "decoding": "greedy, written chain, weights as stored (bf16), computed in fp32",
        "tasks": run.exam(),
    }
    write_folder(out / "model", run.model, as_yaml(resolved(recipe)), results)
    return out / "model"


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
            device: `cpu`, `cuda` or `auto`.
            resume: go on from the folder's state; without a state it starts at the beginning.
            followers: who hears each line of the log.

        Raises:
            ConfigError: the device is missing, or the folder's state belongs to another recipe.
            InputError: the folder holds a run and `resume` is off.
        """
        self.recipe, self.out, self.device = recipe, out, device_named(device)
        self.dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
        self.tasks: dict[str, Generated] = {
            name: hub.load("tasks", name, preset=recipe.preset) for name in recipe.tasks
        }
        self.side = next(iter(self.tasks.values())).preset.canvas
        self.index = {word: i for i, word in enumerate(VOCABULARY)}
        pixels = _skins.atlas(PATCH * MERGE)
        self.atlas = torch.tensor(pixels.reshape(-1, *pixels.shape[2:]), dtype=torch.float32, device=self.device)
        self.model = build(recipe.model, VOCABULARY, recipe.seed)
        if recipe.start is not None:
            copy_weights(recipe.start, self.model)
        self.model.to(self.device)
        self.optimisers = Optimisers(self.model, recipe.weight_decay)
        self.state = out / "state.safetensors"
        refuse_old_run(self.state, resume)
        self.progress = go_on(self.state, self.model, self.optimisers, Progress(recipe=json.dumps(resolved(recipe))))
        self.journal = Journal(out / "log.jsonl", self.progress.log_bytes, followers)
        self._held_out: dict[tuple[str, str, int], Batch] = {}

    def train(self, stop_after: int | None = None) -> Progress:
        """Runs the phases that are left, one after the other.

        Args:
            stop_after: steps after which to return early, unsaved, as if killed; for tests.
        """
        started, before = time.process_time(), self.progress.cpu_s
        progress, recipe = self.progress, self.recipe
        batches = None
        self.journal.begin(progress.step, sum(phase.steps for phase in recipe.phases))
        while progress.phase < len(recipe.phases):
            phase = recipe.phases[progress.phase]
            if batches is None:
                stream = Stream(phase, self.tasks, self.index, recipe.seed, progress.step - progress.phase_step)
                batches = stream.since(progress.phase_step, _WORKERS if self.device.type == "cuda" else 0)
            loss, place = self.step(phase, next(batches))
            progress.step += 1
            progress.phase_step += 1
            progress.cpu_s = round(before + time.process_time() - started, 1)
            entry = {"step": progress.step, "phase": phase.name, "loss": loss, "place": place}
            self.journal.write(**entry, cpu_s=progress.cpu_s)
            over = progress.phase_step == phase.steps
            if over or progress.step % recipe.eval_every == 0:
                look = self.look(phase)
                self.journal.write(step=progress.step, phase=phase.name, look=look, cpu_s=progress.cpu_s)
                logger.info("%s step %d: loss %.4f %s", phase.name, progress.step, loss, _brief(look))
                over = over or self._learned(phase, look)
            if over:
                progress.phase, progress.phase_step, batches = progress.phase + 1, 0, None
            if over or progress.step % recipe.save_every == 0:
                progress.log_bytes = self.journal.num_bytes
                save_state(self.state, self.model, self.optimisers, progress)
            if progress.step == stop_after:
                break
        return progress

    def step(self, phase: Phase, batch: Batch) -> tuple[float, float]:
        """One update on the items of this step. Returns both losses."""
        progress = self.progress
        done = progress.phase_step / phase.steps
        batch = batch.to(self.device)
        weight = at(phase.place, done)
        x = embed(self.model, batch, self.atlas, self.dtype)
        places = Positions(batch.first, batch.side, batch.ids.shape[1], self.device).ids
        h, early = run_text(self.model, x, places, self.recipe.place_layer if weight else None)
        labels = batch.labels[:, 1:]
        learned = labels != IGNORED
        loss = self._cross_entropy(h[:, :-1][learned], labels[learned])
        place = loss.new_zeros(())
        if early is not None:
            shown = early[:, batch.first : batch.first + batch.named.shape[1]]
            place = naming_loss(shown, batch.named, self.model.lm_head.weight)
        (loss + weight * place).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        share = rate_at(progress.phase_step, phase.steps, phase.warmup, phase.floor)
        self.optimisers.step(share * phase.muon, share * phase.adamw)
        return round(loss.item(), 6), round(place.item(), 6)

    def _cross_entropy(self, h: Tensor, words: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, self.model.lm_head.weight.to(h.dtype)).float(), words)

    def look(self, phase: Phase) -> dict[str, dict[str, float]]:
        """By task, on held-out items, the words before given: places found, cells read, chains without a fault."""
        side = self._side(phase)
        out: dict[str, dict[str, float]] = {}
        for name in self._trained(phase):
            probe = self._held(name, "probe", side)
            hit, learned = right(self.model, probe, self.atlas, self.dtype)
            finds = learned & torch.isin(probe.labels[:, 1:], place_words(self.index, MAX_COORDINATE).to(self.device))
            ends = learned & (probe.labels[:, 1:] == self.index[EOS])
            chain, of = right(self.model, self._held(name, "cot", side), self.atlas, self.dtype)
            out[name] = {
                "find": _share(hit, finds),
                "cell": _share(hit, learned & ~finds & ~ends),
                "chain": round(float((chain == of).all(1).float().mean()), 4),
                "word": _share(chain, of),
            }
        return out

    def exam(self) -> dict[str, dict[str, Any]]:
        """By task: accuracy of greedy chains on the split test, and with the picture blanked; bf16 weights."""
        model = copy.deepcopy(self.model).to(torch.bfloat16).float().eval()
        return examine_all(model, self.tasks, self.atlas, self.index, self.recipe.exam_items, self.recipe.exam_blank)

    def _held(self, name: str, mode: Literal["cot", "probe"], side: int) -> Batch:
        """Items to look at on a canvas of this side: of the split val on the preset's own."""
        key = (name, mode, side)
        if key not in self._held_out:
            task = self.tasks[name]
            rng = np.random.default_rng([_PLACE_SEED, side])
            if side == self.side:
                specs = [task.spec("val", i) for i in range(self.recipe.eval_items)]
            else:  # counterbalanced items need larger boards than a small canvas holds; fresh ones of the stream do
                fits = [n for n in task.sizes if n <= side]
                sizes = [fits[i % len(fits)] for i in range(self.recipe.eval_items)]
                drawn = [task.stream(rng, n, int(rng.integers(1, task.max_length(n) + 1))) for n in sizes]
                specs = [on_canvas(spec, side, rng) for spec in drawn]
            items = [item(task, spec, mode) for spec in specs]
            self._held_out[key] = collate(items, self.index).to(self.device)
        return self._held_out[key]

    def _side(self, phase: Phase) -> int:
        return min(self.side, int(at(phase.canvas, self.progress.phase_step / phase.steps)))

    def _learned(self, phase: Phase, look: dict[str, dict[str, float]]) -> bool:
        """Whether a phase that may end early is done, on every task looked at."""
        goals = {"find": phase.until_probe, "cell": phase.until_probe, "chain": phase.until_chain}
        asked = {key: goal for key, goal in goals.items() if goal is not None}
        return bool(asked) and all(values[key] >= goal for values in look.values() for key, goal in asked.items())

    def _trained(self, phase: Phase) -> list[str]:
        return [name for name in self.tasks if phase.tasks.get(name, 1.0) > 0]


def _share(hit: Tensor, of: Tensor) -> float:
    return round(float((hit & of).sum() / of.sum()), 4)


def _brief(look: dict[str, dict[str, float]]) -> str:
    return " ".join(f"{name} {' '.join(f'{k} {v:.2f}' for k, v in values.items())}" for name, values in look.items())
