"""Everything that an update of a latent run moves, and what a resumed run needs of it."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from mmroute.train.curriculum import Stage, TrainConfig
from mmroute.train.loop import Optimisers, load_moments, moments
from mmroute.train.ranks import Ranks

__all__ = ["Learners"]


class Learners:
    """The backbone under Muon and AdamW, and what was added to it under an AdamW of its own."""

    def __init__(
        self, model: nn.Module, parts: nn.Module, helpers: nn.Module, config: TrainConfig, ranks: Ranks
    ) -> None:
        self.model, self.parts, self.helpers, self.config, self.ranks = model, parts, helpers, config, ranks
        self.reset()

    def reset(self) -> None:
        """Optimisers without a past."""
        new = [*self.parts.parameters(), *self.helpers.parameters()]
        mine = {id(p) for p in new}
        self.new_parameters = new
        own = nn.ParameterDict()  # the backbone's, under names that say which are embeddings
        for name, p in self.model.named_parameters():
            if p.requires_grad and id(p) not in mine:
                own[name.replace(".", "/")] = p
        self.backbone = Optimisers(own, self.config.weight_decay) if len(own) else None
        self.new = torch.optim.AdamW(new, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0) if new else None

    def step(self, share: float, stage: Stage) -> float:
        """One update at this share of the peak rates; clears the gradients. Returns the gradient's norm."""
        both = () if self.backbone is None else (self.backbone.muon, self.backbone.adamw)
        weights = [p for optimiser in both for group in optimiser.param_groups for p in group["params"]]
        self.ranks.average([*weights, *self.new_parameters])
        norm = float(nn.utils.clip_grad_norm_([*weights, *self.new_parameters], self.config.clip))
        if self.backbone is not None:
            lora = self.config.backbone == "lora"
            self.backbone.step(share * (stage.adamw if lora else stage.muon), share * stage.adamw)
        if self.new is not None:
            for group in self.new.param_groups:
                group["lr"] = share * stage.new
            self.new.step()
            self.new.zero_grad(set_to_none=True)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """All moments and the weights that are not the model's, by name."""
        out = {} if self.backbone is None else {f"backbone.{k}": v for k, v in self.backbone.tensors().items()}
        if self.new is not None:
            out |= moments("new", self.new)
        out |= {f"helpers.{name}": value for name, value in self.helpers.state_dict().items()}
        return out | {f"buffer.{name}": value for name, value in self.parts.named_buffers()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes what `tensors` gave."""
        by_owner: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            owner, _, rest = name.partition(".")
            by_owner[owner][rest] = value
        if self.backbone is not None:
            self.backbone.load(by_owner["backbone"])
        if self.new is not None:
            load_moments("new", self.new, tensors)
        self.helpers.load_state_dict(by_owner["helpers"])
        for name, value in self.parts.named_buffers():
            value.copy_(by_owner["buffer"][name])
