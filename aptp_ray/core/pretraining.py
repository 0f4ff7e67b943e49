"""The objective of training a small VAE from scratch; only a teacher that is made here (the demo's) needs it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn


class VaeObjective(nn.Module):
    """Reconstruction of images by a VAE: L1 + L2 + distance of image gradients + KL.

    Image gradients (differences of neighbouring pixels) keep thin outlines sharp, which L1 and L2 alone blur away.
    """

    def __init__(self, vae: AutoencoderKL, *, gradient_weight: float, kl_weight: float) -> None:
        super().__init__()
        self.vae = vae
        self.gradient_weight = gradient_weight
        self.kl_weight = kl_weight

    def forward(self, images: Tensor, noise: Tensor, decoder_only: bool = False) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Args:
            images: [batch, 3, height, width] in [-1, 1].
            noise: standard normal, of the latent's shape; the draw of the posterior.
            decoder_only: the encoder gets no gradient.

        Returns:
            named, weighted losses, and statistics.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not decoder_only):
            posterior = self.vae.encode(images).latent_dist
        # The decoder alone learns on the posterior's mean, which is what sampling gives it in the end.
        latents = posterior.mean if decoder_only else posterior.mean + posterior.std * noise
        decoded = self.vae.decode(latents).sample.float()
        difference = decoded - images
        gradients = sum((difference.diff(dim=dim).abs().mean() for dim in (-1, -2)), torch.zeros(()))
        losses = {
            "l1": difference.abs().mean(),
            "l2": difference.square().mean(),
            "gradient": self.gradient_weight * gradients,
        }
        if decoder_only:  # a zero gradient for the encoder: DDP waits for one of every parameter
            frozen = [*self.vae.encoder.parameters(), *self.vae.quant_conv.parameters()]
            losses["kl"] = 0.0 * torch.stack([parameter.sum() for parameter in frozen]).sum()
        else:
            losses["kl"] = self.kl_weight * posterior.kl().mean() / latents[0].numel()
        psnr = 10 * torch.log10(4.0 / F.mse_loss(decoded.detach().clamp(-1, 1), images))
        return losses, {"psnr": psnr.item()}


@torch.no_grad()
def fold_latent_statistics(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Makes the VAE's latents zero-mean and unit-variance per channel, exactly, by changing its 1x1 convolutions.

    ``z' = (z - mean) / std`` goes into ``quant_conv`` (its log-variances lose ``2 log std``), the inverse into
    ``post_quant_conv``; ``scaling_factor`` becomes 1. Decoding an encoded image gives the same pixels as before.

    Args:
        mean, std: [latent channels], of the posterior means over images.
    """
    mean, std = mean.float(), std.float()
    quant, post = vae.quant_conv, vae.post_quant_conv
    channels = mean.numel()
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += torch.einsum("oihw,i->o", post.weight, mean)
    post.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0)
