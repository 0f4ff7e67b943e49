"""A diffusers scheduler as a table of numbers, so that images at different steps take one step together.

The deterministic schedulers (DDIM, Euler, DPM-Solver++, PNDM, LMS, Heun, UniPC, ...) are linear: the next sample is a sum of
the last few samples and UNet outputs, with factors that depend on the step alone. The factors are read off the scheduler
itself, by running it on unit vectors in place of tensors, so there is no second implementation that could differ from it.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Samples and outputs further back than this are used by no scheduler of diffusers (PNDM and LMS look back four).
_MOST_LAGS = 6
# A step count at which schedulers with a warm-up (PNDM) and those with a lower order at the end do all that they can do.
_TRIAL_STEPS = 12


@dataclass(frozen=True)
class StepPlan:
    """All steps of one image: ``x[i + 1] = sum over lag k of  of_sample[i][k] * x[i - k] + of_output[i][k] * output[i - k]``.

    Attributes:
        timesteps: what the UNet is told at each call; their number is that of the UNet calls.
        initial: factor of unit noise that makes the first sample.
        input_scale: factor of the sample that makes the UNet's input, a step each.
        of_sample: [calls][lags].
        of_output: [calls][lags].
    """

    timesteps: tuple[float, ...]
    initial: float
    input_scale: tuple[float, ...]
    of_sample: tuple[tuple[float, ...], ...]
    of_output: tuple[tuple[float, ...], ...]

    @property
    def lags(self) -> int:
        """How many samples and outputs a step needs, the present ones included."""
        return len(self.of_sample[0])


def fresh(scheduler: Any, num_inference_steps: int) -> Any:
    """Returns a copy of a scheduler that is ready for its first step.

    Raises:
        ValueError: if it cannot run this many steps.
    """
    # A copy, not from_config: that drops values which a pipeline corrected after construction (steps_offset).
    scheduler = copy.deepcopy(scheduler)
    # Time steps stay on the CPU: schedulers index with them, which on a GPU would wait for the device at every step.
    try:
        scheduler.set_timesteps(num_inference_steps)
    except Exception as error:  # schedulers refuse step counts in their own ways (ValueError, IndexError, ...)
        name = type(scheduler).__name__
        raise ValueError(f"num_inference_steps is {num_inference_steps}, which {name} cannot run: {error}") from error
    return scheduler


def take_step(scheduler: Any, output: Tensor, index: int, sample: Tensor, generator: torch.Generator) -> Tensor:
    """One step by the scheduler itself; ``generator`` draws the noise of those that add some."""
    options = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    return scheduler.step(output, scheduler.timesteps[index], sample, return_dict=False, **options)[0]


def plan_steps(scheduler: Any, num_inference_steps: int) -> StepPlan:
    """Reads a linear scheduler's factors.

    Args:
        scheduler: for which :func:`is_linear` holds; left as it is.
        num_inference_steps: denoising steps.

    Raises:
        ValueError: if it cannot run this many steps, or looks back further than any known scheduler.
    """
    scheduler = fresh(scheduler, num_inference_steps)
    calls = len(scheduler.timesteps)
    none = torch.Generator()  # a linear scheduler draws nothing
    scales, samples, outputs = [], [], []
    for index in range(calls):
        # Unit vectors of this step's sample and output. What the scheduler remembers of earlier steps are their unit
        # vectors (or sums of them), so the result says by which factor each of them enters.
        x, out = torch.zeros(2, 1, 2 * calls, 1, 1).unbind()  # [1, 2 * calls, 1, 1]: some schedulers want four axes
        x[0, index] = 1.0
        out[0, calls + index] = 1.0
        scaled = scheduler.scale_model_input(x, scheduler.timesteps[index])
        scales.append(float(scaled[0, index]))
        factors = take_step(scheduler, out, index, x, none).reshape(2, calls)
        # An output of a step that is still to come cannot enter; entry [k] is that of k steps ago.
        past = factors[:, : index + 1].flip(1)
        if not torch.isfinite(past).all():
            raise ValueError(f"{type(scheduler).__name__} divides by zero at step {index} of {num_inference_steps}")
        samples.append(past[0].tolist())
        outputs.append(past[1].tolist())
    lags = max(1 + max((k for k, f in enumerate(row) if f), default=0) for row in samples + outputs)
    if lags > _MOST_LAGS:
        raise ValueError(f"{type(scheduler).__name__} looks back {lags} steps; at most {_MOST_LAGS} are kept")
    return StepPlan(
        timesteps=tuple(float(t) for t in scheduler.timesteps),
        initial=float(scheduler.init_noise_sigma),
        input_scale=tuple(scales),
        of_sample=tuple(_padded(row, lags) for row in samples),
        of_output=tuple(_padded(row, lags) for row in outputs),
    )


def _padded(row: list[float], length: int) -> tuple[float, ...]:
    return tuple((row + [0.0] * length)[:length])


def is_linear(scheduler: Any) -> bool:
    """Whether a scheduler's steps are those of its :class:`StepPlan`: no noise is drawn, nothing is clipped.

    Raises:
        ValueError: if the scheduler cannot draw one image apart from others at all.
    """
    name = type(scheduler).__name__
    if not hasattr(scheduler, "scale_model_input") or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{name} is not a scheduler of Stable Diffusion's noise schedule (it has no scale_model_input or alphas_cumprod); "
            "choose another, e.g. DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler or PNDMScheduler"
        )
    generator = torch.Generator().manual_seed(0)
    try:
        own = fresh(scheduler, _TRIAL_STEPS)
        # Large enough for every clipping to show.
        xs, outs = [3 * torch.randn(1, 4, 8, 8, generator=generator) * own.init_noise_sigma], []
        for index in range(len(own.timesteps)):
            own.scale_model_input(xs[-1], own.timesteps[index])
            outs.append(torch.randn(xs[0].shape, generator=generator))
            xs.append(take_step(own, outs[-1], index, xs[-1], torch.Generator().manual_seed(index)))
    except Exception as error:
        raise ValueError(f"{name} cannot draw images one by one: {type(error).__name__}: {error}") from error
    try:
        plan = plan_steps(scheduler, _TRIAL_STEPS)
    except ValueError:
        return False
    for index in range(len(outs)):
        lags = range(min(plan.lags, index + 1))
        wanted = sum(plan.of_sample[index][k] * xs[index - k] + plan.of_output[index][k] * outs[index - k] for k in lags)
        if not torch.allclose(torch.as_tensor(wanted), xs[index + 1], rtol=1e-4, atol=1e-4 * float(xs[index + 1].abs().max())):
            return False
    return True
