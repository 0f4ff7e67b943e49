from __future__ import annotations

import pytest
import torch

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.losses import FINETUNE_LOSSES, weighted_sum
from aptp_ray.core.prune import prune_unet
from tests.core.objectives import ALPHAS, SCHEDULER, finetune_batch, make_finetune
from tests.core.tiny import tiny_sd21


def test_gated_and_pruned_students_have_the_same_losses() -> None:
    gated = GatedUNet(tiny_sd21())
    code = gated.space.random_code(0.6, torch.Generator().manual_seed(0))
    shared = make_finetune(gated, tiny_sd21())
    apart = make_finetune(prune_unet(tiny_sd21(), code), tiny_sd21())
    losses, stats = shared(**finetune_batch(), codes=code.repeat(3, 1))
    expected, expected_stats = apart(**finetune_batch())
    assert tuple(losses) == FINETUNE_LOSSES and stats["match"] == pytest.approx(expected_stats["match"], rel=1e-3)
    for name in FINETUNE_LOSSES:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-3, atol=1e-6)
    weighted_sum(losses, {"denoising": 1.0, "distillation": 0.2, "block": 0.2}).backward()
    assert all(p.grad is None for p in shared.teacher.parameters())  # type: ignore[union-attr]
    assert sum(p.grad is not None for p in gated.parameters()) == len(list(gated.parameters()))
    assert not shared.teacher.training and shared.student.training  # type: ignore[union-attr]


def test_an_unpruned_student_matches_its_teacher() -> None:
    # Frozen as the teacher is: on some CPUs torch runs weights that learn by other kernels, which round otherwise.
    losses, stats = make_finetune(tiny_sd21().requires_grad_(False), tiny_sd21())(**finetune_batch())
    assert losses["distillation"].item() == losses["block"].item() == stats["match"] == 0.0
    batch = finetune_batch()
    noised = SCHEDULER.add_noise(batch["latents"], batch["noise"], batch["timesteps"])
    output = tiny_sd21()(noised, batch["timesteps"], batch["text_states"]).sample
    error = (output - batch["noise"]).pow(2).mean((1, 2, 3))
    snr = ALPHAS[batch["timesteps"]] / (1 - ALPHAS[batch["timesteps"]])
    expected = (error * snr.clamp(max=5) / snr).mean()
    torch.testing.assert_close(losses["denoising"], expected, rtol=1e-4, atol=0)


def test_without_a_teacher_there_is_denoising_alone() -> None:
    losses, stats = make_finetune(tiny_sd21(), None)(**finetune_batch())
    assert losses["denoising"].item() > 0 and stats == {}
    assert losses["distillation"].item() == losses["block"].item() == 0


def test_finetune_objective_refuses_what_cannot_work() -> None:
    unet = tiny_sd21()
    with pytest.raises(ValueError, match="share weights"):
        make_finetune(GatedUNet(unet), unet)
    with pytest.raises(TypeError, match="GatedUNet"):
        make_finetune(unet, None)(**finetune_batch(), codes=torch.ones(3, 10))
