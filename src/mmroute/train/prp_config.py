"""What a recipe says about a gate and about training its rater: the sections `gate` and `train`."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import Field

from mmroute.config import options, parse
from mmroute.errors import ConfigError
from mmroute.recipe import Recipe
from mmroute.tasks._mixture import Part

__all__ = ["GateConfig", "PrpConfig", "sections"]


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
    average: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Of the weights that are kept: how much of their moving mean stays at a step; 0 keeps the weights themselves."""
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
    """With `train_reasoning` or form `tokens`: weight of the divergence of answers from the draft as it was."""
    updates: Annotated[int, Field(ge=1)] = 2
    """With `rollouts`: steps on each batch."""
    lr_reasoning: Annotated[float, Field(gt=0)] = 1e-5
    """With `train_reasoning`: of the draft's weights."""
    backbone: Literal["words", "lora", "full"] = "full"
    """With form `tokens`, what of the draft learns: the embeddings of the rating's own words (slow, disturbs
    nothing else), adapters of rank `gate.method.lora_rank` that are merged, or the text model."""
    lr_draft: Annotated[float, Field(gt=0)] = 1e-3
    """With form `tokens`: of whichever of the two."""
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
    """Bundled name, folder or Hub id of a trained rater."""
    form: Literal["suffix", "tokens"] = "suffix"
    """Of a rater that is to be trained; see the gate `prp`."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """What both models compute in; None is their checkpoints' own."""
    method: dict[str, Any] = field(default_factory=dict)
    """Options of the gate `prp`."""
    policy: dict[str, Any] = field(default_factory=lambda: {"name": "budget"})
    """Name and options of the policy."""
    verify: Literal["none", "logprob"] = "none"
    """Whether finished answers of the draft are looked at again, by their log-probability; under policy `budget`."""
    verify_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Part of the budget that is kept for them."""
    mix: list[Part]
    """What is asked."""


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
    if config.rollouts and gated.method.get("decide_after"):
        raise ConfigError("train.rollouts are rated before their first token; leave gate.method.decide_after out")
    if config.rollouts and gated.form == "tokens":
        raise ConfigError("train.rollouts sample answers behind the form suffix; with gate.form=tokens leave them out")
    return gated, config
