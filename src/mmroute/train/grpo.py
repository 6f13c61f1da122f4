"""GRPO with answers: the draft rates and answers a question several times; ratings and answers are rewarded apart.

A rating is rewarded for being near the success rate of the group's other answers, an answer for being right. Each loss
is a mean over its own tokens: two rating tokens would vanish beside the hundreds of an answer.

Source: PRP (arXiv 2606.30217): task-specific optimisation of rating and reasoning tokens, dynamic score replacement;
GRPO (2402.03300) for the group's advantage and the clipped ratio.
Deviates: formulas are our reading. The rating is sampled at the suffix position (`gate.prp`), so no answer ever saw it;
the answers of replaced samples are left out of the loss all the same, as where the rating stands in the text. The
target's rating is rewarded by its label: its answers are not sampled here. Ratings alone (`rating.grpo`) need no
answers and are the default; they are trained only with `train_reasoning`, and then the draft's answers change.

Legend: B queries, R ratings (draft, target), K levels, G samples of one query, T tokens of an answer.
"""

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmroute.engine.attach import attach
from mmroute.errors import InputError
from mmroute.gate._suffix import Suffix
from mmroute.gate.prp import Prp
from mmroute.tasks._mixture import Drawn
from mmroute.train import rating
from mmroute.train.prompts import Prompts
from mmroute.train.rollouts import roll_out
from mmroute.train.stopping import Best
from mmroute.train.written import Read, padded

if TYPE_CHECKING:
    from mmroute.train.prp_config import PrpConfig

__all__ = ["Sampled", "advantages", "fit_rollouts", "objective", "rewards", "token_logps"]

log = logging.getLogger(__name__)

_FORMAT = 0.1
"""What an answer that the scorer can read earns, right or wrong."""


@dataclass(frozen=True)
class Sampled:
    """What was drawn for a batch of queries, under the policy of that moment."""

    picked: Int[Tensor, "B R G"]
    """Levels."""
    correct: Float[Tensor, "B G"]
    """Success of each answer."""
    parsed: Bool[Tensor, "B G"]
    replaced: Bool[Tensor, "B G"]
    """Samples with a level that was not drawn but put there."""
    answers: Sequence[list[int]] = ()
    """B G token ids."""


def rewards(
    drawn: Sampled, label: Float[Tensor, "B R"], levels: int, kind: Literal["brier_group", "brier_own", "l1"]
) -> tuple[Float[Tensor, "B R G"], Float[Tensor, "B G"]]:
    """What each rating and each answer earns.

    Args:
        drawn: levels and answers.
        label: success rates; of the draft's, only those of the target are used.
        levels: K.
        kind: `brier_group` is 1 - (v - y)^2 with y the success rate of the group's other answers, under a Beta(.5, .5)
            prior; `brier_own` takes the sample's own answer; `l1` is 1 - |v - y|.
    """
    value = drawn.picked.to(label.dtype) / (levels - 1)
    G = drawn.correct.shape[1]
    others = (drawn.correct.sum(1, keepdim=True) - drawn.correct + 0.5) / G  # G - 1 answers and one pseudo-count
    y = label[..., None].expand_as(value).clone()
    y[:, 0] = drawn.correct if kind == "brier_own" else others
    rated = 1 - (value - y).abs() if kind == "l1" else rating.reward(value, y)
    return rated, drawn.correct + _FORMAT * drawn.parsed


def advantages(earned: Float[Tensor, "*shape G"]) -> Float[Tensor, "*shape G"]:
    """Within each group: 0 for the mean, 1 for a standard deviation above it; all 0 where everyone earned the same."""
    centred = earned - earned.mean(-1, keepdim=True)
    return centred / (earned.std(-1, keepdim=True) + rating.EPS)


