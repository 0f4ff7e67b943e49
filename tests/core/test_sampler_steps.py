"""Step plans against the schedulers that they were read from."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from aptp_ray.core.step_plan import StepPlan, fresh, is_linear, plan_steps, take_step

LINEAR = [
    (DDIMScheduler, {}),
    (DDIMScheduler, {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    (EulerDiscreteScheduler, {}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"solver_order": 3, "use_karras_sigmas": True}),
    (DPMSolverSinglestepScheduler, {"lower_order_final": True}),
    (DEISMultistepScheduler, {}),
    (PNDMScheduler, {"skip_prk_steps": True}),
    (LMSDiscreteScheduler, {}),
    (HeunDiscreteScheduler, {}),
]


def _make(kind: type, options: dict) -> object:
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    base = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}
    return kind.from_config({**base, **options})  # type: ignore[attr-defined]


def _by_plan(plan: StepPlan, noise: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
    xs = [noise * plan.initial]
    for i in range(len(plan.timesteps)):
        lags = range(min(plan.lags, i + 1))
        xs.append(sum(plan.of_sample[i][k] * xs[i - k] + plan.of_output[i][k] * outputs[i - k] for k in lags))  # type: ignore[arg-type]
    return xs[-1]


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
@pytest.mark.parametrize(("kind", "options"), LINEAR)
def test_a_plan_takes_the_schedulers_steps(kind: type, options: dict, steps: int) -> None:
    scheduler = _make(kind, options)
    assert is_linear(scheduler)
    plan, own = plan_steps(scheduler, steps), fresh(scheduler, steps)
    generator = torch.Generator().manual_seed(steps)
    noise = torch.randn(1, 4, 6, 6, generator=generator)
    outputs = [torch.randn(1, 4, 6, 6, generator=generator) for _ in own.timesteps]
    x = noise * own.init_noise_sigma
    for index, output in enumerate(outputs):
        scaled = own.scale_model_input(x, own.timesteps[index])
        torch.testing.assert_close(scaled, plan.input_scale[index] * x, rtol=1e-5, atol=1e-6)
        x = take_step(own, output, index, x, torch.Generator())
    assert plan.timesteps == tuple(own.timesteps.tolist())
    torch.testing.assert_close(_by_plan(plan, noise, outputs), x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


def test_ddim_factors_are_those_of_its_formula() -> None:
    scheduler = DDIMScheduler(prediction_type="epsilon", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    plan = plan_steps(scheduler, 10)
    assert plan.lags == 1
    for i, time in enumerate(plan.timesteps):  # Song et al. 2021, equation 12 with sigma 0
        a = scheduler.alphas_cumprod[int(time)].double()
        b = scheduler.alphas_cumprod[max(int(time) - 100, 0)].double()
        assert plan.of_sample[i][0] == pytest.approx(float((b / a).sqrt()), rel=1e-5)
        assert plan.of_output[i][0] == pytest.approx(float((1 - b).sqrt() - (b * (1 - a) / a).sqrt()), rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (EulerAncestralDiscreteScheduler, {}),  # draw noise
        (DDPMScheduler, {}),
        (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
        (DDIMScheduler, {"clip_sample": True}),  # not linear
        (DDIMScheduler, {"thresholding": True}),
        (UniPCMultistepScheduler, {}),  # its corrector remembers all steps
    ],
)
def test_what_is_not_linear_is_seen(kind: type, options: dict) -> None:
    assert not is_linear(_make(kind, options))


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, EDMEulerScheduler])
def test_schedulers_of_other_kinds_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} is not a scheduler of Stable Diffusion's.*DDIMScheduler"):
        is_linear(_make(kind, {}))


def test_a_step_count_that_cannot_run_is_named() -> None:
    with pytest.raises(ValueError, match="num_inference_steps is 5000, which DDIMScheduler cannot run"):
        plan_steps(DDIMScheduler(), 5000)
