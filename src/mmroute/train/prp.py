"""Trains the rater of a draft: `mmroute train prp --recipe prp-small --draft DIR --target DIR`.

Both models answer questions that neither was trained on; what they get right are the labels. The draft is frozen: its
prompts are read once, and each step runs one position on those caches. Labels limit it, not steps. With
`--set gate.form=tokens` the draft itself learns to write its ratings (`train.tokens`).

Legend: n queries, B batch, N columns, K levels.

Source: PRP (arXiv 2606.30217), draft and joint rating learning.
Deviates: see `train.rating`; calibration on a split of its own is ours.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from mmroute.bench import deferral, reliability
from mmroute.bench.outcomes.base import Outcomes, Row, content_hash, pair_up, split_of_group, write_parquet
from mmroute.config import resolved
from mmroute.engine.attach import attach
from mmroute.errors import InputError, MissingExtra
from mmroute.gate._digits import Digits
from mmroute.gate._suffix import Suffix
from mmroute.gate._verify import Verifier
from mmroute.gate.base import Ratings
from mmroute.gate.prp import Prp, fingerprint
from mmroute.origin import commit_of_source
from mmroute.recipe import Recipe
from mmroute.tasks._mixture import draw_mixture
from mmroute.train import rating
from mmroute.train.collect import collect
from mmroute.train.grpo import fit_rollouts
from mmroute.train.prompts import Prompts, chats_of
from mmroute.train.prp_config import PrpConfig, sections
from mmroute.train.stopping import Best
from mmroute.train.tokens import answers_of, fit_tokens

__all__ = ["fit", "train_prp"]

log = logging.getLogger(__name__)

_LOOKED_AT = 256
"""Held-out answers that a trained draft is compared on."""
_POINTS = 21
"""Shares at which the artifact says how accurate routing was."""
_SPLITS = (("train", 0.65), ("validation", 0.1), ("calibration", 0.25))


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
    assert isinstance(gate.reader, Suffix)
    rater, device = gate.reader, prompts.mask.device
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
    averaged = AveragedModel(rater, avg_fn=partial(_average, config.average))
    best = Best(averaged.module, config.patience)
    try:
        for p in frozen:
            p.requires_grad_(False)
        for epoch in range(config.max_epochs):
            for part in np.array_split(shuffle.permutation(order), steps):
                index = torch.tensor(part, device=device)
                for group in optimiser.param_groups:
                    group["lr"] = config.lr * _rate(step, total, config.warmup)
                logp = prompts.rate(gate, index)
                loss = rating.objective(logp, y[index], a[index], config, step / total, draw)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(rater.parameters(), 1.0)
                optimiser.step()
                averaged.update_parameters(rater)
                step += 1
            gate.reader = cast(Suffix, averaged.module)
            with torch.no_grad():
                said = torch.cat([rating.read(prompts.rate(gate, part)) for part in held.split(256)])
            gate.reader = rater
            error = float(((rating.gain(said) - rating.gain(y[held])) ** 2).mean())
            log.info("epoch %d: validation error %.4f", epoch + 1, error)
            if best.is_over(error):
                break
    finally:
        gate.reader = rater
        for p in frozen:
            p.requires_grad_(True)
    errors = best.put_back()
    rater.load_state_dict(averaged.module.state_dict())
    return errors


def _average(share: float, mean: Tensor, new: Tensor, num: Tensor) -> Tensor:
    """A moving mean of weights that forgets its first ones sooner."""
    kept = min(share, (1 + float(num)) / (10 + float(num)))
    return kept * mean + (1 - kept) * new


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
    gate = Prp(**{"form": gated.form, **gated.method}).bind(draft, config.seed)
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
    about: dict[str, Any] = {}
    if isinstance(gate.reader, Digits):
        wrote = answers_of(gate, chats, think.max_new_tokens)
        errors = fit_tokens(gate, chats, wrote, success, ranked, *parts, config)
        draft.processor.chat_template = gate.reader.template
        about["answers"] = _kept(gate, chats, wrote, splits == "calibration", think.max_new_tokens)
    elif config.rollouts:
        errors = fit_rollouts(gate, items, chats, success, *parts, config, think.max_new_tokens)
    else:
        errors = fit(gate, Prompts.of(gate, chats), success, ranked, *parts, config)
    if config.train_reasoning or gate.config.form == "tokens":
        # The draft answers otherwise now: what is calibrated and published is of this one.
        draft.save_pretrained(out / "draft")
        draft.processor.save_pretrained(out / "draft")
        answers = asked("draft", draft, gated.draft, config.samples_draft)
        outcomes = pair_up([*answers, *others])
    rows, prompts = [*answers, *others], Prompts.of(gate, chats)
    try:
        write_parquet(rows, out / "outcomes.parquet")
    except MissingExtra as error:
        log.info("%s; the outcomes stay in JSONL", error)
    gate.facts = (
        _facts(gate, prompts, outcomes, splits == "calibration")
        | about
        | {
            "pair": {"draft": gated.draft, "target": gated.target, "target_weights": fingerprint(target)},
            "generation": rows[0].generation,
            "mix": [resolved(part) for part in gated.mix],
            "train": resolved(config),
            "epochs": len(errors),
            "validation_error": min(errors),
            "outcomes_sha256": content_hash(rows),
            "commit": commit_of_source()[0],
        }
    )
    gate.save(out / "rater")
    return out / "rater"


def _kept(
    gate: Prp, chats: Sequence[Any], wrote: Sequence[list[int]], held: np.ndarray, max_new_tokens: int
) -> dict[str, float]:
    """Share of held-out answers that are word for word what the draft wrote before it learned to rate.

    `plain`: nobody asks for a rating; `rated`: behind the rating, which is then taken off.
    """
    index = np.flatnonzero(held)[:_LOOKED_AT]
    out = {"n": float(len(index))}
    for name, is_asked in (("plain", False), ("rated", True)):
        now = answers_of(gate, [chats[i] for i in index], max_new_tokens, is_asked)
        out[name] = float(np.mean([wrote[i] == ids for i, ids in zip(index, now, strict=True)]))
    return out


def _facts(gate: Prp, prompts: Prompts, outcomes: Outcomes, calibration: np.ndarray) -> dict[str, Any]:
    """Fits the calibration maps and the second look; quantiles of the score for thresholds, mean costs, and figures.

    Raises:
        InputError: the draft wrote no rating on any question of the split.
    """
    probs = prompts.probs(gate)
    context = int(prompts.mask.sum(1).float().mean())
    raw = gate.ratings(probs, context)
    is_rated = ~np.isnan(raw.score)
    known = calibration & is_rated
    if not known.any():
        raise InputError(f"no rating on any of {calibration.sum()} questions to calibrate on; train longer, or on more")
    sides = [(raw.draft, outcomes.draft), (raw.target, outcomes.target)][: gate.config.num_ratings]
    gate.calibrate([r[known] for r, _ in sides if r is not None], [y[known] for _, y in sides])
    rated: Ratings = gate.ratings(probs, context)
    figures = {
        name: reliability.reliability(r[known], y[known]).to_dict()
        for name, r, y in (("draft", rated.draft, outcomes.draft), ("target", rated.target, outcomes.target))
        if r is not None
    }
    unit = float(outcomes.target_cost.mean())
    held = outcomes.take(known)
    made, shares = deferral.curve(rated.score[known], held.pair), np.linspace(0, 1, _POINTS)
    assert rated.draft is not None
    verify = Verifier.fit(rated.draft[known], outcomes.stats["lp_mean"][known], outcomes.draft[known])
    return {
        "verify": list(verify.weights),
        "curve": {"share": shares.tolist(), "accuracy": made.at(shares).tolist()},
        "quantiles": np.quantile(rated.score[known], np.linspace(0, 1, 101)).tolist(),
        "costs": [float(outcomes.draft_cost.mean()) / unit, 1.0],
        "n": {"all": len(outcomes), "calibration": int(calibration.sum()), "unrated": int((~is_rated).sum())},
        "calibration": figures,
        "collapse": asdict(reliability.collapse(probs[is_rated, 0].cpu().numpy())),
    }
