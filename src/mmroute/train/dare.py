"""Trains DARE's routers on generated worlds: `mmroute train dare --recipe dare-lh`.

Stage A finds: the dense executor, noise that falls to nothing, rates that come down (vision first, then text), and
gradients for what was left out. Stage B settles: routers and rates stand still, the backbone gets used to them, hop by
hop on a cache, as inference runs. The backbone must be able to do the task unrouted before.

Legend: B batch, N columns, L layers, P vision tokens of one image.

Source: DARE trains routers and backbone together with straight-through gates.
Deviates: two stages; schedules, rates of learning and clipping are ours (see `TrainConfig`).
"""

import json
import logging
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor, nn

from mmroute import recipe as recipes
from mmroute.bench.items import load_task
from mmroute.bench.schema import commit_of_source
from mmroute.cache import Chunk
from mmroute.config import options, parse
from mmroute.engine.attach import Routed, attach
from mmroute.engine.saving import load as load_parts
from mmroute.errors import ConfigError, InputError
from mmroute.prune._gates import Relaxation
from mmroute.prune.dare import Dare
from mmroute.tasks.base import Generated, Spec
from mmroute.tokens import Modality, Tokens
from mmroute.train.chains import Chains, Writer
from mmroute.train.delta import save_delta, tuned
from mmroute.train.examples import IGNORED
from mmroute.train.loop import Journal, Optimisers, Progress, load_state, rate_at, replacing, save_state
from mmroute.train.recipe import as_yaml
from mmroute.train.tuning import Tuning

__all__ = ["DareRun", "TrainConfig", "train_dare"]

logger = logging.getLogger(__name__)

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
_LORA_TARGETS = "qkvo"


@options
class TrainConfig:
    """The `train` section of a recipe."""

    tasks: dict[str, Annotated[float, Field(gt=0)]]
    """Weight of each world, `name` or `name:preset`."""
    start: str | None = None
    """Folder `router` of an earlier run: this one begins with its routers, rates and backbone; fresh ones if not given.
    Then `noise` is best 0 and both ramps [0, 0]: new noise undoes what was found."""
    steps: Annotated[int, Field(ge=1)] = 400
    batch: Annotated[int, Field(ge=1)] = 24
    dense_share: Share = 0.5
    """Share of the steps that is stage A."""
    vision_ramp: tuple[Share, Share] = (0.0, 0.25)
    """Where in stage A the vision rate comes down from 1."""
    text_ramp: tuple[Share, Share] = (0.40, 0.65)
    noise: Annotated[float, Field(ge=0)] = 1.0
    """Scale of the logistic noise at the start; gone at `noise_until`."""
    noise_until: Rate = 0.8
    temperature: tuple[Rate, Rate] = (1.0, 0.3)
    """At the start, and from `temperature_until` on."""
    temperature_until: Rate = 0.9
    router_lr: Rate | None = None
    """Peak rate of the routers; 1.28 / hidden size if not given."""
    rate_lr: Rate = 0.05
    """Peak rate of the keep rates' logits."""
    gate_clip: Share = 0.98
    """Quantile at which each layer's gate gradients are clipped."""
    hard_weight: Annotated[float, Field(ge=0)] = 1.0
    ratio_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the pull to the targets; `penalty` and `bernoulli` need one, `learned` meets the mean without."""
    ratio_layers: Literal["early", "all"] = "early"
    """Whether deep vision is pulled too."""
    backbone: Literal["full", "lora", "frozen"] = "full"
    muon: Rate = 2e-3
    """Peak rate of the backbone's matrices under `full`."""
    adamw: Rate = 5e-4
    """Peak rate of the rest under `full`, of everything under `lora`."""
    lora_rank: Annotated[int, Field(ge=1)] = 8
    warmup: Annotated[int, Field(ge=1)] = 15
    floor: Share = 0.05
    """Share of the peak at the end of the cosine."""
    clip: Rate = 1.0
    """Largest norm of the backbone's gradient."""
    seed: Annotated[int, Field(ge=0)] = 0
    save_every: Annotated[int, Field(ge=1)] = 50
    eval_every: Annotated[int, Field(ge=1)] = 100
    eval_items: Annotated[int, Field(ge=1)] = 48
    """Held-out items per task at each look."""


