"""Step-level batched denoising: images join and leave the batch between denoising steps.

Each image keeps its own diffusers scheduler, generator, step count and guidance scale; what is shared is the UNet call, in
which every row stands at its own timestep. So the batch fills under any mix of requests, and an image does not depend on
its neighbours (beyond float rounding of a larger matrix product).
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from aptp_ray.core.components import Components, TextEncoder, load_components, load_unet, make_scheduler
from aptp_ray.core.randomness import keyed_generator

_REMEMBERED_TEXTS = 64


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
        return self.guidance_scale > 1.0


def noise_generator(seed: int, index: int) -> torch.Generator:
    """Returns the CPU generator of image ``index``; image 0's is ``manual_seed(seed)``, as users of diffusers expect."""
    return keyed_generator(seed, "image", index) if index else torch.Generator().manual_seed(seed)


@dataclass(eq=False)
class Handle:
    """One submitted image: ``image`` or ``error`` is set once ``state`` is "done" or "failed".

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
            text: texts -> [n, tokens, width], e.g. :class:`TextEncoder`.
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
        self._unet, self._vae, self._text, self._scheduler = unet, vae, text, scheduler
        weight = next(unet.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        size = unet.config.sample_size
        height, width = latent_size or ((size, size) if isinstance(size, int) else size)
        self.latent_shape = (int(unet.config.in_channels), int(height), int(width))
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_size = (height * factor, width * factor)
        self._step_takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self._waiting: deque[Handle] = deque()
        self._active: list[Handle] = []
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()

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
            components: see :func:`load_components`.
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
        if not 0 <= request.seed < 2**63:
            raise ValueError(f"seed is {request.seed}; it must be in 0..2**63-1")
        if request.num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {request.num_inference_steps}; it must be 1 or more")
        channels = self.latent_shape[0]
        if request.latents is not None and (request.latents.ndim != 3 or request.latents.shape[0] != channels):
            raise ValueError(f"latents have shape {tuple(request.latents.shape)}; expected ({channels}, height, width)")
        handle = Handle(request)
        # A copy, not from_config: that drops values which a pipeline corrected after construction (steps_offset).
        handle._scheduler = copy.deepcopy(self._scheduler)
        # Time steps stay on the CPU: schedulers index with them, which on a GPU would wait for the device at every step.
        try:
            handle._scheduler.set_timesteps(request.num_inference_steps)
        except Exception as error:  # schedulers refuse step counts in their own ways (ValueError, IndexError, ...)
            count, name = request.num_inference_steps, type(self._scheduler).__name__
            raise ValueError(f"num_inference_steps is {count}, which {name} cannot run: {error}") from error
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
            for handle, prediction in self._apart_on_error(self._predict, group, ended):
                self._advance(handle, prediction, ended)
            finished += [handle for handle in group if handle.state == "active" and self._at_end(handle)]
        for shape in {handle._latents.shape for handle in finished if handle._latents is not None}:
            alike = [h for h in finished if h._latents is not None and h._latents.shape == shape]
            for handle, image in self._apart_on_error(self._decode, alike, ended):
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
        for handle, states in self._apart_on_error(self._encode, joining, failed):
            request = handle.request
            handle._generator = noise_generator(request.seed, request.index)
            noise = request.latents
            if noise is None:
                noise = torch.randn(self.latent_shape, generator=handle._generator)  # CPU, float32: the same on any device
            # Latents stay in float32 whatever the UNet runs in: rounding would add up over the steps.
            handle._latents = noise.to(self._device, torch.float32)[None] * handle._scheduler.init_noise_sigma
            handle._states = states
            handle.state = "active"
            self._active.append(handle)
        return failed

    def _encode(self, handles: list[Handle]) -> list[Tensor]:
        """Returns the text states of each image: [2 (unconditional first), tokens, width] under guidance, else [1, ...]."""
        texts = [([h.request.negative_prompt] if h.request.guided else []) + [h.request.prompt] for h in handles]
        wanted = {text: self._remembered[text] for group in texts for text in group if text in self._remembered}
        new = list(dict.fromkeys(text for group in texts for text in group if text not in wanted))
        if new:
            wanted.update(zip(new, self._text(new).to(self._dtype), strict=True))
        for text, state in wanted.items():
            self._remembered[text] = state
            self._remembered.move_to_end(text)
        while len(self._remembered) > _REMEMBERED_TEXTS:
            self._remembered.popitem(last=False)
        return [torch.stack([wanted[text] for text in group]) for group in texts]

    def _predict(self, handles: list[Handle]) -> list[Tensor]:
        """One UNet call; returns each image's guided prediction, [1, channels, height, width] float32."""
        inputs, timesteps, rows = [], [], []
        for handle in handles:
            timestep = handle._scheduler.timesteps[handle.step]
            scaled = handle._scheduler.scale_model_input(handle._latents, timestep)
            rows.append(2 if handle.request.guided else 1)
            inputs += [scaled] * rows[-1]
            timesteps += [float(timestep)] * rows[-1]
        output = self._unet(
            torch.cat(inputs).to(self._dtype),
            torch.tensor(timesteps, device=self._device),  # [rows]: every row at its own time
            encoder_hidden_states=torch.cat([h._states for h in handles if h._states is not None]),
            return_dict=False,
        )[0].float()
        predictions = []
        for handle, part in zip(handles, output.split(rows), strict=True):
            if handle.request.guided:  # classifier-free guidance (Ho and Salimans 2022), equation 6 in diffusers' scale
                unconditional, conditional = part.chunk(2)
                part = unconditional + handle.request.guidance_scale * (conditional - unconditional)
            predictions.append(part)
        return predictions

    def _advance(self, handle: Handle, prediction: Tensor, ended: list[Handle]) -> None:
        options = {"generator": handle._generator} if self._step_takes_generator else {}
        timestep = handle._scheduler.timesteps[handle.step]
        try:
            handle._latents = handle._scheduler.step(prediction, timestep, handle._latents, return_dict=False, **options)[0]
        except Exception as error:  # whatever a scheduler raises is this image's failure, not the batch's
            handle._end("failed", error)
            ended.append(handle)
            return
        handle.step += 1

    @staticmethod
    def _at_end(handle: Handle) -> bool:
        return handle.step >= len(handle._scheduler.timesteps)

    def _decode(self, handles: list[Handle]) -> list[Tensor]:
        """Returns [3, height, width] float32 in [0, 1] on the CPU, an image each."""
        weight = next(self._vae.parameters())
        latents = torch.cat([h._latents for h in handles if h._latents is not None]) / self._vae.config.scaling_factor
        images = self._vae.decode(latents.to(weight.device, weight.dtype), return_dict=False)[0]
        return list((images.float() * 0.5 + 0.5).clamp(0, 1).cpu())

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


__all__ = [
    "Components",
    "Handle",
    "ImageRequest",
    "Sampler",
    "TextEncoder",
    "load_components",
    "load_unet",
    "make_scheduler",
    "noise_generator",
]
