"""Small objectives and batches that several tests of the training steps share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from aptp_ray.core.finetune_objective import FinetuneObjective
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.losses import PRUNE_LOSSES
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.prune_objective import PruneObjective
from aptp_ray.core.relaxation import gumbel
from aptp_ray.core.router import PromptRouter
from tests.core.tiny import tiny_sd21

SCHEDULER = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
ALPHAS = SCHEDULER.alphas_cumprod
WEIGHTS = dict(zip(PRUNE_LOSSES, (1.0, 0.2, 0.2, 2.0, 1.0, 1.0, 0.1, 0.1), strict=True))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@cache
def teacher() -> tuple[GatedUNet, MacsModel]:
    """The frozen teacher that all prune steps share, and its MACs."""
    gated = GatedUNet(tiny_sd21())
    return gated, MacsModel.measure(gated.unet, (8, 8), 5, gated.space)


def make_objective(codes: int = 3, **options: Any) -> PruneObjective:
    gated, macs = teacher()
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gated.space.dim, generator=generator) - 2.5
    router = PromptRouter(gated.space, z_dim=12, num_codes=codes, generator=generator, start_logits=start)
    z = randn(48, 12, seed=5)
    router.initialise_codes(z, generator=generator)
    with torch.no_grad():
        router.codes += 0.3 * torch.randn(router.codes.shape, generator=generator)
    return PruneObjective(
        router, gated, macs, **{"alphas_cumprod": ALPHAS, "prediction_type": "v_prediction", "budget": 0.65, **options}
    )


def make_batch(objective: PruneObjective, rows: int = 4, phase: str = "codes", seed: int = 0) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(100 + seed)
    per_sample = phase == "warmup" or objective.noise_per == "sample"
    number = rows if per_sample else objective.router.num_codes
    return {
        "latents": randn(rows, 4, 8, 8, seed=seed + 1),
        "noise": randn(rows, 4, 8, 8, seed=seed + 2),
        "timesteps": torch.randint(0, 1000, (rows,), generator=draws),
        "text_states": randn(rows, 5, 24, seed=seed + 3),
        "text_mask": None,
        "z": randn(rows, 12, seed=seed + 4),
        "gumbel_noise": gumbel((number, objective.router.space.dim), draws),
        "phase": phase,
    }


def gradients(objective: PruneObjective, loss: Tensor) -> tuple[float, float]:
    """Largest gradient of the predictor and of the codes."""
    objective.zero_grad()
    loss.backward(retain_graph=True)
    assert all(p.grad is None for p in objective.gated.parameters())

    def largest(*parameters: Tensor) -> float:
        return max(0.0 if p.grad is None else float(p.grad.abs().max()) for p in parameters)

    return largest(*objective.router.predictor.parameters()), largest(objective.router.codes)


def finetune_batch(rows: int = 3) -> dict[str, Any]:
    return {
        "latents": randn(rows, 4, 8, 8, seed=1), "noise": randn(rows, 4, 8, 8, seed=2),
        "timesteps": torch.tensor([10, 500, 990])[:rows], "text_states": randn(rows, 5, 24, seed=3),
    }  # fmt: skip


def make_finetune(student: torch.nn.Module, teacher: torch.nn.Module | None) -> FinetuneObjective:
    return FinetuneObjective(student, teacher, alphas_cumprod=ALPHAS, prediction_type="epsilon").train()
