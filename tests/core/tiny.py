"""Tiny UNets with the structure of Stable Diffusion 1.5, 2.1 and XL, for tests.

Every parameter, norms' and biases' too, is drawn from a seeded generator: at their usual initial values (ones, zeros) a
channel that should be absent but still emits its bias would go unnoticed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


def tiny_sd15(seed: int = 0) -> UNet2DConditionModel:
    """Four blocks, convolutional projections, the same number of heads everywhere."""
    return _build(
        seed,
        sample_size=16,
        block_out_channels=(16, 32, 32, 32),
        attention_head_dim=4,
        cross_attention_dim=24,
        norm_num_groups=8,
    )


def tiny_sd21(seed: int = 0) -> UNet2DConditionModel:
    """Four blocks, linear projections, heads that grow with the width."""
    return _build(
        seed,
        sample_size=16,
        block_out_channels=(16, 32, 32, 32),
        attention_head_dim=[2, 4, 4, 4],
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
    )


def tiny_sdxl(seed: int = 0) -> UNet2DConditionModel:
    """Three blocks, several transformer layers to a block, pooled text and time ids as added conditions."""
    return _build(
        seed,
        sample_size=16,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[2, 4, 4],
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * 6 + 12,
    )


TINY_UNETS = {"sd15": tiny_sd15, "sd21": tiny_sd21, "sdxl": tiny_sdxl}


def randomize(unet: nn.Module, seed: int) -> None:
    """Draws all parameters: matrices at 1 / sqrt(fan-in), norm weights around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    for module in unet.modules():
        for name, parameter in module.named_parameters(recurse=False):
            draws = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.data = draws / math.sqrt(parameter[0].numel())
            else:
                parameter.data = 0.3 * draws + (1.0 if name == "weight" else 0.0)


def inputs_for(
    unet: UNet2DConditionModel, batch: int = 2, seed: int = 0, size: int = 16, tokens: int = 5
) -> dict[str, Any]:
    """Keyword arguments for `unet(**inputs)`, distinct for each sample."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs: dict[str, Any] = {
        "sample": randn(batch, unet.config.in_channels, size, size),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": randn(batch, tokens, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": randn(batch, 12), "time_ids": randn(batch, 6)}
    return inputs


def _build(seed: int, **config: Any) -> UNet2DConditionModel:
    # On the meta device no initial values are drawn, so the global generator is neither read nor moved.
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet.to_empty(device="cpu")
    randomize(unet, seed)
    return unet.eval()
