"""A stock pipeline of a few thousand weights, a sampler around its parts, and when two images count as the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import BertConfig, BertModel, BertTokenizer, CLIPTextConfig, CLIPTextModel

from aptp_ray.core.components import TextEncoder
from aptp_ray.core.image_request import Handle, ImageRequest
from aptp_ray.core.sampler import Sampler

# In float32 a larger batch changes the order of sums, no more. Of latents, whose values are around 1:
TOLERANCE = 1e-4
# Of pixels, in steps of 8 bits: a value may lie just beside where rounding turns.
LEVELS = 1
WORDS = ["a", "red", "apple", "green", "fox", "runs", "blue", "sky", "flat", "icon"]


def small_pipeline(text: str, scheduler: object) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    tokens = 12
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=tokens)
    if text == "bert":
        config = BertConfig(
            vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        config.use_attention_mask = True
        encoder: torch.nn.Module = BertModel(config)
    else:
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(vocab), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=tokens, eos_token_id=3, bos_token_id=2, pad_token_id=0,
            )
        )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.5,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(), text_encoder=encoder.eval(), tokenizer=tokenizer, unet=unet.eval(), scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampler_of(pipeline: StableDiffusionPipeline, max_batch_size: int = 8, scheduler: object = None, **options: Any) -> Sampler:
    text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
    own = scheduler or pipeline.scheduler
    return Sampler(pipeline.unet, pipeline.vae, text, own, max_batch_size=max_batch_size, **options)


def run(sampler: Sampler, requests: list[ImageRequest]) -> list[Handle]:
    handles = [sampler.submit(request) for request in requests]
    while sampler.busy:
        sampler.step()
    assert [handle.state for handle in handles] == ["done"] * len(handles)
    return handles


def levels(first: Handle | np.ndarray, second: Handle | np.ndarray) -> int:
    """Largest difference of two images in steps of 8 bits."""
    a, b = (np.asarray(i.pixels if isinstance(i, Handle) else i, dtype=int) for i in (first, second))
    return int(np.abs(a - b).max())


def same(first: Handle, second: Handle) -> bool:
    return float((first.latents - second.latents).abs().max()) < TOLERANCE and levels(first, second) <= LEVELS
