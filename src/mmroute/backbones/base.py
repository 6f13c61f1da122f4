"""What the engine must know of a model family, and nothing about routing.

A family is stateless: every fact is read off the model it is given. Adding one is a file beside this one and a line in
`backbones/__init__.py`.

Legend: B batch, N positions, D hidden, V vocabulary, H query heads, K key-value heads, E head dim, T layers that the
vision tower adds to.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmroute.errors import ConfigError, InputError, UnsupportedBackbone, UnsupportedCall
from mmroute.trace import Shape

__all__ = ["QUANTISED", "Canvas", "Family", "box", "rotate", "running_positions"]

QUANTISED = ("bitsandbytes", "torchao")
"""Ways of quantising whose linear layers take and give plain tensors, which is all that routing needs."""


@dataclass(frozen=True)
class Canvas:
    """How a model writes a picture: a begin, a fixed number of codes row by row, an end; all are token ids."""

    begin: int
    codes: tuple[int, ...]
    """Ids of which pictures are made, by the code that each one stands for."""
    end: int
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Codes of one picture."""
        return self.rows * self.columns


def rotate(x: Float[Tensor, "B H N E"], cos: Float[Tensor, "b N E"], sin: Float[Tensor, "b N E"]) -> Tensor:
    """`x` with its halves turned by the position angles, as all our families rotate queries and keys."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def box(
    window: tuple[int, int, int, int], wide: float, high: float, left: int = 0, upper: int = 0
) -> tuple[int, int, int, int]:
    """Pixel edges of a window whose cells are `wide` x `high`; never empty."""
    row, column, rows, columns = window
    x, y = left + round(column * wide), upper + round(row * high)
    return x, y, max(left + round((column + columns) * wide), x + 1), max(upper + round((row + rows) * high), y + 1)


def running_positions(mask: Int[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """Each real position's place in its row, from 0; padding is 0 and nobody reads it."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0).masked_fill(mask == 0, 0)


