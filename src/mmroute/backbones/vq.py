"""Chameleon's pictures from their codes: the decoder that Transformers leaves out, of Transformers' own parts.

Stock `ChameleonVQVAE` has the encoder, the codebook and `post_quant_conv`. What follows is shaped like Janus' decoder,
whose weights have the same names, but for two things: Janus puts attention into its coarsest level, Chameleon nowhere
but in the middle; and Janus counts the levels from the coarsest, Chameleon's checkpoints from the finest.

The weights come with a checkpoint, under the names of the VQGAN they were trained as:

    *.safetensors of an Anole folder     model.vqmodel.decoder.*
    tokenizer/vqgan.ckpt (Chameleon's)   decoder.*, a torch file with a `state_dict`

Legend: B pictures, R rows and C columns of codes, S pixels of a code's side, E width of the codebook.

Source: the names and shapes of both are facts of the released checkpoints (GAIR Anole, Meta Chameleon) and of
    CompVis' VQGAN; Transformers declined to add the decoder (pull requests 31919, 32013, 36047).
Deviates: nothing known. The round trip on the real weights has not been seen: they are not ours to ship.
"""

import json
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from mmroute.errors import CheckpointMismatch

__all__ = ["PictureDecoder", "find_decoder", "stock_name"]

PREFIX = "model.vqmodel.decoder."
CHECKPOINT = Path("tokenizer") / "vqgan.ckpt"
_INDEX = "model.safetensors.index.json"
_LEVEL = re.compile(r"^up\.(\d+)\.")


def stock_name(name: str, levels: int) -> str:
    """The name in the stock decoder of a weight of the VQGAN's, without its prefix.

    Args:
        name: such as `up.0.block.1.conv1.weight`, level 0 the finest.
        levels: of the decoder.

    Example:
        >>> stock_name("up.0.block.1.conv1.weight", 5), stock_name("mid.attn_1.q.bias", 5)
        ('up.4.block.1.conv1.weight', 'mid.attn_1.q.bias')
    """
    return _LEVEL.sub(lambda level: f"up.{levels - 1 - int(level[1])}.", name)


class PictureDecoder(nn.Module):
    """Codes to pixels, for one model."""

    def __init__(self, vqmodel: Any) -> None:
        """
        Args:
            vqmodel: the model's stock `ChameleonVQVAE`, whose codebook and sizes it shares.
        """
        super().__init__()
        from transformers.models.janus.modeling_janus import JanusVQVAEConfig, JanusVQVAEDecoder

        given = vqmodel.config
        config = JanusVQVAEConfig(
            embed_dim=given.embed_dim,
            num_embeddings=given.num_embeddings,
            latent_channels=given.latent_channels,
            base_channels=given.base_channels,
            channel_multiplier=list(given.channel_multiplier),
            num_res_blocks=given.num_res_blocks,
            out_channels=given.in_channels,
        )
        self.decoder = JanusVQVAEDecoder(config)
        self.decoder.up[0].attn = nn.ModuleList()
        self.levels = len(given.channel_multiplier)
        self.__dict__["vqmodel"] = vqmodel  # shared, so no part of this module
        self.requires_grad_(False).eval()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes the decoder's weights.

        Args:
            weights: by the VQGAN's names, without prefix.

        Raises:
            CheckpointMismatch: one is missing, unknown or of another shape.
        """
        renamed = {stock_name(name, self.levels): value for name, value in weights.items()}
        wanted = {name: tuple(value.shape) for name, value in self.decoder.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in renamed.items()}
        if wanted != given:
            wrong = sorted(name for name in {*wanted, *given} if wanted.get(name) != given.get(name))
            name = wrong[0]
            raise CheckpointMismatch(
                f"the picture decoder's {name} is {given.get(name, 'missing')} in the checkpoint and "
                f"{wanted.get(name, 'unknown')} by vq_config ({len(wrong)} weights differ); take both from one release"
            )
        self.decoder.load_state_dict(renamed)

    @torch.no_grad()
    def pixels(self, codes: Int[Tensor, "B R C"]) -> Float[Tensor, "B 3 H W"]:
        """Pixel values in [-1, 1] of pictures given by their codes (not token ids); H = R * S, W = C * S."""
        vq: Any = self.vqmodel
        weight = self.decoder.conv_in.weight
        entries = vq.quantize.embedding(codes.to(vq.quantize.embedding.weight.device)).permute(0, 3, 1, 2)
        hidden = vq.post_quant_conv(entries.contiguous()).to(weight.device, weight.dtype)
        return self.decoder(hidden).clamp(-1, 1)

    def pictures(self, codes: Int[Tensor, "B R C"]) -> list[Image.Image]:
        """The same as images in RGB."""
        values = ((self.pixels(codes).float() + 1) * 127.5).round().to(torch.uint8)
        return [Image.fromarray(each.permute(1, 2, 0).cpu().numpy()) for each in values]


def find_decoder(folder: Path, model: Any) -> PictureDecoder | None:
    """The decoder whose weights lie in a Chameleon or Anole checkpoint folder; None where there are none.

    Raises:
        CheckpointMismatch: the weights do not fit the model, or the file is broken.
    """
    weights = _safetensors(folder) or _ckpt(folder / CHECKPOINT)
    if not weights:
        return None
    decoder = PictureDecoder(model.model.vqmodel)
    decoder.load(weights)
    like = model.model.vqmodel.post_quant_conv.weight
    return decoder.to(like.device, like.dtype)


def _safetensors(folder: Path) -> dict[str, Tensor]:
    index = folder / _INDEX
    if index.exists():
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted({file for name, file in where.items() if name.startswith(PREFIX)})
    else:
        files = [path.name for path in folder.glob("model.safetensors")]
    weights: dict[str, Tensor] = {}
    for file in files:
        with safe_open(folder / file, framework="pt") as stored:
            names = [name for name in stored.keys() if name.startswith(PREFIX)]  # noqa: SIM118 (no mapping)
            weights |= {name.removeprefix(PREFIX): stored.get_tensor(name) for name in names}
    return weights


def _ckpt(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        return {}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        cause = str(error).strip().splitlines()[0]
        raise CheckpointMismatch(
            f"{path} is no torch file of tensors under `state_dict` ({cause}); copy it from the release again"
        ) from None
    return {name.removeprefix("decoder."): value for name, value in state.items() if name.startswith("decoder.")}
