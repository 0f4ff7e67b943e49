"""Step-level batched denoising: images join and leave the batch between denoising steps.

Each image keeps its own noise, step count, guidance scale and place in its schedule; what is shared is the UNet call, in
which every row stands at its own timestep. So the batch fills under any mix of requests, and an image does not depend on
its neighbours (beyond float rounding of a larger matrix product). Texts are encoded and images decoded beside the steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from aptp_ray.core.batches import Batches
from aptp_ray.core.components import Components, make_scheduler
from aptp_ray.core.denoiser import Denoiser
from aptp_ray.core.image_request import Handle, ImageRequest, Preview
from aptp_ray.core.image_size import ImageSizes
from aptp_ray.core.line import Line
from aptp_ray.core.side import Finished, Side, Undecoded

# Pixels that the VAE decodes at once: eight images of 512 x 512. Its activations, not the UNet's, are what fills a GPU.
_DECODED_PIXELS = 8 * 512 * 512
# On a CPU a larger decode is no faster an image (measured), and whatever comes next would wait for it.
_DECODED_ON_CPU = 2
# Images in line that are prepared before there is a place for them, as multiples of the batch.
_PREPARED_AHEAD = 2


class Sampler:
    """The engine: submit, step until finished, cancel at any time between steps. Not thread-safe: one caller at a time.

    Attributes:
        max_batch_size: images of the sampler's own size that are denoised together (a UNet call has up to twice as many rows
            under guidance); larger images take more places. May be changed between steps.
        sizes: of images that can be drawn.
        on_progress: called, from the thread beside, whenever a :meth:`step` would find something new; does nothing at first.
    """

    on_progress: Callable[[], None]

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text: Callable[[Sequence[str]], Tensor],
        scheduler: Any,
        *,
        max_batch_size: int = 8,
        latent_size: tuple[int, int] | None = None,
        max_area: float = 4.0,
        side_threads: int | None = None,
    ) -> None:
        """Wraps loaded models; all stand on one device.

        Args:
            unet: UNet2DConditionModel or PrunedUNet2DConditionModel.
            vae: AutoencoderKL.
            text: texts -> [n, tokens, width], e.g. :class:`~aptp_ray.core.components.TextEncoder`.
            scheduler: a diffusers scheduler, of which every image gets its own course.
            max_batch_size: images denoised together.
            latent_size: (height, width) of the latents; by default the UNet's ``sample_size``.
            max_area: the largest image that a request may name, over the sampler's own.
            side_threads: encode texts and decode images in a thread of this many torch threads, beside the steps; None: in
                place. Call :meth:`close` to end the thread.

        Raises:
            ValueError: if the batch size is below 1, the UNet wants the guidance scale as an input, or the scheduler cannot
                draw images one by one.
        """
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}; it must be 1 or more")
        if unet.config.get("time_cond_proj_dim") is not None:
            raise ValueError("the UNet takes the guidance scale as an input (time_cond_proj_dim): not supported")
        self.max_batch_size = max_batch_size
        self.on_progress = lambda: None
        self._denoiser = Denoiser(unet, vae, text, scheduler)
        self.sizes = ImageSizes.of(unet, vae, latent_size, max_area)
        self._line = Line()
        self._batches = Batches(self._denoiser)
        self._decoding: set[Handle] = set()
        self._side = Side(
            self._denoiser.prepare,
            self._denoiser.decode,
            device=self._denoiser.device,
            threads=side_threads,
            chunk=self._decoded_at_once,
            on_progress=lambda: self.on_progress(),
        )

    @classmethod
    def from_components(
        cls,
        unet: Any,
        components: Components,
        *,
        scheduler: str | None = None,
        resolution: int | None = None,
        **options: Any,
    ) -> Sampler:
        """Builds a sampler from a pipeline's parts.

        Args:
            unet: the teacher's or an expert's.
            components: see :func:`~aptp_ray.core.components.load_components`.
            scheduler: name of another diffusers class than the pipeline's own.
            resolution: pixels of an image's side, where it is not the UNet's ``sample_size``.
            options: further arguments of the constructor.

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
            components.text(),
            make_scheduler(scheduler, own) if scheduler else own,
            latent_size=(resolution // factor,) * 2 if resolution else None,  # type: ignore[arg-type]
            **options,
        )

    # -- the engine ------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Images in the batch."""
        return len(self._batches)

    @property
    def waiting(self) -> int:
        """Images that wait for a place."""
        return len(self._line)

    @property
    def decoding(self) -> int:
        """Images that have taken their steps and are not pixels yet."""
        return len(self._decoding)

    @property
    def busy(self) -> bool:
        """Whether any image has not ended."""
        return bool(self._batches or self._line or self._decoding)

    @property
    def ready(self) -> bool:
        """Whether a :meth:`step` would denoise, so far as is known without looking at the thread beside."""
        return bool(self._batches) or self._line.ready

    @property
    def alive(self) -> bool:
        """Whether images can still be drawn: the thread beside, if there is one, has not ended."""
        return self._side.alive

    def submit(self, request: ImageRequest) -> Handle:
        """Queues an image; it joins the batch at the next step that has a place, after those that were here before.

        Raises:
            ValueError: if the request cannot be drawn (step count, seed, size, shape of the given noise).
        """
        request.check(channels=self.sizes.latent_shape[0])
        self._denoiser.check(request.num_inference_steps)
        shape = self.sizes.latent_shape_of(request)
        handle = Handle(request, shape, self.sizes.places(shape), submitted_at=time.perf_counter())
        self._line.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Drops an image; its place is free at the next step. Does nothing to one that has ended."""
        if handle.ended:
            return
        if handle.state == "waiting":
            self._line.remove(handle)
        self._batches.remove(handle)
        self._decoding.discard(handle)
        handle.end("cancelled")

    @torch.inference_mode()
    def step(self, *, wait: bool = True) -> list[Handle]:
        """Admits waiting images, denoises every image of the batch by one step, hands those at their end to the decoder.

        Args:
            wait: where there is nothing to denoise, wait until a text is encoded or an image decoded.

        Returns:
            The images that ended since the last call, "done" or "failed"; a failure is that image's alone.
        """
        ended = self._collect()
        if wait and not self._batches and self._side.pending:
            ended += self._collect(wait=not ended)
        shown, failed = self._batches.step()
        ended += failed
        self._decoding.update(item.handle for item in shown if item.number is None)
        self._side.decode(shown)
        if self._side.in_place:
            ended += self._take(self._side.take())
        return ended

    def close(self) -> None:
        """Ends the thread beside, if there is one; images under way end nowhere."""
        self._side.close()

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
        if self.busy:
            count = self.active + self.waiting + self.decoding
            raise ValueError(f"{count} images are under way; use submit() and step() beside them")
        handles = [
            self.submit(ImageRequest(prompt, seed, 0, num_inference_steps, guidance_scale, negative))
            for prompt, seed, negative in zip(prompts, seeds, negatives, strict=True)
        ]
        while self.busy:
            self.step()
        return [handle.pil() for handle in handles]

    # -- before the steps ------------------------------------------------------------------------------------------------

    def _collect(self, *, wait: bool = False) -> list[Handle]:
        """Takes in what was done beside, fills free places, and asks for the preparation of those next in line."""
        ended = self._take(self._side.take(wait=wait))
        self._side.prepare(self._line.unprepared(_PREPARED_AHEAD * self.max_batch_size))
        if self._side.in_place:
            ended += self._take(self._side.take())
        taken = self._batches.places
        self._batches.join(self._line.leaving(self.max_batch_size - taken, empty=not taken))
        return ended

    def _take(self, finished: list[Finished]) -> list[Handle]:
        """Sorts out what was prepared and decoded; returns the images that this ends."""
        ended = []
        for one in finished:
            if isinstance(one.of, Handle):
                if one.of.state != "waiting":  # cancelled meanwhile
                    continue
                if one.error is None:
                    self._line.prepared(one.of, one.result)
                    continue
                self._line.remove(one.of)
                one.of.end("failed", one.error)
                ended.append(one.of)
                continue
            handle = one.of.handle
            if handle.ended:
                continue
            if one.of.number is not None:  # a preview that cannot be seen is no reason to lose the image
                if one.error is None:
                    handle.previews.append(Preview(one.of.number, one.result))
                continue
            self._decoding.discard(handle)
            handle.pixels = one.result
            handle.end("done" if one.error is None else "failed", one.error)
            ended.append(handle)
        return ended

    def _decoded_at_once(self, item: Undecoded) -> int:
        pixels = item.latents.shape[-2] * item.latents.shape[-1] * self.sizes.factor**2
        most = max(1, _DECODED_PIXELS // pixels)
        return min(most, _DECODED_ON_CPU) if self._denoiser.device.type == "cpu" else most
