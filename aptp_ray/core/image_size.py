"""Which sizes of an image a UNet can draw, and what they take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from aptp_ray.core.image_request import ImageRequest

LatentShape = tuple[int, int, int]


@dataclass(frozen=True)
class ImageSizes:
    """What is drawn without a word, and what may be asked for.

    Attributes:
        latent_shape: (channels, height, width) of an image whose request names no size.
        factor: pixels of a side to one latent position.
        multiple: width and height of an image in pixels are multiples of this.
        max_pixels: of an image.
    """

    latent_shape: LatentShape
    factor: int
    multiple: int
    max_pixels: int

    @classmethod
    def of(cls, unet: Any, vae: Any, latent_size: tuple[int, int] | None, max_area: float) -> ImageSizes:
        """Reads the models' configs.

        Args:
            unet: UNet2DConditionModel or PrunedUNet2DConditionModel.
            vae: AutoencoderKL.
            latent_size: (height, width) of the latents; None: the UNet's ``sample_size``.
            max_area: of the largest image, over the usual one.
        """
        size = unet.config.sample_size
        height, width = latent_size or ((size, size) if isinstance(size, int) else size)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        return cls(
            latent_shape=(int(unet.config.in_channels), int(height), int(width)),
            factor=factor,
            multiple=factor * 2 ** (len(unet.config.block_out_channels) - 1),
            max_pixels=int(max_area * height * width * factor**2),
        )

    @property
    def usual(self) -> tuple[int, int]:
        """(width, height) in pixels of an image whose request names no size."""
        return self.latent_shape[2] * self.factor, self.latent_shape[1] * self.factor

    def check(self, width: int, height: int) -> None:
        """Refuses a size in pixels that cannot be drawn.

        Raises:
            ValueError: naming what is allowed.
        """
        step, usual = self.multiple, self.usual
        if (width, height) == usual:
            return
        if width < step or height < step or width % step or height % step or width * height > self.max_pixels:
            raise ValueError(
                f"size {width}x{height} cannot be drawn: width and height must be multiples of {step}, and their product at "
                f"most {self.max_pixels}; this model's own size is {usual[0]}x{usual[1]}"
            )

    def latent_shape_of(self, request: ImageRequest) -> LatentShape:
        """Returns the shape of a request's latents.

        Raises:
            ValueError: if its size cannot be drawn.
        """
        channels = self.latent_shape[0]
        if request.latents is not None:
            return channels, int(request.latents.shape[1]), int(request.latents.shape[2])
        if request.size is None:
            return self.latent_shape
        width, height = request.size
        self.check(width, height)
        return channels, height // self.factor, width // self.factor

    def places(self, latent_shape: LatentShape) -> int:
        """Returns how many images of the usual size one of this shape stands for in a batch."""
        return math.ceil(latent_shape[1] * latent_shape[2] / (self.latent_shape[1] * self.latent_shape[2]))
