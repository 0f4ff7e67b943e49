"""Images from noise, step by step: text encoder, UNet and VAE called once for many images, a scheduler for each image."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aptp_ray.core.image_request import Handle, noise_generator

_REMEMBERED_TEXTS = 64


class Denoiser:
    """The road of an image: `schedule`, `encode`, `begin`, then `predict` and `advance` until `at_end`, `decode`.

    What takes several handles is one call of a model for all of them and returns a tensor each, in their order; they may
    stand at different steps. Which images go together, and what an error does to them, is the sampler's to decide.

    Attributes:
        device: where the UNet runs.
        dtype: the UNet's.
    """

    def __init__(self, unet: Any, vae: Any, text: Callable[[Sequence[str]], Tensor], scheduler: Any) -> None:
        """Wraps loaded models, as :class:`~aptp_ray.core.sampler.Sampler` describes them."""
        self._unet, self._vae, self._text, self._scheduler = unet, vae, text, scheduler
        weight = next(unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self._step_takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()

    def schedule(self, num_inference_steps: int) -> Any:
        """Returns a scheduler for one image.

        Raises:
            ValueError: if it cannot run this many steps.
        """
        # A copy, not from_config: that drops values which a pipeline corrected after construction (steps_offset).
        scheduler = copy.deepcopy(self._scheduler)
        # Time steps stay on the CPU: schedulers index with them, which on a GPU would wait for the device at every step.
        try:
            scheduler.set_timesteps(num_inference_steps)
        except Exception as error:  # schedulers refuse step counts in their own ways (ValueError, IndexError, ...)
            count, name = num_inference_steps, type(self._scheduler).__name__
            raise ValueError(f"num_inference_steps is {count}, which {name} cannot run: {error}") from error
        return scheduler

    def encode(self, handles: list[Handle]) -> list[Tensor]:
        """Returns the text states of each image: [2 (unconditional first), tokens, width] under guidance, else [1, ...]."""
        texts = [([h.request.negative_prompt] if h.request.guided else []) + [h.request.prompt] for h in handles]
        wanted = {text: self._remembered[text] for group in texts for text in group if text in self._remembered}
        new = list(dict.fromkeys(text for group in texts for text in group if text not in wanted))
        if new:
            wanted.update(zip(new, self._text(new).to(self.dtype), strict=True))
        for text, state in wanted.items():
            self._remembered[text] = state
            self._remembered.move_to_end(text)
        while len(self._remembered) > _REMEMBERED_TEXTS:
            self._remembered.popitem(last=False)
        return [torch.stack([wanted[text] for text in group]) for group in texts]

    def begin(self, handle: Handle, states: Tensor, latent_shape: tuple[int, int, int]) -> None:
        """Puts an image at its initial noise, of this shape unless the request brings its own, under its text states."""
        request = handle.request
        handle._generator = noise_generator(request.seed, request.index)
        noise = request.latents
        if noise is None:
            noise = torch.randn(latent_shape, generator=handle._generator)  # CPU, float32: the same on any device
        # Latents stay in float32 whatever the UNet runs in: rounding would add up over the steps.
        handle._latents = noise.to(self.device, torch.float32)[None] * handle._scheduler.init_noise_sigma
        handle._states = states

    def predict(self, handles: list[Handle]) -> list[Tensor]:
        """One UNet call; returns each image's guided prediction, [1, channels, height, width] float32."""
        inputs, timesteps, rows = [], [], []
        for handle in handles:
            timestep = handle._scheduler.timesteps[handle.step]
            scaled = handle._scheduler.scale_model_input(handle._latents, timestep)
            rows.append(2 if handle.request.guided else 1)
            inputs += [scaled] * rows[-1]
            timesteps += [float(timestep)] * rows[-1]
        output = self._unet(
            torch.cat(inputs).to(self.dtype),
            torch.tensor(timesteps, device=self.device),  # [rows]: every row at its own time
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

    def advance(self, handle: Handle, prediction: Tensor) -> None:
        """Takes one denoising step; whatever the scheduler raises passes through, and the image stays where it was."""
        options = {"generator": handle._generator} if self._step_takes_generator else {}
        timestep = handle._scheduler.timesteps[handle.step]
        handle._latents = handle._scheduler.step(prediction, timestep, handle._latents, return_dict=False, **options)[0]
        handle.step += 1

    @staticmethod
    def at_end(handle: Handle) -> bool:
        """Whether an image has taken all of its steps."""
        return handle.step >= len(handle._scheduler.timesteps)

    def decode(self, handles: list[Handle]) -> list[Tensor]:
        """Returns [3, height, width] float32 in [0, 1] on the CPU, an image each."""
        weight = next(self._vae.parameters())
        latents = torch.cat([h._latents for h in handles if h._latents is not None]) / self._vae.config.scaling_factor
        images = self._vae.decode(latents.to(weight.device, weight.dtype), return_dict=False)[0]
        return list((images.float() * 0.5 + 0.5).clamp(0, 1).cpu())