def objective(
    rated: Float[Tensor, "B R G"],
    rated_before: Float[Tensor, "B R G"],
    rated_gain: Float[Tensor, "B R G"],
    said: Float[Tensor, "B G T"] | None = None,
    said_before: Float[Tensor, "B G T"] | None = None,
    said_gain: Float[Tensor, "B G"] | None = None,
    is_answer: Bool[Tensor, "B G T"] | None = None,
    reference: Float[Tensor, "B G T"] | None = None,
    *,
    clip: float = 0.2,
    beta: float = 0.0,
) -> Float[Tensor, ""]:
    """The clipped loss over rating tokens, and over the tokens of answers where those are given.

    Args:
        rated: log-probabilities of the levels under the policy now.
        rated_before: under the policy that drew them.
        rated_gain: advantages of ratings.
        said: likewise of the tokens of answers; None trains ratings alone.
        said_before: likewise.
        said_gain: advantage of each answer.
        is_answer: which tokens count: written ones, of samples whose rating was not replaced.
        reference: log-probabilities under the draft as it was.
        clip: how far a ratio may go from 1 before it stops counting.
        beta: weight of the divergence from the reference, over the same tokens.
    """
    loss = -_clipped(rated, rated_before, rated_gain, clip).mean(-1).sum(1).mean()
    if said is None:
        return loss
    assert said_before is not None and said_gain is not None and is_answer is not None
    count = is_answer.sum().clamp(min=1)
    gained = _clipped(said, said_before, said_gain[..., None].expand_as(said), clip)
    loss = loss - (gained * is_answer).sum() / count
    if beta and reference is not None:
        off = reference - said
        loss = loss + beta * ((off.exp() - off - 1) * is_answer).sum() / count
    return loss


def _clipped(now: Tensor, before: Tensor, gain: Tensor, clip: float) -> Tensor:
    ratio = (now - before.detach()).exp()
    return torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain)


def token_logps(
    model: Any, chats: Sequence[list[dict[str, Any]]], answers: Sequence[list[int]]
) -> tuple[Float[Tensor, "N T"], Bool[Tensor, "N T"]]:
    """Log-probabilities of answers behind their prompts, with gradients, and which tokens are real.

    Args:
        model: the stock draft with its processor.
        chats: one per answer.
        answers: token ids.
    """
    read = Read(model, chats)
    written, real = padded(answers, read.mask.device)
    state = read.last
    if written.shape[1] > 1:
        state = torch.cat([state, read.behind(written[:, :-1], real[:, :-1])], 1)
    return read.logits(state).log_softmax(-1).gather(-1, written[..., None])[..., 0], real


