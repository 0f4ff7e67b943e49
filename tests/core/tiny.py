"""Tiny models with the structure of Stable Diffusion 1.5, 2.1 and XL and of PixArt, for tests.

Every parameter, norms' and biases' too, is drawn from a seeded generator: at their usual initial values (ones, zeros) a
channel that should be absent but still emits its bias would go unnoticed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
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


def tiny_inpainting(seed: int = 0) -> UNet2DConditionModel:
    """Stable Diffusion 1.5 that also reads a mask and a masked image: nine input channels, four output channels."""
    return _build(
        seed,
        sample_size=16,
        in_channels=9,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=24,
        norm_num_groups=8,
    )


def tiny_pixart(seed: int = 0, *, conditions: bool = False) -> PixArtTransformer2DModel:
    """Five layers; `conditions` also reads the image's size, as PixArt-alpha at 1024 pixels does."""
    return _build(
        seed,
        PixArtTransformer2DModel,
        num_attention_heads=4,
        attention_head_dim=6,
        in_channels=4,
        out_channels=8,
        num_layers=5,
        cross_attention_dim=24,
        sample_size=16,
        caption_channels=12,
        use_additional_conditions=conditions,
    )


TINY_UNETS = {"sd15": tiny_sd15, "sd21": tiny_sd21, "sdxl": tiny_sdxl}
TINY_MODELS = {**TINY_UNETS, "inpainting": tiny_inpainting, "pixart": tiny_pixart}


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
    unet: Any, batch: int = 2, seed: int = 0, size: int = 16, tokens: int = 5
) -> dict[str, Any]:
    """Keyword arguments for `unet(**inputs)`, distinct for each sample."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if isinstance(unet, PixArtTransformer2DModel):
        inputs = {
            "hidden_states": randn(batch, 4, size, size),
            "timestep": torch.randint(0, 1000, (batch,), generator=generator),
            "encoder_hidden_states": randn(batch, tokens, unet.config.caption_channels),
            "encoder_attention_mask": torch.arange(tokens)[None] <= torch.arange(batch)[:, None] + tokens // 2,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }
        if unet.use_additional_conditions:
            inputs["added_cond_kwargs"] = {"resolution": 100 + randn(batch, 2), "aspect_ratio": 1 + randn(batch, 1)}
        return inputs
    inputs: dict[str, Any] = {
        "sample": randn(batch, unet.config.in_channels, size, size),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "encoder_hidden_states": randn(batch, tokens, unet.config.cross_attention_dim),
    }
    if unet.config.addition_embed_type == "text_time":
        inputs["added_cond_kwargs"] = {"text_embeds": randn(batch, 12), "time_ids": randn(batch, 6)}
    return inputs


def _build(seed: int, kind: type = UNet2DConditionModel, **config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):  # the initial values are overwritten; the global generator stays where it is
        model = kind(**config)
    randomize(model, seed)
    return model.eval()
