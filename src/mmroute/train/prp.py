"""Trains the rater of a draft: `mmroute train prp --recipe prp-small --draft DIR --target DIR`.

Both models answer questions that neither was trained on; what they get right are the labels. The draft is frozen: its
prompts are read once, and each step runs one position on those caches. Labels limit it, not steps.

Legend: n queries, B batch, N columns, K levels.

Source: PRP (arXiv 2606.30217), draft and joint rating learning.
Deviates: see `train.rating`; calibration on a split of its own is ours.
"""

import logging
import math
from dataclasses import asdict, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from mmroute.bench import reliability
from mmroute.bench.outcomes.base import Outcomes, Row, content_hash, pair_up, split_of_group, write_parquet
from mmroute.config import options, parse, resolved
from mmroute.engine.attach import attach
from mmroute.errors import ConfigError, InputError, MissingExtra
from mmroute.gate.base import Ratings
from mmroute.gate.prp import Prp, fingerprint
from mmroute.origin import commit_of_source
from mmroute.recipe import Recipe
from mmroute.tasks._mixture import Part, draw_mixture
from mmroute.train import rating
from mmroute.train.collect import collect
from mmroute.train.grpo import fit_rollouts
from mmroute.train.prompts import Prompts, chats_of
from mmroute.train.stopping import Best

__all__ = ["GateConfig", "PrpConfig", "fit", "sections", "train_prp"]

log = logging.getLogger(__name__)

_SPLITS = (("train", 0.65), ("validation", 0.1), ("calibration", 0.25))


@options
class PrpConfig:
    """The `train` section of a recipe."""

    objective: Literal["all_action", "grpo", "ce"] = "all_action"
    eta: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the entropy in `all_action`; 0 ends in one level."""
    rank: Literal["soft_pair", "pair", "none"] = "soft_pair"
    """Loss on differences of advantages; with one rating, on differences of difficulty."""
    rank_weight: Annotated[float, Field(ge=0)] = 0.5
    rank_temperature: Annotated[float, Field(gt=0)] = 0.2
    group_size: Annotated[int, Field(ge=2)] = 8
    """Samples per query in `grpo`."""
    replace: Literal["dynamic", "none"] = "dynamic"
    """Whether groups whose samples agree get two of them replaced, with a probability that falls to 0."""
    lr: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    batch: Annotated[int, Field(ge=2)] = 128
    warmup: Annotated[int, Field(ge=1)] = 30
    max_epochs: Annotated[int, Field(ge=1)] = 60
    patience: Annotated[int, Field(ge=1)] = 5
    """Epochs without a better validation error after which training ends."""
    seed: Annotated[int, Field(ge=0)] = 0
    n: Annotated[int, Field(ge=8)] = 4000
    """Labelled questions."""
    rollouts: bool = False
    """`grpo` on answers sampled as it goes (`train.grpo`), instead of the labels alone: slow, as the paper does it."""
    rating_reward: Literal["brier_group", "brier_own", "l1"] = "brier_group"
    """With `rollouts`: what a rating is held to; see `train.grpo.rewards`."""
    train_reasoning: bool = False
    """With `rollouts`: answers are trained too, and the draft changes."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """With `rollouts`: how far a probability may move on one batch."""
    beta: Annotated[float, Field(ge=0)] = 0.02
    """With `train_reasoning`: weight of the divergence from the draft as it was."""
    updates: Annotated[int, Field(ge=1)] = 2
    """With `rollouts`: steps on each batch."""
    lr_reasoning: Annotated[float, Field(gt=0)] = 1e-5
    """With `train_reasoning`: of the draft's weights."""
    samples_draft: Annotated[int, Field(ge=1)] = 1
    samples_target: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Of the answers; collect with the settings you serve with."""


@options
class GateConfig:
    """The `gate` section of a recipe."""

    draft: str = "small-draft"
    """Bundled name, folder or Hub id of the small model."""
    target: str = "small-target"
    """Of the large one."""
    rater: str = ""
    """Folder, or bundled name, of a trained rater."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What both models compute in; None is their checkpoints' own."""
    method: dict[str, Any] = field(default_factory=dict)
    """Options of the gate `prp`."""
    policy: dict[str, Any] = field(default_factory=lambda: {"name": "budget"})
    """Name and options of the policy."""
    mix: list[Part]
    """What is asked."""


# ---------------------------------------------------------------------- learning


