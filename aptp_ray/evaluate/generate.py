"""Teacher and experts draw the same prompts from the same noise, one Ray task for each UNet and some of its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config
from aptp_ray.core.components import denoiser_dir, load_components, load_unet
from aptp_ray.core.macs import count_macs
from aptp_ray.core.randomness import key_seed
from aptp_ray.core.sampler import Sampler
from aptp_ray.tracking import Progress

# Enough to pay for loading a UNet; more prompts become more tasks, which a cluster runs side by side.
_PROMPTS_PER_TASK = 32


@dataclass(frozen=True)
class Sample:
    """One prompt, drawn twice.

    Attributes:
        prompt: what was asked.
        seed: of the noise that both start from.
        expert: that the prompt is routed to.
        teacher_image: uint8 [height, width, 3].
        expert_image: the same, by the expert.
    """

    prompt: str
    seed: int
    expert: int
    teacher_image: np.ndarray
    expert_image: np.ndarray


@dataclass(frozen=True)
class Model:
    """What was found in a UNet's folder: MACs by a counter, and parameters."""

    counted_macs: int
    parameters: int


@dataclass(frozen=True)
class Drawn:
    """All samples in the prompts' order, the teacher, and the experts in theirs."""

    samples: list[Sample]
    teacher: Model
    experts: list[Model]


def sample_seed(seed: int, index: int) -> int:
    """Returns the seed of prompt ``index``; short enough to be typed into a request."""
    return key_seed(seed, "report", index) % 2**31


def draw_samples(
    config: Config,
    run: RunDir,
    prompts: Sequence[str],
    routed: Sequence[int],
    *,
    latent_size: tuple[int, int],
    num_tokens: int,
) -> Drawn:
    """Draws every prompt with the teacher and with its expert, and counts each UNet as it lies in the run directory.

    Args:
        config: ``sampling``, ``report.seed`` and ``compute`` decide how.
        run: the run directory.
        prompts: what to draw.
        routed: the expert of each prompt.
        latent_size: height and width at which MACs are counted.
        num_tokens: text length at which MACs are counted.

    Raises:
        ValueError: if ``prompts`` and ``routed`` differ in length.
        RunDirError: if a UNet is not there.
    """
    if len(prompts) != len(routed):
        raise ValueError(f"{len(prompts)} prompts but {len(routed)} routes")
    seeds = [sample_seed(config.report.seed, index) for index in range(len(prompts))]
    # Experts that no prompt is routed to have a task, too: their MACs are counted there.
    owners: dict[int | None, list[int]] = {None: list(range(len(prompts)))}
    owners |= {expert: [i for i, k in enumerate(routed) if k == expert] for expert in range(config.router.experts)}
    compute = config.compute
    start = ray.remote(draw_group).options(
        num_cpus=compute.cpus_per_worker, num_gpus=compute.gpus_per_worker, accelerator_type=compute.accelerator_type
    )
    waiting: dict[Any, tuple[int | None, list[int]]] = {}
    for expert, indices in owners.items():
        for begin in range(0, max(1, len(indices)), _PROMPTS_PER_TASK):
            some = indices[begin : begin + _PROMPTS_PER_TASK]
            task = start.remote(
                config,
                run.uri,
                expert,
                [prompts[i] for i in some],
                [seeds[i] for i in some],
                (latent_size, num_tokens) if begin == 0 else None,
            )
            waiting[task] = (expert, some)
    progress = Progress("samples", 2 * len(prompts), unit="images")
    images: dict[tuple[int | None, int], np.ndarray] = {}
    models: dict[int | None, Model] = {}
    while waiting:
        (task,), _ = ray.wait(list(waiting))
        expert, some = waiting.pop(task)
        drawn, model = ray.get(task)
        images |= {(expert, index): image for index, image in zip(some, drawn, strict=True)}
        if model is not None:
            models[expert] = model
        progress.update(len(images))
    samples = [
        Sample(prompt, seeds[i], routed[i], images[None, i], images[routed[i], i]) for i, prompt in enumerate(prompts)
    ]
    return Drawn(samples, models[None], [models[expert] for expert in range(config.router.experts)])


def draw_group(
    config: Config,
    run_uri: str,
    expert: int | None,
    prompts: Sequence[str],
    seeds: Sequence[int],
    counted_at: tuple[tuple[int, int], int] | None,
) -> tuple[list[np.ndarray], Model | None]:
    """Draws prompts with one UNet; a Ray task.

    Args:
        config: the whole tree.
        run_uri: the run directory.
        expert: whose UNet; None: the teacher's.
        prompts: what to draw; may be empty.
        seeds: one a prompt.
        counted_at: (height, width) of latents and text length at which MACs are counted; None: not counted.
    """
    run = RunDir(run_uri, config.storage_options)
    device = "cuda" if config.compute.gpus_per_worker > 0 else "cpu"
    if device == "cpu":
        torch.set_num_threads(config.compute.threads_per_worker)
    teacher_dir = run.local("teacher")
    folder = denoiser_dir(teacher_dir) if expert is None else Path(run.local("experts", str(expert)))
    unet = load_unet(folder, device=device)
    model = None
    if counted_at is not None:
        latent_size, num_tokens = counted_at
        counted = count_macs(unet, latent_size=latent_size, num_tokens=num_tokens)
        model = Model(counted, sum(parameter.numel() for parameter in unet.parameters()))
    if not prompts:
        return [], model
    sampler = Sampler.from_components(
        unet,
        load_components(teacher_dir, device=device),
        scheduler=config.sampling.scheduler,
        max_batch_size=config.serve.max_batch_size or 8,
        resolution=config.data.resolution,
    )
    drawn = sampler.generate(
        prompts,
        seeds,
        num_inference_steps=config.sampling.num_inference_steps,
        guidance_scale=config.sampling.guidance_scale,
    )
    return [np.asarray(image) for image in drawn], model