def fit_rollouts(
    gate: Prp,
    items: Sequence[Drawn],
    chats: Sequence[list[dict[str, Any]]],
    success: Float[np.ndarray, "n R"],
    train: np.ndarray,
    validation: np.ndarray,
    config: "PrpConfig",
    max_new_tokens: int,
) -> list[float]:
    """Trains the rater, and with `train_reasoning` the draft too, on answers sampled as it goes.

    Args:
        gate: bound to the draft.
        items: the questions.
        chats: as the draft is asked them.
        success: of draft and target, from collected answers: the target's labels, and what validation is against.
        train: which questions.
        validation: which to stop by.
        config: how.
        max_new_tokens: longest answer.

    Returns:
        The validation error after each epoch, as `train.prp.fit`; the rater ends with the weights of the best one, the
        draft with its last ones.

    Raises:
        InputError: nothing to train on or to stop by.
    """
    if not train.any() or not validation.any():
        raise InputError(f"{train.sum()} questions to train on, {validation.sum()} to stop by; collect more")
    assert isinstance(gate.reader, Suffix)
    rater, model = gate.reader, gate.model
    y = torch.tensor(success[:, : gate.config.num_ratings], dtype=torch.float32, device=rater.soft.device)
    learned = [p for p in model.parameters() if p.requires_grad]
    reasons = learned if config.train_reasoning else []
    reference = copy.deepcopy(model) if reasons and config.beta else None
    groups = [{"params": list(rater.parameters()), "lr": config.lr}, {"params": reasons, "lr": config.lr_reasoning}]
    optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    order, held = np.flatnonzero(train), np.flatnonzero(validation)
    shuffle, draw = np.random.default_rng(config.seed), torch.Generator().manual_seed(config.seed)
    steps = math.ceil(len(order) / max(config.batch // config.group_size, 2))
    best = Best(rater, config.patience)
    try:
        for p in learned:
            p.requires_grad_(bool(reasons))
        for epoch in range(config.max_epochs):
            for number, part in enumerate(np.array_split(shuffle.permutation(order), steps)):
                done = (epoch * steps + number) / (config.max_epochs * steps)
                replace = 1 - done if config.replace == "dynamic" else 0.0
                asked, label = [chats[i] for i in part], y[part]
                drawn = _draw(gate, [items[i] for i in part], asked, label, config, replace, draw, max_new_tokens)
                batch = _Batch(gate, reference, asked, drawn, label, config)
                for _ in range(config.updates):
                    optimiser.zero_grad()
                    batch.loss().backward()
                    torch.nn.utils.clip_grad_norm_([*rater.parameters(), *reasons], 1.0)
                    optimiser.step()
            said = Prompts.read(model, [chats[int(i)] for i in held]).probs(gate) @ rating.levels(rater.levels, y)
            error = float(((rating.gain(said) - rating.gain(y[held])) ** 2).mean())
            log.info("epoch %d: validation error %.4f", epoch + 1, error)
            if best.is_over(error):
                break
    finally:
        for p in learned:
            p.requires_grad_(True)
    return best.put_back()


@torch.no_grad()
def _draw(
    gate: Prp,
    items: Sequence[Drawn],
    asked: Sequence[list[dict[str, Any]]],
    label: Float[Tensor, "B R"],
    config: "PrpConfig",
    replace: float,
    draw: torch.Generator,
    max_new_tokens: int,
) -> Sampled:
    """G ratings and G answers of each question; groups whose ratings agree get two of them replaced."""
    B, G, K = len(items), config.group_size, gate.config.levels
    many = [chat for chat in asked for _ in range(G)]
    seeds = torch.randint(2**31, (B * G,), generator=draw).tolist()
    with attach(gate.model) as routed:
        rolled, _ = roll_out(routed, many, max_new_tokens=max_new_tokens, temperature=1.0, seeds=seeds)
    scores = [items[i // G].task.score(items[i // G].sample, each.text) for i, each in enumerate(rolled)]
    right = [float(s.correct or 0) * each.finished for s, each in zip(scores, rolled, strict=True)]
    correct = torch.tensor(right, device=label.device).view(B, G)
    parsed = torch.tensor([s.parsed for s in scores], device=label.device).view(B, G)
    levels = Prompts.read(gate.model, asked).rate(gate, torch.arange(B)).exp()
    picked = torch.multinomial(levels.reshape(-1, K).cpu(), G, True, generator=draw).to(label.device)
    picked = picked.view(B, -1, G)
    agree = (picked == picked[..., :1]).all(-1)
    where = agree & (torch.rand(agree.shape, generator=draw).to(agree.device) < replace)
    best = label.clone()
    best[:, 0] = correct.mean(1)
    given = rating.replaced(picked, where, best, K, draw)
    return Sampled(given, correct, parsed, (given != picked).any(1), [each.ids for each in rolled])


class _Batch:
    """The loss of one batch of samples, as the policy moves away from the one that drew them."""

    def __init__(
        self,
        gate: Prp,
        reference: Any,
        asked: Sequence[list[dict[str, Any]]],
        drawn: Sampled,
        label: Float[Tensor, "B R"],
        config: "PrpConfig",
    ) -> None:
        self.gate, self.reference, self.asked, self.drawn, self.config = gate, reference, asked, drawn, config
        earned = rewards(drawn, label, gate.config.levels, config.rating_reward)
        self.rated_gain, self.said_gain = map(advantages, earned)
        self.before: dict[str, Tensor] = {}
        """Log-probabilities under the policy that drew; replaced levels count as if it had drawn them."""

    def loss(self) -> Tensor:
        index = torch.arange(len(self.asked))
        rated = Prompts.read(self.gate.model, self.asked).rate(self.gate, index).gather(-1, self.drawn.picked)
        self.before.setdefault("rated", rated.detach())
        answers = self._answers() if self.config.train_reasoning else {}
        return objective(rated, self.before["rated"], self.rated_gain, clip=self.config.clip, **answers)

    def _answers(self) -> dict[str, Any]:
        G = self.config.group_size
        many, shape = [chat for chat in self.asked for _ in range(G)], (len(self.asked), G, -1)
        said, real = token_logps(self.gate.model, many, self.drawn.answers)
        self.before.setdefault("said", said.detach())
        if self.reference is not None and "reference" not in self.before:
            with torch.no_grad():
                self.before["reference"] = token_logps(self.reference, many, self.drawn.answers)[0]
        reference = self.before.get("reference")
        return {
            "said": said.view(shape),
            "said_before": self.before["said"].view(shape),
            "said_gain": self.said_gain,
            "is_answer": real.view(shape) & ~self.drawn.replaced[..., None],
            "reference": None if reference is None else reference.view(shape),
            "beta": self.config.beta,
        }
