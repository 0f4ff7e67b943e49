"""Stable Diffusion XL's two text encoders and size conditions through the engine, against its own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import BertTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.image_request import noise_generator
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.sampler import Sampler
from tests.core.small_pipeline import LEVELS, WORDS
from tests.core.tiny import randomize

TOKENS = 12


@pytest.fixture(scope="module")
def pipeline_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock pipeline, with an expert beside it."""
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    shape = {"vocab_size": len(vocab), "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    shape |= {"intermediate_size": 32, "max_position_embeddings": TOKENS, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = CLIPTextModel(CLIPTextConfig(**shape))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**shape, projection_dim=14))
        vae = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
            up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16, scaling_factor=0.5,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=[1, 2], attention_head_dim=[2, 4], use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 14,
        )  # fmt: skip
    randomize(unet, 0)
    folder = tmp_path_factory.mktemp("sdxl")
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=TOKENS)
    StableDiffusionXLPipeline(
        vae=vae.eval(), text_encoder=first.eval(), text_encoder_2=second.eval(), tokenizer=tokenizer, tokenizer_2=tokenizer,
        unet=unet.eval(), scheduler=EulerDiscreteScheduler(),
    ).save_pretrained(folder / "teacher")  # fmt: skip
    code = GatedUNet(unet).space.random_code(0.5, torch.Generator().manual_seed(1))
    prune_unet(unet, code).save_pretrained(folder / "expert")
    return folder


@pytest.mark.parametrize("part", ["teacher/unet", "expert"])
def test_the_engine_draws_what_the_pipeline_draws(pipeline_dir: Path, part: str) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipeline_dir / "teacher", add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    model = load_unet(pipeline_dir / part)
    pipeline.unet = model.unet
    # The tiny VAE halves twice as seldom as the real one: the model is told sizes at the real one's factor.
    sizes = {"original_size": (64, 64), "target_size": (64, 64)}
    sampler = Sampler.from_components(model, load_components(pipeline_dir / "teacher"), max_batch_size=3)
    prompts, negatives, seeds = ["a red apple", "green fox runs", "blue sky"], ["", "flat icon", ""], [3, 4, 5]
    drawn = sampler.generate(prompts, seeds, num_inference_steps=4, guidance_scale=5.0, negative_prompts=negatives)
    for prompt, negative, seed, image in zip(prompts, negatives, seeds, drawn, strict=True):
        latents = torch.randn((1, 4, 8, 8), generator=noise_generator(seed, 0))
        expected = pipeline(
            prompt, negative_prompt=negative or None, num_inference_steps=4, guidance_scale=5.0, latents=latents,
            height=16, width=16, output_type="np", **sizes,
        ).images[0]  # fmt: skip
        assert int(np.abs(np.asarray(image, dtype=int) - np.round(255 * expected)).max()) <= LEVELS
