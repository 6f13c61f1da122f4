"""Teaches a draft to write its ratings: two digits and a newline behind the prefix, and then what it always wrote.

Only the tokens of a rating are learned. Its answers are held to those of the draft as it was, both behind a rating, as
they are served, and without one, as everybody else asks for them.

Source: PRP (arXiv 2606.30217): rating tokens before the reasoning, trained apart from it.
Deviates: the expected reward over every level stands for sampled ones (`train.rating`); a digit is learned behind one
drawn from the draft's own distribution; answers are held by the divergence over the whole vocabulary at the draft's own
greedy answers, not by rewards.

Legend: B batch, R ratings, K levels, T tokens of an answer, V vocabulary.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmroute.engine.attach import attach
from mmroute.errors import InputError
from mmroute.gate._digits import Digits
from mmroute.gate._words import SWITCH
from mmroute.gate.prp import Prp
from mmroute.train import rating
from mmroute.train.loop import rate_at
from mmroute.train.prp_config import PrpConfig
from mmroute.train.rollouts import roll_out
from mmroute.train.stopping import Best
from mmroute.train.tuning import Tuning
from mmroute.train.written import Read, padded

__all__ = ["answers_of", "divergence", "fit_tokens"]

log = logging.getLogger(__name__)

_AT_ONCE = 64
"""Prompts that are looked at together in validation."""
_FLOOR = 0.1
"""Share of the peak rate at the end."""


def divergence(
    logits: Float[Tensor, "B T V"], reference: Float[Tensor, "B T V"], real: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """KL(pi, pi_ref) in nats, the mean over real tokens."""
    said, held = logits.log_softmax(-1), reference.log_softmax(-1)
    return ((said.exp() * (said - held)).sum(-1) * real).sum() / real.sum().clamp(min=1)


def fit_tokens(
    gate: Prp,
    chats: Sequence[list[dict[str, Any]]],
    answers: Sequence[list[int]],
    success: Float[np.ndarray, "n R"],
    ranked: Float[np.ndarray, "n R"],
    train: np.ndarray,
    validation: np.ndarray,
    config: PrpConfig,
) -> list[float]:
    """Trains the draft that the gate is bound to; it ends with the weights of the best epoch, adapters merged.

    Args:
        gate: of form `tokens`.
        chats: the questions as the draft is asked them.
        answers: the token ids that it wrote to each.
        success: of draft and target, unsmoothed.
        ranked: the same, drawn towards the mean of their cell; for the loss on differences.
        train: which questions.
        validation: which to stop by.
        config: how.

    Returns:
        The validation error after each epoch, as `train.prp.fit`, where a rating counts as far as it is written.

    Raises:
        InputError: nothing to train on or to stop by.
        ConfigError: adapters are asked for and PEFT is not installed.
    """
    if not train.any() or not validation.any():
        raise InputError(f"{train.sum()} questions to train on, {validation.sum()} to stop by; collect more")
    assert isinstance(gate.reader, Digits)
    model, digits, R = gate.model, gate.reader, gate.config.num_ratings
    rank = gate.config.lora_rank
    tuned: Any = "frozen" if config.backbone == "words" else config.backbone
    tuning = Tuning(model, tuned, rank, 2 * rank, "qkvogud", config.seed, embeddings=True)
    handles = _words_alone(model, digits) if config.backbone == "words" else []
    learned = [p for p in model.parameters() if p.requires_grad]
    decay = 0.0 if handles else config.weight_decay  # rows without a gradient must not move
    optimiser = torch.optim.AdamW(learned, lr=config.lr_draft, weight_decay=decay)
    y = torch.tensor(success[:, :R], dtype=torch.float32, device=model.device)
    a = rating.gain(torch.tensor(ranked[:, :R], dtype=torch.float32, device=model.device))
    order, held = np.flatnonzero(train), np.flatnonzero(validation)
    shuffle, draw = np.random.default_rng(config.seed), torch.Generator().manual_seed(config.seed)
    steps = math.ceil(len(order) / config.batch)
    total, step, best = steps * config.max_epochs, 0, Best(model, config.patience)
    try:
        for epoch in range(config.max_epochs):
            for part in np.array_split(shuffle.permutation(order), steps):
                asked, wrote = [chats[i] for i in part], padded([answers[i] for i in part], model.device)
                with torch.no_grad(), tuning.original():
                    before = _plain(Read(model, asked), *wrote)
                read = Read(model, asked)
                with torch.no_grad():
                    said = _drawn(read, digits, draw)
                logp, mass, newline, behind = _rated(read, digits, said, *wrote)
                loss = rating.objective(logp, y[part], a[part], config, step / total, draw)
                loss = loss - mass.log().sum(1).mean() - newline.mean()
                drift = divergence(behind, before, wrote[1]) + divergence(_plain(read, *wrote), before, wrote[1])
                loss = loss + config.beta * drift
                for group in optimiser.param_groups:
                    group["lr"] = config.lr_draft * rate_at(step, total, config.warmup, _FLOOR)
                optimiser.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimiser.step()
                step += 1
            with torch.no_grad():
                looks = [_served(Read(model, [chats[i] for i in part]), digits) for part in _parts(held)]
            ratings, written = (torch.cat(column) for column in zip(*looks, strict=True))
            # A rating that is not written counts as if it had been off by all there is.
            off = (rating.gain(ratings) - rating.gain(y[held])) ** 2
            error = float((written * off + 1 - written).mean())
            told = "epoch %d: validation error %.4f, %.3f of ratings written, drift %.4f nats a token"
            log.info(told, epoch + 1, error, float(written.mean()), drift.item())
            if best.is_over(error):
                break
        errors = best.put_back()
        weights = {name: value.clone() for name, value in tuning.weights().items()}
    finally:
        for handle in handles:
            handle.remove()
        tuning.restore()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(weights[name])
    return errors


@torch.no_grad()
def answers_of(
    gate: Prp, chats: Sequence[list[dict[str, Any]]], max_new_tokens: int, is_asked: bool = False
) -> list[list[int]]:
    """The token ids that the draft writes, greedily.

    Args:
        gate: bound to the draft.
        chats: the questions.
        max_new_tokens: longest answer.
        is_asked: for a rating first, which is taken off; an answer that does not begin with one is left whole.
    """
    assert isinstance(gate.reader, Digits)
    digits, out = gate.reader, []
    template = {SWITCH: True} if is_asked else None
    given: dict[str, Any] = {"max_new_tokens": max_new_tokens + is_asked * (digits.ratings + 1), "template": template}
    with attach(gate.model) as routed:
        for start in range(0, len(chats), _AT_ONCE):
            rolled, _ = roll_out(routed, chats[start : start + _AT_ONCE], **given)
            out += [each.ids for each in rolled]
    return [digits.behind_rating(ids) for ids in out] if is_asked else out


def _words_alone(model: Any, digits: Digits) -> list[Any]:
    """Lets the rows of the rating's words learn, of the embedding and of the output layer, and nothing else."""
    rows = torch.tensor([*digits.prefix, *digits.levels, digits.newline])
    tables = {id(w): w for w in (m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings()))}
    handles = []
    for table in tables.values():
        table.requires_grad_(True)
        keep = torch.zeros(len(table), 1, device=table.device).index_fill(0, rows.to(table.device), 1.0)
        handles.append(table.register_hook(lambda grad, keep=keep: grad * keep))
    return handles


