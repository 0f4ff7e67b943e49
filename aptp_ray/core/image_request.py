"""One image to draw, and the handle by which whoever asked for it follows it through the sampler."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

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
        latents: [channels, height, width] initial noise of unit variance, in place of the seed's.
    """

    prompt: str
    seed: int = 0
    index: int = 0
    num_inference_steps: int = 20
    guidance_scale: float = 3.0
    negative_prompt: str = ""
    latents: Tensor | None = None

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
        if self.latents is not None and (self.latents.ndim != 3 or self.latents.shape[0] != channels):
            raise ValueError(f"latents have shape {tuple(self.latents.shape)}; expected ({channels}, height, width)")


def noise_generator(seed: int, index: int) -> torch.Generator:
    """Returns the CPU generator of image ``index``; image 0's is ``manual_seed(seed)``, as users of diffusers expect."""
    return keyed_generator(seed, "image", index) if index else torch.Generator().manual_seed(seed)


@dataclass(eq=False)
class Handle:
    """One submitted image: ``image`` or ``error`` is set once ``state`` is "done" or "failed".

    The fields with an underscore are the sampler's, while the image is in its batch.

    Attributes:
        request: what was asked.
        state: where it stands.
        image: [3, height, width] float32 in [0, 1], on the CPU.
        error: why it failed.
        step: denoising steps done.
    """

    request: ImageRequest
    state: Literal["waiting", "active", "done", "failed", "cancelled"] = "waiting"
    image: Tensor | None = None
    error: Exception | None = None
    step: int = 0
    _scheduler: Any = field(default=None, repr=False)
    _generator: torch.Generator | None = field(default=None, repr=False)
    _latents: Tensor | None = field(default=None, repr=False)  # [1, channels, height, width] float32
    _states: Tensor | None = field(default=None, repr=False)  # [1 or 2 (unconditional first), tokens, width]

    def pil(self) -> Image.Image:
        """Returns the image with 8 bits a channel.

        Raises:
            Exception: the request's error, if it failed.
            RuntimeError: if it is not done.
        """
        if self.error is not None:
            raise self.error
        if self.image is None:
            raise RuntimeError(f"the image is not there: the request is {self.state}")
        return Image.fromarray((self.image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())

    def _end(self, state: Literal["done", "failed", "cancelled"], error: Exception | None = None) -> None:
        self.state, self.error = state, error
        self._scheduler = self._generator = self._latents = self._states = None
