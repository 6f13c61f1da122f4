"""The form `suffix`: one learned position behind the prompt says both ratings, and is forgotten again.

One soft token is put behind the prompt, on the draft's own cache; a small LoRA acts at that position only; one linear
head reads both ratings off it. Nothing of the draft changes.

Source: activated LoRA (arXiv 2504.12397) for the form.

Legend: B rows, D hidden, R ratings (draft, target), K levels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmroute import backbones
from mmroute.cost import pairs, position_macs
from mmroute.gate._behind import behind

__all__ = ["Suffix"]

_SCALE = 2.0
"""LoRA's alpha over its rank."""


class Suffix(nn.Module):
    """What is learned: the soft token, the LoRA and the head."""

    columns = 1
    """That a rating leaves behind in the cache."""
    steps = 1
    """Calls of the model, one after the other."""

    def __init__(self, model: Any, levels: int, ratings: int, rank: int, seed: int = 0) -> None:
        """Fresh weights, which rate everything alike.

        Args:
            model: the draft; it is not changed, and nothing of it is kept.
            levels: K.
            ratings: R: 1 rates the draft alone.
            rank: of the LoRA.
            seed: of the weights; the global random state is left as it was.
        """
        super().__init__()
        text = backbones.of(model).text_model(model)
        width = text.config.hidden_size
        draw = torch.Generator().manual_seed(seed)
        spread = float(text.embed_tokens.weight.detach().float().std())
        self.levels, self.ratings = levels, ratings
        self.soft = nn.Parameter(spread * torch.randn(width, generator=draw))
        self.head = nn.utils.skip_init(nn.Linear, width, ratings * levels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        keys = {}
        for name, linear in _linears(text):
            key = keys[name] = name.replace(".", "/")  # a parameter's name has no dots
            random = torch.randn(rank, linear.in_features, generator=draw)
            self.down[key] = nn.Parameter(random / linear.in_features**0.5)
            self.up[key] = nn.Parameter(torch.zeros(linear.out_features, rank))
        self._lora = sum(p.numel() for group in (self.down, self.up) for p in group.values())
        self.to(next(text.parameters()).device)
        self._pairs = {name: (self.down[key], self.up[key]) for name, key in keys.items()}
        """By the layer's name; looked up at every rating, where a dictionary of parameters is slow."""

    @contextmanager
    def _acting(self, text: Any) -> Iterator[None]:
        """The LoRA adds to every linear layer of the text model, until the block ends."""

        def hook(down: Tensor, up: Tensor) -> Any:
            def add(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
                x = args[0]
                low = F.linear(x, down.to(x.dtype)).flatten(0, -2)
                return torch.addmm(out.flatten(0, -2), low, up.to(x.dtype).T, alpha=_SCALE).view_as(out)

            return add

        pairs, layers = self._pairs.items(), text.layers
        handles = [layers.get_submodule(name).register_forward_hook(hook(*pair)) for name, pair in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(
        self,
        model: Any,
        cache: Any,
        mask: Int[Tensor, "B N"],
        after: Int[Tensor, " B"],
        axes: int = 1,
        *,
        is_routed: bool = False,
    ) -> Float[Tensor, "B R K"]:
        """Log-probabilities of the levels, read at `columns` positions behind what the cache holds; see `_behind`."""
        text = backbones.of(model).text_model(model)
        soft = self.soft.to(text.embed_tokens.weight.dtype).expand(mask.shape[0], 1, -1)
        with self._acting(text):
            state = behind(model, cache, mask, after, axes, embeds=soft, is_routed=is_routed)
        return self.read(state[:, -1])

    def read(self, state: Float[Tensor, "B D"]) -> Float[Tensor, "B R K"]:
        """Log-probabilities of the levels from the state at the soft token."""
        logits = self.head(state.to(self.head.weight.dtype))
        return logits.view(-1, self.ratings, self.levels).float().log_softmax(-1)

    def flops(self, shape: Any, context: int) -> float:
        """What one rating costs on a prompt of this many positions: one position, the LoRA and the head."""
        attention = 2 * shape.layers * shape.heads * shape.head_dim * pairs(1, context)
        return 2.0 * (shape.layers * position_macs(shape) + attention + self._lora + self.head.weight.numel())


def _linears(text: Any) -> list[tuple[str, nn.Linear]]:
    return [(name, part) for name, part in text.layers.named_modules() if isinstance(part, nn.Linear)]
