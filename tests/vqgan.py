"""The decoder of CompVis' VQGAN, as Chameleon's checkpoints hold it: random weights by name, what it computes."""

import torch
import torch.nn.functional as F

__all__ = ["decoded", "vqgan_weights"]


def vqgan_weights(vq_config, seed=0):
    """Random weights under the names of CompVis' VQGAN, level 0 the finest, no attention in the levels."""
    drawn = torch.Generator().manual_seed(seed)
    weights = {}

    def conv(name, inside, outside, side):
        weights[f"{name}.weight"] = torch.randn(outside, inside, side, side, generator=drawn) / (inside**0.5 * side)
        weights[f"{name}.bias"] = torch.randn(outside, generator=drawn) * 0.1

    def norm(name, width):
        weights[f"{name}.weight"] = 1 + torch.randn(width, generator=drawn) * 0.1
        weights[f"{name}.bias"] = torch.randn(width, generator=drawn) * 0.1

    def resnet(name, inside, outside):
        norm(f"{name}.norm1", inside)
        conv(f"{name}.conv1", inside, outside, 3)
        norm(f"{name}.norm2", outside)
        conv(f"{name}.conv2", outside, outside, 3)
        if inside != outside:
            conv(f"{name}.nin_shortcut", inside, outside, 1)

    widths = [vq_config.base_channels * factor for factor in vq_config.channel_multiplier]
    width = widths[-1]
    conv("conv_in", vq_config.latent_channels, width, 3)
    resnet("mid.block_1", width, width)
    norm("mid.attn_1.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        conv(f"mid.attn_1.{part}", width, width, 1)
    resnet("mid.block_2", width, width)
    for level in reversed(range(len(widths))):
        for block in range(vq_config.num_res_blocks + 1):
            resnet(f"up.{level}.block.{block}", width, widths[level])
            width = widths[level]
        if level:
            conv(f"up.{level}.upsample.conv", width, width, 3)
    norm("norm_out", width)
    conv("conv_out", width, 3, 3)
    return weights


def decoded(weights, z, levels, blocks):
    """The VQGAN's decoder, step by step, by the names of its weights."""

    def conv(name, x):
        weight = weights[f"{name}.weight"]
        return F.conv2d(x, weight, weights[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, x):
        return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    def resnet(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in weights else x)

    x = resnet("mid.block_1", conv("conv_in", z))
    normed = norm("mid.attn_1.norm", x)
    q, k, v = (conv(f"mid.attn_1.{part}", normed).flatten(2) for part in "qkv")
    seen = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(-1)
    x = x + conv("mid.attn_1.proj_out", (v @ seen.transpose(1, 2)).view(x.shape))
    x = resnet("mid.block_2", x)
    for level in reversed(range(levels)):
        for block in range(blocks + 1):
            x = resnet(f"up.{level}.block.{block}", x)
        if level:
            x = conv(f"up.{level}.upsample.conv", F.interpolate(x, scale_factor=2, mode="nearest"))
    return conv("conv_out", F.silu(norm("norm_out", x)))
