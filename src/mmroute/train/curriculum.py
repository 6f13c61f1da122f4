"""What a latent run is made of: the stages of a curriculum, and everything a training recipe says.

Source: Vedas (arXiv 2604.10500), curriculum of section 3; Coconut's multi-stage training.
Deviates: supervised latents (`supervise`), states in place of sentences (`steps: states`) and gated stages are ours,
    after trials in which the printed curriculum stayed at chance.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from mmroute import recipe as recipes
from mmroute.config import options, overrides, parse, read_yaml
from mmroute.errors import ConfigError
from mmroute.train.recipe import SHIPPED, Ramp, find_recipe, merge
from mmroute.train.steps import Splitter

__all__ = ["Stage", "TrainConfig", "read_recipe"]

Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


@options
class Stage:
    """One stretch of the curriculum."""

    name: str
    steps: Annotated[int, Field(ge=1)] | None = None
    """Updates at most."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """In place of `steps`, passes over `epoch_items` items."""
    latents: Annotated[int, Field(ge=0)] | Literal["all"] = "all"
    """Groups that latents replace, from the first."""
    keep_last: bool = False
    """Leave every item its last group, however short it is."""
    mix: Share = 0.0
    """Share of the steps that replace fewer groups, any number of them alike."""
    written: Share = 0.2
    """Rows of whole written chains under their own cue, as a share of the others."""
    supervise: Ramp = ((0.0, 0.0),)
    """Weight of the loss that reads each latent's state through the head, over the stage."""
    muon: Rate = 2e-3
    """Peak rate of the backbone's matrices under `full`."""
    adamw: Rate = 7e-4
    """Peak rate of the rest under `full`, of everything under `lora`."""
    new: Rate = 1e-3
    """Peak rate of routers, step vectors, placeholders, readouts and the network of the closer look."""
    warmup: Annotated[int, Field(ge=1)] = 20
    floor: Share = 0.05
    """Share of the peak at the end of the cosine."""
    reset_optimizer: bool = True
    until: Share | None = None
    """The stage ends as soon as held-out items are this accurate; looked at every `gate_every` steps."""
    on_cap: Literal["go_on", "stop"] = "go_on"
    """What to do when `until` is not met by the end: go on, or end the run at the last stage that met its own."""


@options
class TrainConfig:
    """The `train` section of a recipe."""

    tasks: dict[str, Annotated[float, Field(gt=0)]]
    """Weight of each world, `name` or `name:preset`."""
    stages: Annotated[list[Stage], Field(min_length=1)]
    start: str | None = None
    """Folder `latent` of an earlier run, or the name of a bundled one: this one begins with its routers and backbone,
    so that replay or depth is added to latents that work."""
    length_power: Annotated[float, Field(ge=0)] = 0.0
    """A chain is drawn with a weight of its length to this power: 0 draws all lengths alike, 1 long ones more often."""
    batch: Annotated[int, Field(ge=1)] = 32
    epoch_items: Annotated[int, Field(ge=0)] = 0
    """Items of one epoch, for stages that count in epochs."""
    steps: Literal["states", "outcomes", "chain", "sentences"] = "states"
    """What a rationale consists of: of generated worlds what each step comes to, every word a group (`states`) or all
    of a step's together (`outcomes`); the whole steps; or these as sentences."""
    groups: Annotated[int, Field(ge=1)] | None = None
    """Merge the steps to at most this many groups; S in the paper."""
    steps_per_group: Annotated[int, Field(ge=1)] = 1
    """Steps that a group holds at most, merged evenly: hops that one latent stands for."""
    splitter: Splitter = "given"
    """How a rationale in plain English is cut into steps."""
    latents_per_group: Annotated[int, Field(ge=0)] = 1
    """Latent steps that replace a group; the last of them is supervised. 0 leaves the groups out: the control that
    answers at once."""
    latent_grad: Annotated[str, Field(pattern=r"^(full|none|truncated:\d+)$")] = "full"
    """How far gradients run back through latents: all steps, none, or the last n (`truncated:n`)."""
    head_reads: Literal["first", "last"] = "last"
    """Which word of its group the head reads off a latent; readouts read the others. Where hops are written behind
    latents (`mix`) or the head ends the thought, it is asked for the first."""
    readout_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of reading off a latent the other words of the group it ends, in units of `supervise`."""
    readout_layer: Annotated[int, Field(ge=1)] | None = None
    """Layer, from 1, behind which those words are read; None is the last. Words that lead to the group's last one are
    then known before the layers that look that one up."""
    latent_decay: Share = 1.0
    """What a gradient is multiplied by at each latent that it runs back through; 1 leaves it, 0 stops it there. Over
    many latents gradients grow without bound, and a clipped step then follows the longest chain alone."""
    recon_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the closer look; 1.0 in the paper up to 3B, 0.2 at 7B."""
    recon_relative: bool = True
    """Measure its error in units of the tower's tokens; off in the paper."""
    window_share: Share = 0.3
    """Side of its window as a share of the grid's."""
    window_cells: tuple[int, int] | None = None
    """Rows and columns of the window in place of a share."""
    backbone: Literal["full", "lora", "frozen"] = "full"
    embeddings: bool = True
    """Under `full`, train the word embeddings too."""
    lora_rank: Annotated[int, Field(ge=1)] = 64
    lora_alpha: Annotated[int, Field(ge=1)] = 16
    lora_targets: str = "qkvogud"
    """First letters of the projections with adapters."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip: Rate = 1.0
    """Largest norm of the gradient."""
    seed: Annotated[int, Field(ge=0)] = 0
    save_every: Annotated[int, Field(ge=1)] = 100
    gate_every: Annotated[int, Field(ge=1)] = 50
    eval_every: Annotated[int, Field(ge=1)] = 100
    eval_items: Annotated[int, Field(ge=1)] = 96
    """Held-out items per task at each look."""

    def length(self, stage: Stage) -> int:
        """Steps of a stage at most.

        Raises:
            ConfigError: it names neither steps nor epochs, or both, or epochs of nothing.
        """
        if (stage.steps is None) == (stage.epochs is None) or (stage.epochs and not self.epoch_items):
            raise ConfigError(
                f"stage {stage.name}: give either steps or epochs, and epoch_items with the latter (given "
                f"{stage.steps}, {stage.epochs}, {self.epoch_items})"
            )
        return stage.steps or math.ceil(stage.epochs * self.epoch_items / self.batch)  # type: ignore[operator]


def read_recipe(name: str, sets: list[str] | None = None) -> recipes.Recipe:
    """A training recipe by its shipped name or a path, with `--set` changes; stages are addressed by index.

    Raises:
        ConfigError: no such recipe, or a value that it does not allow.
    """
    changes = overrides(sets or [])
    data = merge(read_yaml(find_recipe(name, SHIPPED / "vedas")), changes)
    if "tasks" in (changes.get("train") or {}):
        data["train"]["tasks"] = changes["train"]["tasks"]  # other tasks, not further ones
    recipe = parse(recipes.Recipe, {"name": Path(name).stem, **data}, f"recipe {name}")
    for kind in ("prune", "deepen", "think"):
        recipe.build(kind)  # a wrong option is reported before a model is loaded
    return recipe
