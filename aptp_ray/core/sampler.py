"""Step-level batched denoising: images join and leave the batch between denoising steps.

Each image keeps its own noise, step count, guidance scale and place in its schedule; what is shared is the UNet call, in
which every row stands at its own timestep. So the batch fills under any mix of requests, and an image does not depend on
its neighbours (beyond float rounding of a larger matrix product). Texts are encoded and images decoded beside the steps.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from aptp_ray.core.batch import Batch, Member
from aptp_ray.core.components import Components, TextEncoder, make_scheduler
from aptp_ray.core.denoiser import Denoiser
from aptp_ray.core.image_request import Handle, ImageRequest, Preview
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
        latent_shape: (channels, height, width) of the images drawn from a seed.
        image_size: (height, width) in pixels, of a request that names no size.
        size_multiple: width and height of an image are multiples of this.
        max_pixels: of an image.
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
        size = unet.config.sample_size
        height, width = latent_size or ((size, size) if isinstance(size, int) else size)
        self.latent_shape = (int(unet.config.in_channels), int(height), int(width))
        self._factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_size = (height * self._factor, width * self._factor)
        self.size_multiple = self._factor * 2 ** (len(unet.config.block_out_channels) - 1)
        self.max_pixels = int(max_area * self.image_size[0] * self.image_size[1])
        self._line = Line()
        self._batches: dict[tuple[Any, ...], Batch] = {}
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
            TextEncoder(components.tokenizer, components.text_encoder),
            make_scheduler(scheduler, own) if scheduler else own,
            latent_size=(resolution // factor,) * 2 if resolution else None,  # type: ignore[arg-type]
            **options,
        )

    # -- the engine ------------------------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Images in the batch."""
        return sum(len(batch.members) for batch in self._batches.values())

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

    def check_size(self, width: int, height: int) -> None:
        """Refuses a size in pixels that cannot be drawn.

        Raises:
            ValueError: naming what is allowed.
        """
        step, own = self.size_multiple, (self.image_size[1], self.image_size[0])
        if (width, height) == own:
            return
        if width < step or height < step or width % step or height % step or width * height > self.max_pixels:
            raise ValueError(
                f"size {width}x{height} cannot be drawn: width and height must be multiples of {step}, and their product at "
                f"most {self.max_pixels}; this model's own size is {own[0]}x{own[1]}"
            )

    def submit(self, request: ImageRequest) -> Handle:
        """Queues an image; it joins the batch at the next step that has a place, after those that were here before.

        Raises:
            ValueError: if the request cannot be drawn (step count, seed, size, shape of the given noise).
        """
        request.check(channels=self.latent_shape[0])
        self._denoiser.check(request.num_inference_steps)
        shape = self.latent_shape
        if request.latents is not None:
            shape = (shape[0], *map(int, request.latents.shape[1:]))  # type: ignore[assignment]
        elif request.size is not None:
            self.check_size(*request.size)
            shape = (shape[0], request.size[1] // self._factor, request.size[0] // self._factor)
        places = math.ceil(shape[1] * shape[2] / (self.latent_shape[1] * self.latent_shape[2]))
        handle = Handle(request, shape, places, submitted_at=time.perf_counter())
        self._line.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Drops an image; its place is free at the next step. Does nothing to one that has ended."""
        if handle.ended:
            return
        if handle.state == "waiting":
            self._line.remove(handle)
        for key, batch in list(self._batches.items()):
            rows = [row for row, member in enumerate(batch.members) if member.handle is not handle]
            if len(rows) < len(batch.members):
                self._keep(key, batch, rows)
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
        self._denoiser.pace()
        shown: list[Undecoded] = []
        for key, batch in list(self._batches.items()):
            shown += self._denoise(key, batch, ended)
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
        self._admit()
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

    def _admit(self) -> None:
        taken = sum(m.handle.places for batch in self._batches.values() for m in batch.members)
        joining: dict[tuple[Any, ...], list[Member]] = {}
        for member in self._line.leaving(self.max_batch_size - taken, empty=not taken):
            member.handle.state, member.handle.admitted_at = "active", time.perf_counter()
            joining.setdefault((tuple(member.noise.shape), tuple(member.states.shape[1:])), []).append(member)
        for key, members in joining.items():
            batch = Batch.of(members, self._denoiser.device)
            self._batches[key] = self._batches[key].joined(batch) if key in self._batches else batch

    # -- the steps -------------------------------------------------------------------------------------------------------

    def _denoise(self, key: tuple[Any, ...], batch: Batch, ended: list[Handle]) -> list[Undecoded]:
        """Takes one step with a batch; returns what is to be decoded: images at their end, and previews."""
        shown: list[Undecoded] = []
        kept: Batch | None = None
        for part, scaled, prediction in self._apart_on_error(batch, ended):
            failed = self._denoiser.advance(part, prediction)
            going = []
            for row, member in enumerate(part.members):
                handle = member.handle
                if row in failed:
                    handle.end("failed", failed[row])
                    ended.append(handle)
                elif member.at_end:
                    handle.state, handle.denoised_at = "decoding", time.perf_counter()
                    handle.latents = part.latents[row].clone()
                    self._decoding.add(handle)
                    shown.append(Undecoded(handle, handle.latents))
                else:
                    going.append(row)
                    if handle.step in member.previews_at:
                        clean = self._denoiser.clean(member, scaled[row], prediction[row])
                        shown.append(Undecoded(handle, clean, member.previews_at.index(handle.step)))
            if going:
                rest = part if len(going) == len(part.members) else part.only(going)
                kept = rest if kept is None else kept.joined(rest)
        if kept is None:
            del self._batches[key]
        else:
            self._batches[key] = kept
        ready = self._denoiser.mark() if shown else None
        return [dataclasses.replace(item, ready=ready) for item in shown] if ready is not None else shown

    def _apart_on_error(self, batch: Batch, ended: list[Handle]) -> list[tuple[Batch, Tensor, Tensor]]:
        """Predicts for all images at once; if that raises, for each apart, so that only the culprit fails."""
        try:
            return [(batch, *self._denoiser.predict(batch))]
        except Exception as error:
            if len(batch.members) == 1:
                handle = batch.members[0].handle
                handle.end("failed", error)
                ended.append(handle)
                return []
        parts = [batch.only([row]) for row in range(len(batch.members))]
        return [predicted for part in parts for predicted in self._apart_on_error(part, ended)]

    def _keep(self, key: tuple[Any, ...], batch: Batch, rows: list[int]) -> None:
        if rows:
            self._batches[key] = batch.only(rows)
        else:
            del self._batches[key]

    def _decoded_at_once(self, item: Undecoded) -> int:
        pixels = item.latents.shape[-2] * item.latents.shape[-1] * self._factor**2
        most = max(1, _DECODED_PIXELS // pixels)
        return min(most, _DECODED_ON_CPU) if self._denoiser.device.type == "cpu" else most
