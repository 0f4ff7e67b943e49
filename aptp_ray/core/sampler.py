"""Step-level batched denoising: images join and leave the batch between denoising steps.

Each image keeps its own diffusers scheduler, generator, step count and guidance scale; what is shared is the UNet call, in
which every row stands at its own timestep. So the batch fills under any mix of requests, and an image does not depend on
its neighbours (beyond float rounding of a larger matrix product).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from aptp_ray.core.components import Components, TextEncoder, make_scheduler
from aptp_ray.core.denoiser import Denoiser
from aptp_ray.core.image_request import Handle, ImageRequest


class Sampler:
    """The engine: submit, step until finished, cancel at any time between steps. Not thread-safe: one caller at a time.

    Attributes:
        max_batch_size: images denoised together; a UNet call has up to twice as many rows under guidance.
        latent_shape: (channels, height, width) of the images drawn from a seed.
        image_size: (height, width) in pixels.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text: Callable[[Sequence[str]], Tensor],
        scheduler: Any,
        *,
        max_batch_size: int = 8,
        latent_size: tuple[int, int] | None = None,
    ) -> None:
        """Wraps loaded models; all stand on one device.

        Args:
            unet: UNet2DConditionModel or PrunedUNet2DConditionModel.
            vae: AutoencoderKL.
            text: texts -> [n, tokens, width], e.g. :class:`~aptp_ray.core.components.TextEncoder`.
            scheduler: a diffusers scheduler, of which every image gets a fresh copy.
            max_batch_size: images denoised together.
            latent_size: (height, width) of the latents; by default the UNet's ``sample_size``.

        Raises:
            ValueError: if the batch size is below 1 or the UNet wants the guidance scale as an input.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; it must be 1 or more")
        if unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError("the UNet takes the guidance scale as an input (time_cond_proj_dim): not supported")
        self.max_batch_size = max_batch_size
        self._denoiser = Denoiser(unet, vae, text, scheduler)
        size = unet.config.sample_size
        height, width = latent_size or ((size, size) if isinstance(size, int) else size)
        self.latent_shape = (int(unet.config.in_channels), int(height), int(width))
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_size = (height * factor, width * factor)
        self._waiting: deque[Handle] = deque()
        self._active: list[Handle] = []

    @classmethod
    def from_components(
        cls,
        unet: Any,
        components: Components,
        *,
        scheduler: str | None = None,
        max_batch_size: int = 8,
        resolution: int | None = None,
    ) -> Sampler:
        """Builds a sampler from a pipeline's parts.

        Args:
            unet: the teacher's or an expert's.
            components: see :func:`~aptp_ray.core.components.load_components`.
            scheduler: name of another diffusers class than the pipeline's own.
            max_batch_size: images denoised together.
            resolution: pixels of an image's side, where it is not the UNet's ``sample_size``.

        Raises:
            ValueError: if the VAE's factor does not divide the resolution, or there is no such scheduler.
        """
        factor = 2 ** (len(components.vae.config.block_out_channels) - 1)
        if resolution is not None and resolution % factor:
            raise ValueError(f"resolution is {resolution}; it must be a multiple of {factor}, the VAE's factor")
        own = components.scheduler
        return cls(
            unet,
            components.vae,
            TextEncoder(components.tokenizer, components.text_encoder),
            make_scheduler(scheduler, own) if scheduler else own,
            max_batch_size=max_batch_size,
            latent_size=(resolution // factor,) * 2 if resolution else None,  # type: ignore[arg-type]
        )

    # -- the engine ------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Images in the batch."""
        return len(self._active)

    @property
    def waiting(self) -> int:
        """Images that wait for a place."""
        return len(self._waiting)

    def submit(self, request: ImageRequest) -> Handle:
        """Queues an image; it joins the batch at the next step that has a place.

        Raises:
            ValueError: if the request cannot be drawn (step count, seed, shape of the given noise).
        """
        request.check(channels=self.latent_shape[0])
        handle = Handle(request)
        handle._scheduler = self._denoiser.schedule(request.num_inference_steps)
        self._waiting.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Drops an image; its place is free at the next step. Does nothing to one that has ended."""
        if handle.state == "waiting":
            self._waiting.remove(handle)
        elif handle.state == "active":
            self._active.remove(handle)
        else:
            return
        handle._end("cancelled")

    @torch.no_grad()
    def step(self) -> list[Handle]:
        """Admits waiting images, denoises every image of the batch by one step, decodes those at their end.

        Returns:
            The images that ended in this step, "done" or "failed"; a failure is that image's alone.
        """
        ended = self._admit()
        groups: dict[tuple[Any, ...], list[Handle]] = {}
        for handle in self._active:
            assert handle._latents is not None and handle._states is not None
            groups.setdefault((handle._latents.shape, handle._states.shape[1:]), []).append(handle)
        finished: list[Handle] = []
        for group in groups.values():
            for handle, prediction in self._apart_on_error(self._denoiser.predict, group, ended):
                self._advance(handle, prediction, ended)
            finished += [handle for handle in group if handle.state == "active" and self._denoiser.at_end(handle)]
        for shape in {handle._latents.shape for handle in finished if handle._latents is not None}:
            alike = [h for h in finished if h._latents is not None and h._latents.shape == shape]
            for handle, image in self._apart_on_error(self._denoiser.decode, alike, ended):
                self._finish(handle, image, ended)
        self._active = [handle for handle in self._active if handle.state == "active"]
        return ended

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        negative_prompts: Sequence[str] | None = None,
    ) -> list[Image.Image]:
        """Draws one image a prompt, in the order of ``prompts``.

        Raises:
            ValueError: if the lists differ in length, or other images are under way.
        """
        negatives = [""] * len(prompts) if negative_prompts is None else list(negative_prompts)
        if not len(prompts) == len(seeds) == len(negatives):
            counts = f"{len(prompts)} prompts, {len(seeds)} seeds, {len(negatives)} negative prompts"
            raise ValueError(f"{counts}: give one of each for every image")
        if self.active or self.waiting:
            raise ValueError(f"{self.active + self.waiting} images are under way; use submit() and step() beside them")
        handles = [
            self.submit(ImageRequest(prompt, seed, 0, num_inference_steps, guidance_scale, negative))
            for prompt, seed, negative in zip(prompts, seeds, negatives, strict=True)
        ]
        while self.active or self.waiting:
            self.step()
        return [handle.pil() for handle in handles]

    # -- its parts -------------------------------------------------------------------------------------------------------

    def _admit(self) -> list[Handle]:
        """Moves waiting images into free places and prepares them; returns those that could not be."""
        failed: list[Handle] = []
        joining: list[Handle] = []
        while self._waiting and len(self._active) + len(joining) < self.max_batch_size:
            joining.append(self._waiting.popleft())
        for handle, states in self._apart_on_error(self._denoiser.encode, joining, failed):
            self._denoiser.begin(handle, states, self.latent_shape)
            handle.state = "active"
            self._active.append(handle)
        return failed

    def _advance(self, handle: Handle, prediction: Tensor, ended: list[Handle]) -> None:
        try:
            self._denoiser.advance(handle, prediction)
        except Exception as error:  # whatever a scheduler raises is this image's failure, not the batch's
            handle._end("failed", error)
            ended.append(handle)

    @staticmethod
    def _finish(handle: Handle, image: Tensor, ended: list[Handle]) -> None:
        if torch.isfinite(image).all():
            handle.image = image
            handle._end("done")
        else:
            handle._end("failed", ArithmeticError("the image is not finite: lower guidance_scale, or serve in bf16 or fp32"))
        ended.append(handle)

    @staticmethod
    def _apart_on_error(
        work: Callable[[list[Handle]], list[Tensor]], handles: list[Handle], failed: list[Handle]
    ) -> list[tuple[Handle, Tensor]]:
        """Runs ``work`` on all images at once; if that raises, on each apart, so that only the culprit fails."""
        if not handles:
            return []
        try:
            return list(zip(handles, work(handles), strict=True))
        except Exception as error:
            if len(handles) == 1:
                handles[0]._end("failed", error)
                failed.append(handles[0])
                return []
        return [pair for handle in handles for pair in Sampler._apart_on_error(work, [handle], failed)]
