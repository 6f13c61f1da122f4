"""Which weights of a loaded model a run trains, and putting the model back as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from mmroute import backbones
from mmroute.errors import ConfigError

__all__ = ["Tuning"]

Part = Literal["full", "lora", "frozen"]


class Tuning:
    """The text model's layers and last norm, its word embeddings if asked for, or adapters; never the vision tower."""

    def __init__(
        self, model: Any, part: Part, rank: int, alpha: int, targets: str, seed: int, embeddings: bool
    ) -> None:
        """Freezes everything else; see `restore`.

        Args:
            model: a loaded stock model, not attached.
            part: `full`, `lora` or `frozen`.
            rank: of the adapters.
            alpha: by which they are scaled, over the rank.
            targets: first letters of the projections that get one (`qkvogud`).
            seed: of their first weights.
            embeddings: under `full`, train the word embeddings too.

        Raises:
            ConfigError: adapters are asked for and PEFT is not installed.
        """
        self.model = model
        self.before = {n: p.detach().clone() for n, p in model.named_parameters()}
        self._grads = {n: p.requires_grad for n, p in model.named_parameters()}
        self._dtype = next(model.parameters()).dtype
        self._adapted = False
        model.float()
        model.requires_grad_(False)
        text = backbones.of(model).text_model(model)
        if part == "full":
            text.layers.requires_grad_(True)
            text.norm.requires_grad_(True)
            text.embed_tokens.requires_grad_(embeddings)
        elif part == "lora":
            self._adapt(text, rank, alpha, targets, seed)

    def _adapt(self, text: Any, rank: int, alpha: int, targets: str, seed: int) -> None:
        try:
            import peft
        except ImportError:
            raise ConfigError("train.backbone lora needs PEFT: pip install 'mmroute[train]'") from None
        inside = {id(module) for module in text.layers.modules()}
        # By identity, not by name: the vision tower has projections of the same names, and its output is the target.
        named = [
            name
            for name, module in self.model.named_modules()
            if id(module) in inside and name.endswith("_proj") and name.rpartition(".")[2][0] in targets
        ]
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=named)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            peft.inject_adapter_in_model(config, self.model)
        self._adapted = True

    def weights(self) -> dict[str, Tensor]:
        """The weights as they are, adapters merged, by the names they had before."""
        out = {}
        for name in self.before:
            module, _, leaf = name.rpartition(".")
            found: Any = self.model.get_submodule(module)
            if hasattr(found, "get_base_layer"):
                value = getattr(found.get_base_layer(), leaf).detach()
                out[name] = value + found.get_delta_weight("default").detach() if leaf == "weight" else value
            else:
                out[name] = getattr(found, leaf).detach()
        return out

    @contextmanager
    def original(self) -> Iterator[None]:
        """The weights that the model came with, adapters aside, until the block ends; for passes without gradient."""
        own = dict(self.model.named_parameters())
        held = {n: own[n].data for n in self.before if n in own}  # what has an adapter has another name, and is frozen
        adapted = [m for m in self.model.modules() if hasattr(m, "get_base_layer")] if self._adapted else []
        try:
            for name, value in held.items():
                own[name].data = self.before[name].to(value.dtype)
            for module in adapted:
                module.enable_adapters(False)
            yield
        finally:
            for name, value in held.items():
                own[name].data = value
            for module in adapted:
                module.enable_adapters(True)

    def restore(self) -> None:
        """The model as it was given, without adapters."""
        if self._adapted:
            self._adapted = False
            for name, module in list(self.model.named_modules()):
                if hasattr(module, "get_base_layer") and hasattr(module, "merge"):
                    parent, _, leaf = name.rpartition(".")
                    setattr(self.model.get_submodule(parent), leaf, module.get_base_layer())
        _put(self.model, self.before, self._grads)
        self.model.to(self._dtype).eval()


@torch.no_grad()
def _put(model: Any, values: Mapping[str, Tensor], grads: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
        parameter.requires_grad_(grads[name])
