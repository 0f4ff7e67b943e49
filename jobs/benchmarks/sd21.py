"""What a prune step and its encoders take for Stable Diffusion 2.1, in multiply-accumulates, from the models' shapes alone."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, MPNetConfig, MPNetModel

RESOLUTION, TOKENS, CAPTION_TOKENS = 256, 77, 24  # of jobs/configs/sd21_cc3m.yaml; a caption's pieces for the prompt encoder


def inline_ratio() -> tuple[float, str]:
    """Returns the step's work with the encoders inside, in fp32, over its work without; and what that is made of.

    A prune step is a forward of the teacher, a forward of the masked UNet and a backward pass to its masks, which takes the
    products of a forward once more. Half precision is twice as fast at least, so an encoder's MACs in fp32 count double.
    """
    unet, encoders = 3 * _unet(), {"VAE": _vae(), "text encoder": _text(), "prompt encoder": _prompt()}
    inside = 2 * sum(encoders.values())
    parts = ", ".join(f"{name} {macs / 1e9:.0f}" for name, macs in encoders.items())
    return (unet + inside) / unet, f"GMACs a sample: step {unet / 1e9:.0f}; in fp32, each counted double: {parts}"


def _macs(call: object) -> float:
    with FlopCounterMode(display=False) as counter:
        call()  # type: ignore[operator]
    return counter.get_total_flops() / 2


def sd21_unet() -> UNet2DConditionModel:
    """A UNet of Stable Diffusion 2.1's shape (866 million parameters) with random weights, on torch's default device."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // 8,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    )


def _unet() -> float:
    with torch.device("meta"):
        unet = sd21_unet()
        sample, states = torch.empty(1, 4, RESOLUTION // 8, RESOLUTION // 8), torch.empty(1, TOKENS, 1024)
        return _macs(lambda: unet(sample, torch.zeros(1), encoder_hidden_states=states))


def _vae() -> float:
    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        return _macs(lambda: vae.encode(torch.empty(1, 3, RESOLUTION, RESOLUTION)))


def _text() -> float:
    config = CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
        return _macs(lambda: model(torch.zeros(1, TOKENS, dtype=torch.long)))


def _prompt() -> float:
    with torch.device("meta"):
        model = MPNetModel(MPNetConfig())
        return _macs(lambda: model(torch.zeros(1, CAPTION_TOKENS, dtype=torch.long)))
