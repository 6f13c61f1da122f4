"""The exact atlas tokenizer: a stock Chameleon image encoder whose code for a tile is the tile's number in the atlas.

Nothing is trained and nothing is new: the weights of a stock `ChameleonVQVAE` are set so that it maps each tile of 16
pixels to a linear projection of its pixels, whatever lies beside it, and the codebook holds the projections of the
clean tiles. So a tile picture goes through a stock processor and a stock model as any picture does, and comes out as
the codes it was drawn from; `picture` draws what the model wrote from the same atlas.

How a stack of convolutions and norms becomes linear: residual branches end in zeros, so blocks pass their input on;
each downsampling takes 2 x 2 cells apart into channels and projects them; before the last norm every channel stands
beside its negative, so each group of two has mean zero, and all is so small that the norm's epsilon, not the variance,
divides. Behind it, silu(y) - silu(-y) = y.

Exact for pictures without noise; with the noise of `small` a few tiles in a thousand are read as their neighbours.

Legend: C tiles of one side, T atlas codes, E width of the codebook.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import nn

from mmroute.tasks import _skins

__all__ = ["NUM_CODES", "TILE", "code_name", "picture", "set_weights", "vq_config"]

TILE = 16
"""Pixels of one side of a tile: four halvings."""
NUM_CODES = _skins.NUM_CODES
_WIDTH = 32
"""Numbers that a tile is projected to; the norms of stock code want multiples of 32 channels."""
_SMALL = 1e-6
"""What pixels are multiplied by; squared it vanishes beside the norms' epsilon of 1e-6."""
_RESCALE = 0.0078
"""Chameleon's image processor: pixels times this, less one."""
_BATCH = 64


def vq_config(canvas: int) -> dict[str, Any]:
    """The `vq_config` of a model that sees canvases of this many tiles a side."""
    return {
        "resolution": canvas * TILE,
        "base_channels": _WIDTH,
        "channel_multiplier": [1, 1, 1, 1, 2],
        "num_res_blocks": 1,
        "latent_channels": _WIDTH,
        "embed_dim": _WIDTH,
        "num_embeddings": NUM_CODES,
    }


def code_name(code: int) -> str:
    """The vocabulary's word for a code: its digits as letters A to J.

    Example:
        >>> code_name(120)
        'IMGIMGBCAZ'
    """
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


@torch.no_grad()
def set_weights(vqmodel: Any, dtype: torch.dtype = torch.bfloat16) -> None:
    """Makes a stock `ChameleonVQVAE` of `vq_config` the tokenizer of the atlas.

    Args:
        vqmodel: float32.
        dtype: what the weights will be stored in; they are rounded to it, so that storing them changes nothing.
    """
    drawn = torch.Generator().manual_seed(0)
    for part in vqmodel.modules():
        if isinstance(part, nn.Conv2d):
            for parameter in part.parameters():
                parameter.zero_()
    encoder = vqmodel.encoder
    for colour in range(3):
        encoder.conv_in.weight[colour, colour, 1, 1] = _SMALL
    known = 3
    for level in encoder.down[:-1]:
        apart = torch.zeros(4 * known, known, 3, 3)
        for channel in range(known):
            for row in range(2):
                for column in range(2):
                    apart[4 * channel + 2 * row + column, channel, row, column] = 1
        if len(apart) > _WIDTH:
            across = torch.linalg.qr(torch.randn(len(apart), _WIDTH, generator=drawn)).Q.T
            apart = torch.einsum("oc,cihw->oihw", across, apart)
        level.downsample.conv.weight[: len(apart), :known] = apart
        known = len(apart)
    both = encoder.down[-1].block[0].nin_shortcut.weight
    for channel in range(_WIDTH):
        both[2 * channel, channel], both[2 * channel + 1, channel] = 1, -1
        encoder.conv_out.weight[channel, 2 * channel, 1, 1] = 1
        encoder.conv_out.weight[channel, 2 * channel + 1, 1, 1] = -1
        vqmodel.quant_conv.weight[channel, channel] = 1e-3 / _SMALL  # the last norm multiplied by 1e3
    for parameter in vqmodel.parameters():
        parameter.copy_(parameter.to(dtype))
    pixels = torch.from_numpy(_skins.atlas(TILE, 0.0)[:, 0].copy()).permute(0, 3, 1, 2).float() * _RESCALE - 1
    entries = [vqmodel.quant_conv(encoder(part))[..., 0, 0] for part in pixels.split(_BATCH)]
    vqmodel.quantize.embedding.weight.copy_(torch.cat(entries).to(dtype))


def picture(codes: Sequence[int] | Int[np.ndarray, " n"]) -> Image.Image:
    """The clean picture of a canvas of codes, given row by row.

    Example:
        >>> picture([0, 1, 2, 3]).size
        (32, 32)
    """
    side = round(len(codes) ** 0.5)
    return _skins.image(_skins.atlas(TILE, 0.0)[np.asarray(codes).reshape(side, side), 0])