def _parts(index: np.ndarray) -> list[np.ndarray]:
    return np.array_split(index, math.ceil(len(index) / _AT_ONCE))


def _head(digits: Digits, said: Int[Tensor, "B r"]) -> Int[Tensor, "B p"]:
    """The prefix and some digits, by level."""
    prefix = torch.tensor(digits.prefix, device=said.device).expand(len(said), -1)
    return torch.cat([prefix, torch.tensor(digits.levels, device=said.device)[said]], 1)


def _drawn(read: Read, digits: Digits, draw: torch.Generator | None) -> Int[Tensor, "B R"]:
    """Levels drawn one behind the other from the draft's own distribution; the likeliest ones without a generator."""
    said = read.mask.new_zeros(len(read.mask), 0)
    for _ in range(digits.ratings):
        ids = _head(digits, said)
        logp, _ = digits.read(read.logits(read.behind(ids, torch.ones_like(ids, dtype=torch.bool))[:, -1]))
        if draw is None:
            picked = logp.argmax(-1, keepdim=True)
        else:
            picked = torch.multinomial(logp.exp().cpu(), 1, generator=draw).to(said.device)
        said = torch.cat([said, picked], 1)
    return said


def _served(read: Read, digits: Digits) -> tuple[Float[Tensor, "B R"], Float[Tensor, " B"]]:
    """Ratings as they are served, each digit behind the likeliest one before it, and the chance that one is written."""
    said = _drawn(read, digits, None)
    nothing = said.new_zeros(len(said), 1)
    logp, mass, newline, _ = _rated(read, digits, said, nothing, nothing.bool())
    return rating.read(logp), mass.prod(1) * newline.exp()


def _rated(
    read: Read,
    digits: Digits,
    said: Int[Tensor, "B R"],
    answer: Int[Tensor, "B T"],
    real: Bool[Tensor, "B T"],
) -> tuple[Float[Tensor, "B R K"], Float[Tensor, "B R"], Float[Tensor, " B"], Float[Tensor, "B T V"]]:
    """What the draft says behind the prefix: levels, the mass of all digits, log p of the newline, the answer."""
    head = _head(digits, said)
    ids = torch.cat([head, head.new_full((len(head), 1), digits.newline), answer[:, :-1]], 1)
    known = torch.cat([torch.ones_like(ids[:, : head.shape[1] + 1], dtype=torch.bool), real[:, :-1]], 1)
    logits = read.logits(read.behind(ids, known)[:, len(digits.prefix) - 1 :])
    logp, mass = digits.read(logits[:, : digits.ratings])
    newline = logits[:, digits.ratings].log_softmax(-1)[:, digits.newline]
    return logp, mass, newline, logits[:, digits.ratings + 1 :]


def _plain(read: Read, answer: Int[Tensor, "B T"], real: Bool[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    """What the draft says of the same answer when nobody asks for a rating."""
    states = read.last
    if answer.shape[1] > 1:
        states = torch.cat([states, read.behind(answer[:, :-1], real[:, :-1])], 1)
    return read.logits(states)
