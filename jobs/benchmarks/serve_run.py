"""A run directory to serve, made of the shipped teacher in seconds: its experts are cut, not trained.

What a UNet call costs depends on the shapes alone, so the figures are those of a trained run. The images are not.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from aptp_ray.artifacts import RunDir, open_run, resolve_source
from aptp_ray.config import load_config
from aptp_ray.core.components import TextEncoder, load_components
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.importance import ImportanceBatch, measure_importance
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.prompt_encoder import PromptEncoder
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.randomness import keyed_generator
from aptp_ray.demo.captions import captions
from aptp_ray.demo.scenes import generator, render, sample_scene
from aptp_ray.train.draws import noised_batch
from aptp_ray.train.prune import harden, new_router, routed_shares, write_router
from aptp_ray.train.teacher import import_teacher
from aptp_ray.train.worker import noise_schedule
from cli import DEMO_CONFIG

_SAMPLES = 4  # images on which importance is measured; more change the choice of channels, not their number
_PROMPTS = 512  # by which the router parts and prices the codes


def demo_prompts(split: str, count: int) -> list[str]:
    """Returns captions of the demo's data set; "validation" ones are none of those that the router was fitted on."""
    return [captions(sample_scene(0, split, i), generator(0, split, i, 1), 1)[0] for i in range(count)]


def cut_run(folder: str) -> RunDir:
    """Writes teacher, router and experts at the demo's budget, as the stages before serving leave them."""
    config = load_config(DEMO_CONFIG, [f"run_dir={folder}", "tracking.mode=disabled", "serve.max_batch_size=null"])
    run = open_run(config)
    run.prepare(config)
    import_teacher(config, run)
    teacher = run.local("teacher")
    unet = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet").eval()
    side, tokens = unet.config["sample_size"], config.teacher.max_tokens
    macs = MacsModel.measure(unet, latent_size=(side, side), num_tokens=tokens)
    gated = GatedUNet(unet)
    score = measure_importance(gated, [_samples(teacher)], macs=macs).score
    encoder = PromptEncoder.from_pretrained(resolve_source(config.router.prompt_encoder))
    router = new_router(config, gated.space, macs, score, encoder.dim)
    z = encoder.encode(demo_prompts("train", _PROMPTS))
    router.initialise_codes(z, generator=keyed_generator(0, "codes"))
    router.fit_potentials(z, epsilon=config.router.epsilon, relative=config.router.relative_epsilon)
    shares = routed_shares(router, z)
    hard = harden(config, router, macs, shares)
    write_router(run, config, router, macs, hard, shares)
    plain = UNet2DConditionModel.from_pretrained(teacher, subfolder="unet").eval()
    for number, code in enumerate(hard.codes):
        with run.writing("experts", str(number)) as target:
            prune_unet(plain, code).save_pretrained(target)
    return run


@torch.no_grad()
def _samples(teacher: str) -> ImportanceBatch:
    """Returns noised latents of drawn scenes with their captions."""
    parts = load_components(teacher)
    scenes = [sample_scene(0, "train", index) for index in range(_SAMPLES)]
    pixels = torch.from_numpy(np.stack([np.asarray(render(scene), dtype=np.float32) for scene in scenes]))
    latents = parts.vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean * parts.vae.config.scaling_factor
    states = TextEncoder(parts.tokenizer, parts.text_encoder)(demo_prompts("train", _SAMPLES))
    rows = {"mean": latents.numpy(), "text_states": states}
    return noised_batch(rows, 0, noise_schedule(teacher).alphas_cumprod, slice(None), torch.device("cpu"))