def train_dare(recipe: recipes.Recipe, model: Any, out: Path, resume: bool = False) -> Path:
    """Trains what a recipe says and writes `out/router`: routers, rates, and the backbone's new weights if it learned.

    Args:
        recipe: prunes with `dare` and has a `train` section.
        model: a loaded stock model with its processor; its weights are put back at the end.
        out: folder of the run.
        resume: go on from the state in `out`.

    Returns:
        The folder that a recipe's `trained` takes.

    Raises:
        ConfigError: the recipe is no recipe of DARE, or the folder's state belongs to another one.
        InputError: the folder holds a run and `resume` is off.
    """
    commit, dirty = commit_of_source()
    with DareRun(recipe, model, out, resume) as run:
        run.train()
        look = run.look(4 * run.config.eval_items)
        results = {
            "command": "mmroute " + " ".join(sys.argv[1:]),
            "commit": commit,
            "dirty": dirty,
            "base": model.config.name_or_path,
            "steps": run.progress.step,
            "cpu_s": run.progress.cpu_s,
            "rates": run.pruner.rates.table().tolist(),
            "held_out": "teacher-forced chains of the split val, every word right; hop by hop on a cache",
            "tasks": look,
        }
        return run.write(results)


class DareRun:
    """One run in one folder: `state.safetensors`, `log.jsonl`, and at its end `router`."""

    def __init__(self, recipe: recipes.Recipe, model: Any, out: Path, resume: bool = False) -> None:
        """Opens the folder and attaches the model; see `train_dare`. Use it as a context manager."""
        pruner = recipe.build("prune")
        if not isinstance(pruner, Dare) or recipe.train is None:
            raise ConfigError(f"recipe {recipe.name}: training needs prune.name dare and a section `train`")
        self.recipe, self.out, self.pruner = recipe, out, pruner
        self.config = parse(TrainConfig, recipe.train, "train")
        self.state = out / "state.safetensors"
        if self.state.exists() and not resume:
            raise InputError(f"{out} holds a run already; add --resume to go on with it, or give another --out")
        self.tasks: dict[str, Generated] = {}
        for name in self.config.tasks:
            task = load_task(name)
            if not isinstance(task, Generated):
                raise ConfigError(f"train.tasks: {name} is no generated world; those know the right chains")
            self.tasks[name] = task
        if self.config.start is not None and self.config.backbone == "lora":
            raise ConfigError("train.start brings weights that adapters would hide; give train.backbone full or frozen")
        self.model, self._stack = model, ExitStack()
        rank = self.config.lora_rank
        self.tuning = Tuning(model, self.config.backbone, rank, 2 * rank, _LORA_TARGETS, self.config.seed, False)
        backbone = Optimisers(model, 0.01) if self.config.backbone != "frozen" else None
        self.routed: Routed = attach(model, prune=pruner, prefix_tokens=recipe.prefix_tokens, executor="dense")
        self._stack.callback(self._restore)
        if self.config.start is not None:
            load_parts(self.routed, self.config.start)
            self._stack.enter_context(tuned(model, Path(self.config.start)))
        self.learners = _Learners(backbone, pruner, self.config, self.routed.controller.shape.hidden)
        self.writer = Writer(self.routed, recipe.build("think"))
        self.progress = Progress(recipe=json.dumps(asdict(replace(recipe, trained=None))))
        if resume and self.state.exists():
            saved = load_state(self.state, model, self.learners)  # type: ignore[arg-type]
            if saved.recipe != self.progress.recipe:
                self._stack.close()
                raise ConfigError(f"{out} was started with another recipe; give the same one, or another --out")
            self.progress = saved
        self.journal = Journal(out / "log.jsonl", self.progress.log_bytes)
        self._held: dict[tuple[str, int], Chains] = {}

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
                save_state(self.state, self.model, self.learners, progress)  # type: ignore[arg-type]
            if progress.step == stop_after:
                break
        return progress

    def step(self) -> dict[str, Any]:
        """One update; what it draws depends on the seed and the step alone."""
        config, step = self.config, self.progress.step
        finding = step < self.dense_steps
        batch = self.writer.batch(self._drawn(np.random.default_rng([config.seed, step])))
        self.model.train()
        learns = finding and self.pruner.config.scorer == "router"
        if learns:
            self.pruner.relax = self._relaxation(step / max(self.dense_steps, 1))
            h = self._one_pass(batch)
        else:
            self.pruner.relax = Relaxation(settled=True)
            self.pruner.export()
            with warnings.catch_warnings():  # a control has frozen parts by design
                warnings.filterwarnings("ignore", "training with every routing part frozen")
                h = self._hop_by_hop(batch, differentiable=True)
        loss, _ = self._loss(h, batch)
        parts: dict[str, float] = {}
        total = loss
        for name, value in self._auxiliary().items() if learns else ():
            weight = config.hard_weight if name == "hard" else config.ratio_weight
            if name == "ratio_vision_deep" and config.ratio_layers == "early":
                weight = 0.0
            total = total + weight * value
            parts[name] = round(value.item(), 6)
        entry: dict[str, Any] = {"stage": "A" if finding else "B", "loss": round(loss.item(), 6), **parts}
        if total.requires_grad:
            total.backward()
            entry |= self.learners.step(rate_at(step, config.steps, config.warmup, config.floor), learns)
        if learns:
            relax = self.pruner.relax
            entry |= {"temperature": round(relax.temperature, 4), "noise": round(relax.noise, 4)}
            entry |= {"ramp": {"vision": round(relax.vision_ramp, 3), "text": round(relax.text_ramp, 3)}}
            tokens = self.routed.controller.tokens
            assert tokens is not None
            self.pruner.observe(tokens, self.routed.controller.aux)
            if (step + 1) % 25 == 0:
                entry |= self._report(batch, tokens)
        return entry

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
            generator=torch.Generator().manual_seed(seed),
        )

    # ------------------------------------------------------------------ passes

    def _one_pass(self, batch: Chains) -> Float[Tensor, "B N D"]:
        """All hops at once; the gates stand for hop closes."""
        return self.routed.controller.base(
            **self._given(batch),
            attention_mask=batch.mask,
            position_ids=batch.positions,
            hop_ids=batch.hop,
            generated=batch.generated,
            use_cache=False,
        ).last_hidden_state

    def _given(self, batch: Chains) -> dict[str, Tensor]:
        if "inputs_embeds" not in batch.inputs:
            return {"input_ids": batch.ids, **batch.inputs}
        return {**batch.inputs, "modality": batch.modality, "protected": self._delimiters(batch)}

    def _delimiters(self, batch: Chains) -> Bool[Tensor, "B N"]:
        return self.routed.controller.delimiters[batch.ids]

    def _hop_by_hop(self, batch: Chains, differentiable: bool) -> Float[Tensor, "B N D"]:
        """As inference runs: each hop enters the cache, and is closed before the next but one reads it."""
        cache = self.routed.new_cache(differentiable=differentiable)
        out = []
        for h, (start, end) in enumerate(batch.spans):
            if h >= 2 and self.pruner.closes:
                cache.close_hop(self.pruner, [h - 1] * len(batch.ids))
            here = slice(start, end)
            cache.next = Chunk(
                modality=batch.modality[:, here],
                hop=batch.hop[:, here],
                valid=batch.mask[:, here],
                protected=self._delimiters(batch)[:, here],
                generated=batch.generated[:, here],
            )
            given: dict[str, Any] = {"input_ids": batch.ids[:, here]}
            if "inputs_embeds" in batch.inputs:
                given = {"inputs_embeds": batch.inputs["inputs_embeds"][:, here]}
            elif h == 0:
                given |= {k: v[:, here] if k == "mm_token_type_ids" else v for k, v in batch.inputs.items()}
            call = self.routed.controller.base(
                **given,
                attention_mask=batch.mask[:, :end],
                position_ids=batch.positions[..., here],
                past_key_values=cache,
            )
            out.append(call.last_hidden_state)
        return torch.cat(out, dim=1)

    def _loss(self, h: Float[Tensor, "B N D"], batch: Chains) -> tuple[Tensor, Bool[Tensor, "B N"]]:
        """Cross-entropy of the words to write, and which of them are the most likely ones."""
        column = torch.arange(h.shape[1], device=h.device)
        last = torch.where(batch.mask.bool(), column, -1).cummax(1).values
        before = torch.cat([last.new_zeros(len(last), 1), last[:, :-1]], dim=1)  # gaps lie between hops
        learned = batch.labels != IGNORED
        at = h.gather(1, before[..., None].expand(-1, -1, h.shape[-1]))[learned]
        logits = self.model.get_output_embeddings()(at).float()
        right = learned.clone()
        right[learned] = logits.argmax(-1) == batch.labels[learned]
        return F.cross_entropy(logits, batch.labels[learned]), right

    def _auxiliary(self) -> dict[str, Tensor]:
        """The routing losses by name, mean over the layers that have them."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        for keep in self.routed.controller.aux.values():
            for name, value in keep.losses.items():
                found[name].append(value)
        return {name: torch.stack(values).mean() for name, values in found.items()}

    # ------------------------------------------------------------------ looking

    @torch.no_grad()
    def look(self, items: int) -> dict[str, dict[str, Any]]:
        """By task, on held-out items and as inference runs: chains and words right, and what was kept."""
        self.model.eval()
        self.routed.full_trace = True
        out = {}
        for name, task in self.tasks.items():
            chains, words, seen = [], [], []
            for start in range(0, items, 48):
                key = (name, start)
                if key not in self._held:
                    specs = [task.spec("val", i) for i in range(start, min(start + 48, items))]
                    self._held[key] = self.writer.batch([(task, spec) for spec in specs])
                batch = self._held[key]
                _, right = self._loss(self._hop_by_hop(batch, differentiable=False), batch)
                learned = batch.labels != IGNORED
                chains += (right | ~learned).all(1).tolist()
                words.append(float((right & learned).sum() / learned.sum()))
                seen.append(self._kept_at_inference(batch))
            out[name] = {
                "n": len(chains),
                "chain": round(float(np.mean(chains)), 4),
                "word": round(float(np.mean(words)), 4),
                **{key: np.round(np.mean([s[key] for s in seen], 0), 3).tolist() for key in seen[0]},
            }
        self.routed.full_trace = False
        return out

    def _kept_at_inference(self, batch: Chains) -> dict[str, list[float]]:
        """By layer: shares that entered, and what is still cached of the text at the end."""
        trace = self.routed.trace
        assert trace is not None
        call, tokens = trace.calls[0], _tokens(batch)
        masks = {}
        for index, layer in enumerate(call.layers):
            mask = torch.zeros_like(tokens.valid)
            for row, columns in enumerate(layer.kept or []):
                mask[row, columns] = True
            masks[index] = mask
        found = _shares(tokens, masks, batch)
        end = trace.calls[-1].layers
        total = batch.mask.sum()
        found["cached"] = [sum(layer.stored) / float(total) for layer in end]
        return found

    def _report(self, batch: Chains, tokens: Tokens) -> dict[str, Any]:
        """What stage A kept in this step, by layer."""
        masks = {i: keep.mask for i, keep in self.routed.controller.aux.items()}
        found = {key: np.round(values, 3).tolist() for key, values in _shares(tokens, masks, batch).items()}
        rates = self.pruner.rates.table().detach().float()
        logits = {i: keep.logits for i, keep in self.routed.controller.aux.items()}
        spread = [value.detach()[tokens.valid].std().item() for value in logits.values() if value is not None]
        return {
            "layers": sorted(masks),
            **found,
            "rates": [[[round(float(x), 4) for x in layers] for layers in hops[:4]] for hops in rates],
            "logit_std": [round(x, 3) for x in spread],
        }

    # ------------------------------------------------------------------ writing

    def write(self, results: Mapping[str, Any]) -> Path:
        """`out/router`: what was added, the recipe, the figures, and the backbone's new weights if it learned."""
        folder = self.out / "router"
        self.model.eval()
        self.routed.save_pretrained(folder)
        save_delta(folder, self.tuning.before, self.tuning.weights(), self.model.config.name_or_path)
        recipe = {k: v for k, v in asdict(replace(self.recipe, trained=None)).items() if v is not None}
        about = {"recipe.yaml": as_yaml(_plain(recipe)), "RESULTS.json": json.dumps(results, indent=1) + "\n"}
        for name, text in about.items():
            with replacing(folder / name) as beside:
                beside.write_text(text)
        return folder


