"""What an update of DARE's training moves: routers and rates, and the backbone by its own optimisers."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from mmroute.prune.dare import Dare
from mmroute.prune.mod import MoD
from mmroute.prune.symmetric import Symmetric
from mmroute.train.dare_config import TrainConfig
from mmroute.train.loop import Optimisers, load_moments, moments

__all__ = ["Learners"]


class Learners:
    """Everything that an update moves, and what a resumed run needs of it."""

    def __init__(
        self, backbone: Optimisers | None, pruner: Dare | Symmetric | MoD, config: TrainConfig, hidden: int
    ) -> None:
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
        out |= moments("router", self.routers)
        return out | {f"average.{name}": value for name, value in self.pruner.named_buffers()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Takes what `tensors` gave."""
        by_owner: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            owner, _, rest = name.partition(".")
            by_owner[owner][rest] = value
        if self.backbone is not None:
            self.backbone.load(by_owner["backbone"])
        load_moments("router", self.routers, tensors)
        for name, value in self.pruner.named_buffers():
            value.copy_(by_owner["average"][name])
