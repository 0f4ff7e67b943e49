"""One image to draw, and the handle by which whoever asked for it follows it through the sampler."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aptp_ray.core.randomness import keyed_generator


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw.

    Attributes:
        prompt: what to draw.
        seed: of the initial noise, together with ``index``; 0 to 2**63 - 1.
        index: the image's number within its request.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; none at 1 or less.
        negative_prompt: what guidance steers away from.
        size: (width, height) in pixels; None: the sampler's own.
        latents: [channels, height, width] initial noise of unit variance, in place of the seed's and the size's.
        previews: how many times to show the image while it is being drawn.
    """

    prompt: str
    seed: int = 0
    index: int = 0
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    negative_prompt: str = ""
    size: tuple[int, int] | None = None
    latents: Tensor | None = None
    previews: int = 0

    @property
    def guided(self) -> bool:
        """Whether classifier-free guidance runs."""
        return self.guidance_scale > 1.0

    def check(self, channels: int) -> None:
        """Refuses what cannot be drawn from latents of this many channels.

        Raises:
            ValueError: naming the field.
        """
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must be in 0..2**63-1")
        if self.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; it must be 1 or more")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale is {self.guidance_scale}; it must be a finite number")
        if self.previews < 0:
            raise ValueError(f"previews is {self.previews}; it must be 0 or more")
        if self.latents is not None and (self.latents.ndim != 3 or self.latents.shape[0] != channels):
            raise ValueError(f"latents have shape {tuple(self.latents.shape)}; expected ({channels}, height, width)")


def noise_generator(seed: int, index: int) -> torch.Generator:
    """Returns the CPU generator of image ``index``; image 0's is ``manual_seed(seed)``, as users of diffusers expect."""
    return keyed_generator(seed, "image", index) if index else torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class Preview:
    """What an image will probably look like, seen from the middle of its steps.

    Attributes:
        number: 0 for the image's first.
        pixels: [height, width, 3] uint8.
    """

    number: int
    pixels: np.ndarray


@dataclass(eq=False)
class Handle:
    """One submitted image: ``pixels`` or ``error`` is set once ``state`` is "done" or "failed".

    Attributes:
        request: what was asked.
        latent_shape: (channels, height, width).
        places: that it takes in the batch.
        state: where it stands; an image that "decodes" has taken its steps and left its place to others.
        pixels: [height, width, 3] uint8.
        latents: [channels, height, width] float32 on the UNet's device: what the last step left, before decoding.
        error: why it failed.
        step: UNet calls done; some schedulers take more than ``num_inference_steps``.
        previews: those seen so far; whoever follows the image may take them out.
        submitted_at: by ``time.perf_counter``, as are the next three; 0 until it happens.
        admitted_at: when it joined the batch.
        denoised_at: when it left the batch.
        ended_at: when ``state`` became final.
        company: images in its UNet calls, itself included, summed over ``step`` calls.
    """

    request: ImageRequest
    latent_shape: tuple[int, int, int]
    places: int = 1
    state: Literal["waiting", "active", "decoding", "done", "failed", "cancelled"] = "waiting"
    pixels: np.ndarray | None = None
    latents: Tensor | None = field(default=None, repr=False)
    error: Exception | None = None
    step: int = 0
    previews: list[Preview] = field(default_factory=list, repr=False)
    submitted_at: float = 0.0
    admitted_at: float = 0.0
    denoised_at: float = 0.0
    ended_at: float = 0.0
    company: int = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled")

    def pil(self) -> Image.Image:
        """Returns the image with 8 bits a channel.

        Raises:
            Exception: the request's error, if it failed.
            RuntimeError: if it is not done.
        """
        if self.error is not None:
            raise self.error
        if self.pixels is None:
            raise RuntimeError(f"the image is not there: the request is {self.state}")
        return Image.fromarray(self.pixels)

    def end(self, state: Literal["done", "failed", "cancelled"], error: Exception | None = None) -> None:
        """The sampler's: records how it ended."""
        self.state, self.error = state, error
        self.ended_at = time.perf_counter()