class _Learners:
    """Everything that an update moves, and what a resumed run needs of it."""

    def __init__(self, backbone: Optimisers | None, pruner: Dare, config: TrainConfig, hidden: int) -> None:
        self.backbone, self.pruner, self.config = backbone, pruner, config
        rows = list(pruner.router.parameters())
        taken = {id(p) for p in rows}
        rates = [p for p in pruner.parameters() if id(p) not in taken]
        groups = [{"params": rows, "peak": config.router_lr or 1.28 / hidden}]
        if rates:
            groups.append({"params": rates, "peak": config.rate_lr})
        self.routers = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, share: float, routers: bool) -> dict[str, float]:
        """One update at this share of the peak rates; clears the gradients. Returns gradient norms."""
        norms = {}
        if self.backbone is not None:
            both = (self.backbone.muon, self.backbone.adamw)
            weights = [p for optimiser in both for group in optimiser.param_groups for p in group["params"]]
            norms["grad_backbone"] = round(float(nn.utils.clip_grad_norm_(weights, self.config.clip)), 4)
            if self.config.backbone == "full":
                self.backbone.step(share * self.config.muon, share * self.config.adamw)
            else:
                self.backbone.step(share * self.config.adamw, share * self.config.adamw)
        if routers:
            sizes = []
            for name, p in self.pruner.router.named_parameters():
                if p.grad is not None and name.endswith("weight"):
                    size = p.grad.norm(dim=1, keepdim=True)
                    sizes.append(float(size.max()))
                    p.grad.div_(size.clamp_min(1.0))
            norms["grad_router"] = round(max(sizes, default=0.0), 4)
            for group in self.routers.param_groups:
                group["lr"] = share * group["peak"]
            self.routers.step()
        self.routers.zero_grad(set_to_none=True)
        return norms

    def tensors(self) -> dict[str, Tensor]:
        """All moments and the pruner's averages, by name."""
        out = {} if self.backbone is None else {f"backbone.{k}": v for k, v in self.backbone.tensors().items()}
        for index, state in self.routers.state_dict()["state"].items():
            out |= {f"router.{index}.{key}": value for key, value in state.items()}
        return out | {f"average.{name}": value for name, value in self.pruner.named_buffers()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes what `tensors` gave."""
        by_owner: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            owner, _, rest = name.partition(".")
            by_owner[owner][rest] = value
        if self.backbone is not None:
            self.backbone.load(by_owner["backbone"])
        state: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, value in by_owner["router"].items():
            index, key = name.split(".", 1)
            state[int(index)][key] = value
        self.routers.load_state_dict({"state": dict(state), "param_groups": self.routers.state_dict()["param_groups"]})
        for name, value in self.pruner.named_buffers():
            value.copy_(by_owner["average"][name])


def _tokens(batch: Chains) -> Tokens:
    valid = batch.mask.bool()
    nothing = torch.zeros_like(valid)
    position = torch.arange(valid.shape[1], device=valid.device).expand_as(batch.ids)
    return Tokens(batch.modality, batch.hop, valid, nothing, batch.generated, position)


def _shares(tokens: Tokens, masks: Mapping[int, Bool[Tensor, "B N"]], batch: Chains) -> dict[str, list[float]]:
    """By layer, of the prompt: share of vision and text that ran, and recall, precision and lift of what is needed."""
    given = tokens.valid & ~tokens.generated
    vision = given & (tokens.modality == Modality.VISION)
    text = given & (tokens.modality == Modality.TEXT)
    out: dict[str, list[float]] = defaultdict(list)
    for mask in masks.values():
        kept = float((mask & vision).sum() / vision.sum())
        out["vision"].append(kept)
        out["text"].append(float((mask & text).sum() / text.sum()))
        for name, truth in (("needed", batch.needed), ("board", batch.board)):
            if truth is None:
                continue
            chosen = mask[vision].view(truth.shape)
            hit = float((chosen & truth).sum())
            recall = hit / float(truth.sum())
            out[f"{name}_recall"].append(recall)
            out[f"{name}_precision"].append(hit / max(float(chosen.sum()), 1.0))
            out[f"{name}_lift"].append(recall / kept if kept else 0.0)
    return dict(out)


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML can write."""
    return json.loads(json.dumps(value))