class Family(ABC):
    """Facts of one model family."""

    name: ClassVar[str]
    """The family's `config.model_type`."""
    example: ClassVar[str]
    """A checkpoint of the family, for messages."""
    tuple_out: ClassVar[bool] = False
    """Whether a decoder layer returns a tuple that starts with the hidden states, rather than the tensor."""
    qk_norm: ClassVar[bool] = False
    """Whether attention normalises queries and keys before it rotates them."""
    image_tensors: ClassVar[tuple[str, ...]] = ("pixel_values",)
    """Tensors of a prepared batch that belong to its images."""

    def matches(self, model: nn.Module) -> bool:
        """Whether the model is of this family."""
        config = getattr(model, "config", None)
        return getattr(config, "model_type", None) == self.name

    def check(self, model: nn.Module) -> None:
        """Whether this very model can be routed.

        Raises:
            UnsupportedBackbone: its text layers use a sliding window, or its weights are quantised in an unknown way.
        """
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        method = getattr(getattr(config, "quantization_config", None), "quant_method", None)
        if method is not None and str(getattr(method, "value", method)) not in QUANTISED:
            raise UnsupportedBackbone(
                f"{self.name}: the weights are quantised ({method}); routing takes float32, bfloat16, float16, "
                f"{' and '.join(QUANTISED)}; load the checkpoint without quantization_config"
            )
        kinds = getattr(text, "layer_types", None)
        window = getattr(text, "sliding_window", None)
        if window is not None and (kinds is None or "sliding_attention" in kinds):
            raise UnsupportedBackbone(
                f"{self.name}: the text layers attend to a sliding window of {window} positions; routing needs full "
                "causal attention. If your sequences are shorter than that, load the model with sliding_window=None "
                "in its text config (use_sliding_window=False on Qwen-VL): the logits are the same"
            )

    def check_processor(self, model: Any, processor: Any) -> None:
        """Whether a processor makes inputs for this model.

        Raises:
            ConfigError: it is no processor, or another model's.
        """
        kind = type(processor).__name__
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise ConfigError(
                f"processor is a {kind}, which does not read images; pass AutoProcessor.from_pretrained(...) of the "
                "model"
            )
        token = getattr(processor, "image_token", None)
        number = processor.tokenizer.convert_tokens_to_ids(token) if isinstance(token, str) else None
        if number != model.config.image_token_id:
            raise ConfigError(
                f"processor is a {kind} whose image token {token!r} is number {number}, the {self.name} model waits "
                f"for number {model.config.image_token_id}; pass the processor of the same checkpoint"
            )

    # where things are

    def base_model(self, model: Any) -> nn.Module:
        """The module that `model(...)`, `generate` and embedding calls all pass through."""
        return model.model

    @abstractmethod
    def text_model(self, model: Any) -> Any:
        """The module that owns `.layers`, `.norm`, `.rotary_emb` and `.embed_tokens`."""

    @abstractmethod
    def vision_ids(self, model: Any) -> list[int]:
        """Token ids, ascending, that stand for image content; each is below the vocabulary size."""

    def delimiter_ids(self, model: Any) -> list[int]:
        """Token ids that bracket images; never pruned, so what follows always knows where one began and ended."""
        return []

    def windowed(self, model: Any) -> list[Any]:
        """The vision tower's attention modules where it splits patches by `cu_seqlens`; see `engine.windows`."""
        return []

    def shape(self, model: Any) -> Shape:
        """The sizes of the text model that costs depend on."""
        config = model.config.get_text_config(decoder=True)
        attention = self.text_model(model).layers[0].self_attn
        return Shape(
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=attention.head_dim,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
            itemsize=model.get_input_embeddings().weight.element_size(),  # of keys; weights may be quantised
        )

    # what a layer computes

    def normed(self, layer: Any, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """The residual stream as the layer's attention projects it."""
        return layer.input_layernorm(x)

    def qk(
        self,
        layer: Any,
        x: Float[Tensor, "B N D"],
        cos: Float[Tensor, "b N E"],
        sin: Float[Tensor, "b N E"],
    ) -> tuple[Float[Tensor, "B H N E"], Float[Tensor, "B K N E"]]:
        """Queries and keys of the residual stream `x`, as the layer's attention would use them.

        Args:
            layer: one of `text_model(model).layers`.
            x: the layer's input, before its norm.
            cos: of the positions' angles, as the text model hands them to its layers; `b` is 1 or B.
            sin: likewise.
        """
        attention = layer.self_attn
        B, N, _ = x.shape
        normed = self.normed(layer, x)
        q = attention.q_proj(normed).view(B, N, -1, attention.head_dim)
        k = attention.k_proj(normed).view(B, N, -1, attention.head_dim)
        if self.qk_norm:
            q, k = attention.q_norm(q), attention.k_norm(k)
        return rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)

    def eager(self, layer: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """The family's own explicit attention function, the one `attn_implementation="eager"` runs."""
        return sys.modules[type(layer.self_attn).__module__].eager_attention_forward

    def deep(self, given: Mapping[str, Any]) -> Float[Tensor, "T B N D"] | None:
        """What the vision tower adds to the residual stream behind the first T text layers; None where nothing.

        Args:
            given: keywords of the text model's call.
        """
        return None

    def carry(self, deep: Float[Tensor, "T B N D"]) -> dict[str, Any]:
        """`deep` as keywords of the text model, for positions that enter as embeddings."""
        raise UnsupportedCall(f"{self.name} adds nothing of the vision tower behind its first layer; leave out deep")

    def head(self, model: Any, h: Float[Tensor, "*n D"], images: bool = False) -> Float[Tensor, "*n V"]:
        """Logits of hidden states behind the last norm, as the model's own forward gives them.

        Args:
            model: whose head it is.
            h: behind the last norm.
            images: those of image tokens too, where the model's own forward hides them.
        """
        return model.get_output_embeddings()(h)

    # positions and images

    def positions(
        self,
        model: Any,
        ids: Int[Tensor, "B N"],
        mask: Int[Tensor, "B N"],
        grids: Int[Tensor, "images 3"] | None = None,
        mm_token_type_ids: Int[Tensor, "B N"] | None = None,
    ) -> Tensor:
        """Explicit position ids of a whole sequence; drivers slice what is new.

        Args:
            model: the model the ids are for.
            ids: the whole sequence of each row, left-padded.
            mask: 1 where an id is real.
            grids: `image_grid_thw` of every image, row by row (Qwen-VL; ignored elsewhere).
            mm_token_type_ids: 1 at image placeholders; found from the ids where it is None.

        Returns:
            (B, N), or (3, B, N) where positions have a time, a row and a column (Qwen-VL).
        """
        return running_positions(mask)

    def generate_positions(self, positions: Tensor, mask: Int[Tensor, "B N"]) -> Tensor:
        """`positions` in the form `generate()` takes: (4, B, N) on Qwen-VL, unchanged elsewhere."""
        return positions

    def image_kwargs(self, batch: Mapping[str, Any]) -> list[str]:
        """Names of the batch's tensors that belong to its images, and not to its text."""
        return [name for name in self.image_tensors if batch.get(name) is not None]

    @abstractmethod
    def image_grid(self, model: Any, batch: Mapping[str, Any]) -> list[tuple[int, int]]:
        """(rows, columns) of vision positions in the text model, for each image of the batch in order."""

    def lead(self, model: Any) -> int:
        """Vision positions of an image before those of its grid, which have no place of their own in it."""
        return 0

    def image_features(self, model: Any, batch: Mapping[str, Any]) -> list[Float[Tensor, "n D"]]:
        """Input embeddings of each image's tokens, as the text model gets them; one call of the vision tower."""
        return list(model.get_image_features(**{name: batch[name] for name in self._encoder_inputs}).pooler_output)

    _encoder_inputs: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def grid_to_pixels(
        self, size: tuple[int, int], grid: tuple[int, int], window: tuple[int, int, int, int]
    ) -> tuple[int, int, int, int]:
        """The part of a native picture that a window of its tokens shows.

        Args:
            size: width and height of the picture.
            grid: rows and columns of its tokens.
            window: first row and column, rows and columns.

        Returns:
            Left, upper, right and lower edge; here of a picture that was shrunk to its middle square.
        """
        side = min(size)
        left, upper = (size[0] - side) // 2, (size[1] - side) // 2
        return box(window, side / grid[1], side / grid[0], left, upper)

    def _pixels(self, batch: Mapping[str, Any]) -> Tensor:
        pixels = batch.get("pixel_values")
        if pixels is None:
            raise InputError(f"{self.name}: the batch holds no pixel_values, so no image; pass at least one image")
        return pixels

    # image output

    def unlock_images(self, model: Any) -> None:
        """Lets the model write image tokens.

        Raises:
            UnsupportedCall: the family has none to write.
        """
        raise UnsupportedCall(f"{self.name} writes text only; image thoughts need chameleon (Anole weights)")

    def lock_images(self, model: Any) -> None:  # noqa: B027 (optional, like unlock_images)
        """Undoes `unlock_images`; nothing to do where there is nothing to unlock."""

    def read_pictures(self, model: Any, processor: Any, pictures: Sequence[Any]) -> list[list[int]]:
        """Pictures as the token ids that the model would write them with, row by row.

        Args:
            model: one that writes pictures.
            processor: of the model.
            pictures: Pillow images.

        Raises:
            UnsupportedCall: the family writes none.
        """
        raise UnsupportedCall(f"{self.name} writes text only; image thoughts need chameleon (Anole weights)")

    def canvas(self, model: Any, processor: Any) -> Canvas:
        """What pictures that the model writes are made of.

        Raises:
            UnsupportedCall: the family has none to write.
            ConfigError: this checkpoint's vocabulary cannot bracket a picture.
        """
        raise UnsupportedCall(f"{self.name} writes text only; image thoughts need chameleon (Anole weights)")
