"""A small VAE from scratch: its encoder is solved for, its decoder is trained. Only a teacher that is made here needs it.

Training encoder and decoder together from random weights took hours on two cores to reach what a linear autoencoder reaches
exactly, in seconds: the principal components of 8 x 8 patches. So the encoder *is* these components, written into the weights of
a stock ``AutoencoderKL``, and the decoder, which may be as nonlinear as it likes, has a fixed and informative code to learn from.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

# Of the constant channels that hold the last GroupNorm's statistics still, in units of the components' scale.
_ANCHOR = 100.0


class VaeObjective(nn.Module):
    """Reconstruction of images by a VAE whose encoder is frozen: L1 + L2 + distance of image gradients.

    Image gradients (differences of neighbouring pixels) keep thin outlines sharp, which L1 and L2 alone blur away.
    """

    def __init__(self, vae: AutoencoderKL, *, gradient_weight: float) -> None:
        super().__init__()
        self.vae = vae
        self.vae.encoder.requires_grad_(False)
        self.vae.quant_conv.requires_grad_(False)
        self.gradient_weight = gradient_weight

    def forward(self, images: Tensor, noise: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Args:
            images: [batch, 3, height, width] in [-1, 1].
            noise: standard normal, of the latent's shape; the draw of the posterior.

        Returns:
            named losses, and statistics.
        """
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        difference = decoded - images
        gradients = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        squared = difference.square().mean()
        losses = {"l1": difference.abs().mean(), "l2": squared, "gradient": self.gradient_weight * gradients}
        return losses, {"psnr": 10 * math.log10(4.0 / max(squared.item(), 1e-9))}


def patch_components(images: Tensor, patch: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Principal components of square patches.

    Args:
        images: [n, 3, height, width] in [-1, 1].
        patch: pixels of a patch's side.
        count: how many components.

    Returns:
        mean [3, patch, patch], components [count, 3, patch, patch] (orthonormal), standard deviations [count].
    """
    rows = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 1, 4, 5)  # [n, y, x, 3, patch, patch]
    flat = rows.reshape(-1, 3 * patch * patch).double()
    mean = flat.mean(0)
    centred = flat - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(flat))  # ascending
    order = values.argsort(descending=True)[:count]
    shape = (-1, 3, patch, patch)
    return mean.view(shape[1:]), vectors[:, order].T.reshape(shape), values[order].clamp_min(1e-12).sqrt()


@torch.no_grad()
def solve_encoder(vae: AutoencoderKL, images: Tensor, *, whitening: float = 0.5, posterior_std: float = 0.02) -> None:
    """Writes the principal components of patches into the encoder's weights: exact up to rounding, for any image.

    Convolutions of stride 2 collect 2 x 2 pixels into channels (their padding reaches only taps of weight zero), the last of
    them projects; residual branches are closed. SiLU is linear on a pair of channels (silu(x) - silu(-x) = x), and the last
    GroupNorm is made to divide by a constant: each group holds constant channels of +-A, far larger than the components.

    Args:
        vae: with one layer a block and no attention in its encoder.
        images: [n, 3, height, width] in [-1, 1].
        whitening: component k is divided by its standard deviation to this power, and all by one number, so that latents have
            unit variance on the whole: at 1 the faintest component is as loud as the first, at 0 it drowns in noise early.
        posterior_std: of the posterior.

    Raises:
        ValueError: if the architecture cannot hold the components.
    """
    encoder, latents = vae.encoder, int(vae.config["latent_channels"])
    levels = len(vae.config["block_out_channels"]) - 1
    mean, components, deviations = patch_components(images, 2**levels, latents)
    groups, width = encoder.conv_norm_out.num_groups, encoder.conv_norm_out.num_channels
    held = math.ceil(latents / groups)  # components of a group; each takes two channels
    if 2 * held + 2 > width // groups or any(3 * 4**i > c for i, c in enumerate(vae.config["block_out_channels"][:levels])):
        raise ValueError(f"{latents} latent channels do not fit into encoder widths {vae.config['block_out_channels']}")
    for module in encoder.modules():
        if isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
            if module.conv_shortcut is not None:
                _zero(module.conv_shortcut)
                many = min(module.conv_shortcut.weight.shape[:2])
                module.conv_shortcut.weight[range(many), range(many), 0, 0] = 1.0
    _zero(encoder.conv_in)
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1.0
    _collect_patches(encoder, levels, components)
    scale = deviations**-whitening
    scale /= (deviations * scale).square().mean().sqrt()
    _read_out(vae, encoder.down_blocks[levels].resnets[0].conv_shortcut, held, scale, (components * mean).sum((1, 2, 3)))
    quant: Any = vae.quant_conv
    _zero(quant)
    quant.weight[range(2 * latents), range(2 * latents), 0, 0] = 1.0
    quant.bias[latents:] = 2 * math.log(posterior_std)
    vae.register_to_config(scaling_factor=1.0)


def _collect_patches(encoder: Any, levels: int, components: Tensor) -> None:
    """Downsamplers: channel c at tap (i, j) goes to channel 4 c + 2 i + j; the last one projects on the components."""
    for level in range(levels):
        conv = encoder.down_blocks[level].downsamplers[0].conv
        _zero(conv)
        if level < levels - 1:
            for channel in range(3 * 4**level):
                for tap in range(4):
                    conv.weight[4 * channel + tap, channel, tap // 2, tap % 2] = 1.0
            continue
        count, side = len(components), components.shape[-1]
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        for color in range(3):
            source = torch.full_like(y, color)
            for bit in range(level):  # the finest level collects first: its bit is the lowest of the coordinates
                source = 4 * source + 2 * ((y >> bit) & 1) + ((x >> bit) & 1)
            top = ((y >> level) & 1, (x >> level) & 1)
            conv.weight[:count, source, top[0], top[1]] = components[:, color].float()


def _read_out(vae: AutoencoderKL, spread: Any, held: int, scale: Tensor, mean: Tensor) -> None:
    """Components -> pairs beside constant anchors -> GroupNorm -> SiLU -> latents."""
    encoder, norm = vae.encoder, vae.encoder.conv_norm_out
    per_group = norm.num_channels // norm.num_groups
    _zero(spread)
    _zero(encoder.conv_out)
    anchors = (per_group - 2 * held) // 2 * 2
    # Pairs and anchors cancel in a group's mean; its variance is the anchors' alone, to 1e-4.
    norm.weight.fill_(_ANCHOR * math.sqrt(anchors / per_group))
    norm.bias.zero_()
    for index, (factor, offset) in enumerate(zip(scale.tolist(), mean.tolist(), strict=True)):
        plus = index // held * per_group + 2 * (index % held)
        spread.weight[plus, index, 0, 0], spread.weight[plus + 1, index, 0, 0] = 1.0, -1.0
        spread.bias[plus], spread.bias[plus + 1] = -offset, offset
        encoder.conv_out.weight[index, plus, 1, 1], encoder.conv_out.weight[index, plus + 1, 1, 1] = factor, -factor
    for group in range(norm.num_groups):
        begin = group * per_group + 2 * held
        spread.bias[begin : begin + anchors : 2], spread.bias[begin + 1 : begin + anchors : 2] = _ANCHOR, -_ANCHOR


def _zero(layer: Any) -> None:
    layer.weight.zero_()
    layer.bias.zero_()
