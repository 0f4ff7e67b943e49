"""What a UNet in training draws: fixed prompts and seeds, each time its losses on held-out rows are looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from aptp_ray.config import Config
from aptp_ray.core.backbones import as_unet
from aptp_ray.core.components import Components, load_components
from aptp_ray.core.randomness import key_seed
from aptp_ray.core.running import eager
from aptp_ray.core.sampler import Sampler
from aptp_ray.tracking import Tracker

# (UNet, numbers of the prompts that it draws): an iterator may make one UNet after the other.
Artists = Callable[[], Iterable[tuple[Any, Sequence[int]]]]


class SampleGrid:
    """Draws prompts with what is being trained, beside the teacher's pictures from the same noise, into the log."""

    def __init__(
        self, config: Config, pipeline_dir: str, device: torch.device, prompts: Sequence[str], artists: Artists, teacher: Any
    ) -> None:
        """Loads nothing yet.

        Args:
            config: ``sampling``, ``data.resolution`` and ``report.seed`` say how prompts are drawn.
            pipeline_dir: of the VAE, the text encoder and the scheduler.
            device: of the UNets.
            prompts: what is drawn; none: nothing is.
            artists: the UNets as they are when they are asked for, each with the prompts that are its own.
            teacher: its UNet.
        """
        self._config, self._pipeline_dir, self._device = config, pipeline_dir, device
        self._prompts, self._artists, self._teacher = list(prompts), artists, teacher
        self._beside: list[np.ndarray] = []

    def __call__(self, tracker: Tracker, step: int) -> None:
        """Logs ``samples``: for each prompt the teacher's picture, and to its right the one of what is being trained."""
        if not self._prompts or not tracker.enabled:
            return
        components = load_components(self._pipeline_dir, device=self._device)
        everything = range(len(self._prompts))
        if not self._beside:
            self._beside = self._drawn(components, self._teacher, everything)
        images: list[Any] = [None] * len(self._prompts)
        for unet, numbers in self._artists():
            for number, drawn in zip(numbers, self._drawn(components, unet, numbers), strict=True):
                images[number] = Image.fromarray(np.concatenate([self._beside[number], drawn], axis=1))
        tracker.log_images("samples", images, step, captions=[f"{prompt} (teacher | step {step})" for prompt in self._prompts])

    def _drawn(self, components: Components, unet: Any, numbers: Sequence[int]) -> list[np.ndarray]:
        """Images uint8 [height, width, 3]."""
        sampling, training = self._config.sampling, unet.training
        with eager(unet.eval()):
            sampler = Sampler.from_components(
                as_unet(unet),
                components,
                scheduler=sampling.scheduler,
                max_batch_size=max(1, len(numbers)),
                resolution=self._config.data.resolution,
            )
            drawn = sampler.generate(
                [self._prompts[number] for number in numbers],
                [key_seed(self._config.report.seed, "samples", number) % 2**31 for number in numbers],
                num_inference_steps=sampling.num_inference_steps,
                guidance_scale=sampling.guidance_scale,
            )
        unet.train(training)
        return [np.asarray(image) for image in drawn]
