"""Images from noise, step by step: text encoder, UNet and VAE called once for many images that stand at different steps."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aptp_ray.core.batch import Batch, Member
from aptp_ray.core.image_request import Handle, noise_generator
from aptp_ray.core.side import Undecoded
from aptp_ray.core.step_plan import StepPlan, fresh, is_linear, plan_steps, take_step

_REMEMBERED_TEXTS = 256
_REMEMBERED_PLANS = 512
_STEPS_AHEAD = 2
_PREDICTIONS = ("epsilon", "v_prediction", "sample")


class Denoiser:
    """The road of an image: `prepare`, then `predict` and `advance` in a batch until it is at its end, `decode`.

    `prepare` and `decode` may run in another thread than the rest.

    Attributes:
        device: where the UNet runs.
        dtype: the UNet's.
        linear: whether the scheduler's steps are taken for all images at once.
    """

    def __init__(self, unet: Any, vae: Any, text: Callable[[Sequence[str]], Tensor], scheduler: Any) -> None:
        """Wraps loaded models, as :class:`~aptp_ray.core.sampler.Sampler` describes them.

        Raises:
            ValueError: if the scheduler cannot draw images one by one.
        """
        self._unet, self._vae, self._text, self._scheduler = unet, vae, text, scheduler
        weight = next(unet.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.linear = is_linear(scheduler)
        self._prediction = str(scheduler.config.get("prediction_type", "epsilon"))
        if self._prediction not in _PREDICTIONS:
            raise ValueError(f"the scheduler's prediction_type is {self._prediction!r}; known: {', '.join(_PREDICTIONS)}")
        self._remembered: OrderedDict[str, Tensor] = OrderedDict()
        self._plans: OrderedDict[int, StepPlan] = OrderedDict()
        self._possible: set[int] = set()
        self._marks: deque[Any] = deque()

    def check(self, num_inference_steps: int) -> None:
        """Refuses a step count that the scheduler cannot run.

        Raises:
            ValueError: if so.
        """
        if num_inference_steps not in self._possible:
            fresh(self._scheduler, num_inference_steps)
            self._possible.add(num_inference_steps)

    # -- before the first step -------------------------------------------------------------------------------------------

    def prepare(self, handles: list[Handle]) -> list[Member]:
        """Encodes the texts of images in one call, draws their noise and plans their steps."""
        members = []
        for handle, states in zip(handles, self._encode(handles), strict=True):
            request = handle.request
            generator = noise_generator(request.seed, request.index)
            noise = request.latents
            if noise is None:
                noise = torch.randn(handle.latent_shape, generator=generator)  # CPU, float32: the same on any device
            plan, own = None, None
            if self.linear:
                plan = self._plan(request.num_inference_steps)
                timesteps, initial = plan.timesteps, plan.initial
            else:
                own = fresh(self._scheduler, request.num_inference_steps)
                timesteps, initial = tuple(float(t) for t in own.timesteps), float(own.init_noise_sigma)
            calls, wanted = len(timesteps), request.previews
            # Evenly spaced, never before the first step nor after the last.
            shown = sorted({round(calls * (k + 1) / (wanted + 1)) for k in range(wanted)} - {0, calls})
            first = noise.to("cpu", torch.float32) * initial
            members.append(Member(handle, first, states, timesteps, plan, own, generator, tuple(shown)))
        return members

    def _encode(self, handles: list[Handle]) -> list[Tensor]:
        texts = [[h.request.prompt] + ([h.request.negative_prompt] if h.request.guided else []) for h in handles]
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

    def _plan(self, num_inference_steps: int) -> StepPlan:
        plan = self._plans.get(num_inference_steps)
        if plan is None:
            plan = self._plans[num_inference_steps] = plan_steps(self._scheduler, num_inference_steps)
            if len(self._plans) > _REMEMBERED_PLANS:
                self._plans.popitem(last=False)
        return plan

    # -- the steps -------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One UNet call.

        Returns:
            What went in (scaled) and the guided predictions, both [n, channels, height, width] float32.
        """
        scaled, times = self._inputs(batch)
        rows, times_of_rows = scaled, times
        if batch.guided:  # the guided images once more, for their unconditional prediction
            index = batch.guided_index
            again = (scaled, times) if index is None else (scaled[index], times[index])
            rows, times_of_rows = torch.cat([scaled, again[0]]), torch.cat([times, again[1]])
        output = self._unet(
            rows.to(self.dtype),
            times_of_rows,  # [rows]: every row at its own time
            encoder_hidden_states=batch.states,
            return_dict=False,
        )[0].float()
        n = len(batch.members)
        prediction = output[:n]
        if batch.guided:  # classifier-free guidance (Ho and Salimans 2022), equation 6 in diffusers' scale
            unconditional, index = output[n:], batch.guided_index
            if index is None:
                prediction = unconditional + batch.guidance * (prediction - unconditional)
            else:
                conditional = prediction[index]
                prediction = prediction.index_copy(0, index, unconditional + batch.guidance * (conditional - unconditional))
        return scaled, prediction

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.linear:
            numbers = [(m.plan.input_scale[m.handle.step], m.timesteps[m.handle.step]) for m in batch.members if m.plan]
            scales, times = self._column(numbers).unbind(1)
            return batch.latents * scales.view(-1, 1, 1, 1), times
        scaled = [
            m.scheduler.scale_model_input(batch.latents[row : row + 1], m.scheduler.timesteps[m.handle.step])
            for row, m in enumerate(batch.members)
        ]
        return torch.cat(scaled), self._column([m.timesteps[m.handle.step] for m in batch.members])

    def _column(self, numbers: list[Any]) -> Tensor:
        """Numbers to the device, without waiting for it."""
        column = torch.tensor(numbers, dtype=torch.float32)
        return column.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else column

    def advance(self, batch: Batch, prediction: Tensor) -> dict[int, Exception]:
        """Takes one denoising step, in place.

        Returns:
            What a scheduler of an image's own raised, by row; those images stay where they were.
        """
        if self.linear:
            self._advance_together(batch, prediction)
            failed: dict[int, Exception] = {}
        else:
            failed = self._advance_apart(batch, prediction)
        for row, member in enumerate(batch.members):
            if row not in failed:
                member.handle.step += 1
                member.handle.company += len(batch.members)
        return failed

    def _advance_together(self, batch: Batch, prediction: Tensor) -> None:
        plans = [(m.plan, m.handle.step) for m in batch.members if m.plan]
        lags = max(plan.lags for plan, _ in plans)
        history = [(batch.latents, prediction), *batch.past]
        numbers = []
        for plan, step in plans:
            zeros = (0.0,) * (lags - plan.lags)
            numbers.append((*plan.of_sample[step], *zeros, *plan.of_output[step], *zeros))
        factors = self._column(numbers).view(len(plans), 2, lags, 1, 1, 1)
        latents = torch.zeros((), device=self.device)
        for lag, (x, out) in enumerate(history[:lags]):
            latents = latents + factors[:, 0, lag] * x + factors[:, 1, lag] * out
        batch.latents, batch.past = latents, history[: lags - 1]

    def _advance_apart(self, batch: Batch, prediction: Tensor) -> dict[int, Exception]:
        failed: dict[int, Exception] = {}
        rows = list(batch.latents.split(1))
        for row, m in enumerate(batch.members):
            try:
                rows[row] = take_step(m.scheduler, prediction[row : row + 1], m.handle.step, rows[row], m.generator)
            except Exception as error:  # whatever a scheduler raises is this image's failure, not the batch's
                failed[row] = error
        batch.latents = torch.cat(rows)
        return failed

    def mark(self) -> Any:
        """On a GPU, returns an event after which all that was asked for until now is done."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def pace(self) -> None:
        """On a GPU, waits for the step before the last: the CPU, which only asks for steps, would run far ahead otherwise,
        and whoever arrives or leaves would have to wait for all of them."""
        if self.device.type == "cuda":
            self._marks.append(self.mark())
            if len(self._marks) > _STEPS_AHEAD:
                self._marks.popleft().synchronize()

    def clean(self, member: Member, scaled: Tensor, prediction: Tensor) -> Tensor:
        """Predicts the clean latents from one row of a step that has just been taken; [channels, height, width]."""
        # Whatever scale a scheduler works in, the UNet's input is sqrt(a) x0 + sqrt(1 - a) noise, with `a` at its time step.
        alphas = self._scheduler.alphas_cumprod
        time = min(max(member.timesteps[member.handle.step - 1], 0.0), len(alphas) - 1.0)
        low = int(time)
        high = min(low + 1, len(alphas) - 1)
        a = float(torch.lerp(alphas[low], alphas[high], time - low))
        if self._prediction == "sample":
            return prediction
        if self._prediction == "v_prediction":  # Salimans and Ho 2022, section 4
            return a**0.5 * scaled - (1 - a) ** 0.5 * prediction
        return (scaled - (1 - a) ** 0.5 * prediction) / max(a, 1e-4) ** 0.5

    # -- after the last step ---------------------------------------------------------------------------------------------

    def decode(self, items: list[Undecoded]) -> list[np.ndarray]:
        """Returns [height, width, 3] uint8 of each item; all have one shape.

        Raises:
            ArithmeticError: if an image is not finite.
        """
        weight = next(self._vae.parameters())
        latents = torch.stack([item.latents for item in items]) / self._vae.config.scaling_factor
        images = self._vae.decode(latents.to(weight.device, weight.dtype), return_dict=False)[0].float()
        finite = torch.isfinite(images).all()
        # Rounded where it was drawn: a quarter of the bytes to copy.
        pixels = ((images * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
        if pixels.device.type == "cuda":
            host = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(pixels, non_blocking=True)
            torch.cuda.current_stream(pixels.device).synchronize()  # a thread's own stream: the others run on
            pixels = host
        if not finite:
            raise ArithmeticError("the image is not finite: lower guidance_scale, or serve in bf16 or fp32")
        return [image.copy() for image in pixels.numpy()]
