"""What a recipe says about training DARE's routers: its section `train`."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from mmroute.config import options

__all__ = ["TrainConfig"]

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


@options
class TrainConfig:
    """The `train` section of a recipe."""

    tasks: dict[str, Annotated[float, Field(gt=0)]]
    """Weight of each world, `name` or `name:preset`."""
    task: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of all worlds, those that `mmroute eval` takes as `--set task.NAME=VALUE`."""
    start: str | None = None
    """Folder `router` of an earlier run, or the name of bundled routers: this one begins with their weights, rates and
    backbone; fresh ones if not given.
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
    init: Literal["zero", "distill"] = "zero"
    """Routers that rank nothing, or fitted to the attention that positions receive in the unrouted model."""
    teacher_kl: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence (nats a word) from what the model says unrouted, with the weights that it came with;
    for runs that stay below the unrouted model. Costs a forward pass of it."""
    hard_weight: Annotated[float, Field(ge=0)] = 1.0
    hard_reduction: Literal["mean", "sum"] = "mean"
    """Over deep vision positions; the sum grows with pictures, batches and depth."""
    ratio_weight: Annotated[float, Field(ge=0)] | None = None
    """Weight of the pull to the targets; if not given, 0 where the mean is exact (`learned`), else 1, or 10 for
    `ratio_scope: mean`."""
    ratio_scope: Literal["each", "mean"] = "each"
    """Whether each layer and hop is pulled to the target, or their mean."""
    ratio_side: Literal["both", "cap"] = "both"
    """Whether a rate below the target is pulled up too."""
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