def fit(
    gate: Prp,
    prompts: Prompts,
    success: Float[np.ndarray, "n R"],
    ranked: Float[np.ndarray, "n R"],
    train: np.ndarray,
    validation: np.ndarray,
    config: PrpConfig,
) -> list[float]:
    """Trains the gate's rater; the draft's weights are not touched. Ends with the weights of the best epoch.

    Args:
        gate: bound to the draft.
        prompts: what the draft has read.
        success: of draft and target (or of the draft alone), unsmoothed.
        ranked: the same, drawn towards the mean of their cell; for the loss on differences.
        train: which prompts.
        validation: which to stop by.
        config: how.

    Returns:
        The validation error after each epoch: mean squared distance of the score to the advantage.
    """
    if not train.any() or not validation.any():
        raise InputError(f"{train.sum()} questions to train on, {validation.sum()} to stop by; collect more")
    assert gate.rater is not None
    rater, device = gate.rater, prompts.mask.device
    R = gate.config.num_ratings
    y = torch.tensor(success[:, :R], dtype=torch.float32, device=device)
    a = rating.gain(torch.tensor(ranked[:, :R], dtype=torch.float32, device=device))
    held = torch.tensor(np.flatnonzero(validation), device=device)
    order = np.flatnonzero(train)
    optimiser = torch.optim.AdamW(rater.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    steps = math.ceil(len(order) / config.batch)
    total, step = steps * config.max_epochs, 0
    shuffle, draw = np.random.default_rng(config.seed), torch.Generator().manual_seed(config.seed)
    frozen = [p for p in gate.model.parameters() if p.requires_grad]
    best = Best(rater, config.patience)
    try:
        for p in frozen:
            p.requires_grad_(False)
        for epoch in range(config.max_epochs):
            for part in np.array_split(shuffle.permutation(order), steps):
                index = torch.tensor(part, device=device)
                for group in optimiser.param_groups:
                    group["lr"] = config.lr * _rate(step, total, config.warmup)
                logp = prompts.rate(gate, index)
                loss = _objective(logp, y[index], config, step / total, draw)
                if config.rank != "none" and config.rank_weight:
                    ranking = rating.soft_pair if config.rank == "soft_pair" else rating.pair_loss
                    u = rating.gain(_read(logp.exp()))
                    loss = loss + config.rank_weight * ranking(u, a[index], config.rank_temperature)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(rater.parameters(), 1.0)
                optimiser.step()
                step += 1
            with torch.no_grad():
                said = torch.cat([_read(prompts.rate(gate, part).exp()) for part in held.split(256)])
            error = float(((rating.gain(said) - rating.gain(y[held])) ** 2).mean())
            log.info("epoch %d: validation error %.4f", epoch + 1, error)
            if best.is_over(error):
                break
    finally:
        for p in frozen:
            p.requires_grad_(True)
    return best.put_back()


def _read(probs: Float[Tensor, "B R K"]) -> Float[Tensor, "B R"]:
    return probs @ rating.levels(probs.shape[-1], probs)


def _objective(logp: Tensor, y: Tensor, config: PrpConfig, done: float, draw: torch.Generator) -> Tensor:
    if config.objective == "all_action":
        return rating.all_action(logp, y, config.eta)
    if config.objective == "ce":
        return rating.cross_entropy(logp, y)
    replace = 1 - done if config.replace == "dynamic" else 0.0
    return rating.grpo(logp, y, config.group_size, replace, draw)[0]


def _rate(step: int, total: int, warmup: int) -> float:
    """Up in a line, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


# ---------------------------------------------------------------------- the whole way


def train_prp(recipe: Recipe, draft: Any, target: Any, out: Path, resume: bool = False) -> Path:
    """Collects, trains, calibrates and writes `out/rater`; outcomes in `out/outcomes`, a changed draft in `out/draft`.

    Args:
        recipe: with sections `gate` and `train`.
        draft: a loaded model with its processor.
        target: likewise.
        out: folder of the run.
        resume: go on collecting where the run in `out` stands.

    Raises:
        ConfigError: the recipe has no gate, or an option that is not allowed.
        InputError: the folder holds a run and `resume` is off, or there are too few questions.
    """
    gated, config = sections(recipe)
    gate = Prp(**gated.method).bind(draft, config.seed)
    files = {role: out / "outcomes" / f"{role}.jsonl" for role in ("draft", "target")}
    if any(file.exists() for file in files.values()) and not resume:
        raise InputError(f"{out} holds a run already; add --resume to go on with it, or give another --out")
    files["draft"].parent.mkdir(parents=True, exist_ok=True)
    items, think = draw_mixture(gated.mix, config.n, "val", config.seed), recipe.build("think")

    def asked(role: str, model: Any, name: str, samples: int) -> list[Row]:
        with attach(model) as routed:
            told = partial(log.info, "%s: %d of %d answers", role)
            drawn: dict[str, Any] = {"samples": samples, "temperature": config.temperature, "progress": told}
            return collect(routed, role, name, items, think=think, file=files[role], **drawn).rows

    answers = asked("draft", draft, gated.draft, config.samples_draft)
    others = asked("target", target, gated.target, config.samples_target)
    outcomes, chats = pair_up([*answers, *others]), chats_of(draft, items, think)
    splits = np.array([split_of_group(group, _SPLITS) for group in outcomes.groups])
    success = np.stack([outcomes.draft, outcomes.target], 1)
    cells = [f"{task} {level}" for task, level in zip(outcomes.tasks, outcomes.levels, strict=True)]
    counts = (config.samples_draft, config.samples_target)
    ranked = np.stack([rating.shrunk(success[:, i], cells, counts[i]) for i in range(2)], 1)
    parts = splits == "train", splits == "validation"
    if config.rollouts:
        errors = fit_rollouts(gate, items, chats, success, *parts, config, think.max_new_tokens)
    else:
        errors = fit(gate, Prompts.read(draft, chats), success, ranked, *parts, config)
    if config.train_reasoning:  # the draft answers otherwise now: what is calibrated and published is of this one
        draft.save_pretrained(out / "draft")
        draft.processor.save_pretrained(out / "draft")
        answers = asked("draft", draft, gated.draft, config.samples_draft)
        outcomes = pair_up([*answers, *others])
    rows, prompts = [*answers, *others], Prompts.read(draft, chats)
    try:
        write_parquet(rows, out / "outcomes.parquet")
    except MissingExtra as error:
        log.info("%s; the outcomes stay in JSONL", error)
    gate.facts = _facts(gate, prompts, outcomes, splits == "calibration") | {
        "pair": {"draft": gated.draft, "target": gated.target, "target_weights": fingerprint(target)},
        "generation": rows[0].generation,
        "mix": [resolved(part) for part in gated.mix],
        "train": resolved(config),
        "epochs": len(errors),
        "validation_error": min(errors),
        "outcomes_sha256": content_hash(rows),
        "commit": commit_of_source()[0],
    }
    gate.save(out / "rater")
    return out / "rater"


def sections(recipe: Recipe) -> tuple[GateConfig, PrpConfig]:
    """The parsed `gate` and `train` sections.

    Raises:
        ConfigError: there is no gate, or an option that is not allowed.
    """
    if recipe.gate is None:
        raise ConfigError(f"recipe {recipe.name} has no gate; use prp-small, or a file with a `gate` section")
    gated, config = parse(GateConfig, recipe.gate, "gate"), parse(PrpConfig, recipe.train or {}, "train")
    if config.rollouts and config.objective != "grpo":
        raise ConfigError(f"train.rollouts are those of objective grpo, given {config.objective}; set one of the two")
    if config.train_reasoning and not config.rollouts:
        raise ConfigError("train.train_reasoning needs answers to train on; add train.rollouts=true")
    return gated, config


def _facts(gate: Prp, prompts: Prompts, outcomes: Outcomes, calibration: np.ndarray) -> dict[str, Any]:
    """Fits the calibration maps; quantiles of the score for thresholds, mean costs, and figures on that split."""
    probs = prompts.probs(gate)
    context = int(prompts.mask.sum(1).float().mean())
    raw = gate.ratings(probs, context)
    sides = [(raw.draft, outcomes.draft), (raw.target, outcomes.target)][: gate.config.num_ratings]
    gate.calibrate([r[calibration] for r, _ in sides if r is not None], [y[calibration] for _, y in sides])
    rated: Ratings = gate.ratings(probs, context)
    score = rated.score[calibration]
    figures = {
        name: reliability.reliability(r[calibration], y[calibration]).to_dict()
        for name, r, y in (("draft", rated.draft, outcomes.draft), ("target", rated.target, outcomes.target))
        if r is not None
    }
    unit = float(outcomes.target_cost.mean())
    return {
        "quantiles": np.quantile(score, np.linspace(0, 1, 101)).tolist(),
        "costs": [float(outcomes.draft_cost.mean()) / unit, 1.0],
        "n": {"all": len(outcomes), "calibration": int(calibration.sum())},
        "calibration": figures,
        "collapse": asdict(reliability.collapse(probs[:, 0].cpu().numpy())),
    }
