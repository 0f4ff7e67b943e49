"""The passes of a step: in parts as at once, and a validation that leaves the training as it was."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from aptp_ray.config import Loop
from aptp_ray.core.gates import GatedUNet
from aptp_ray.train.passes import backward, evaluate, global_means
from aptp_ray.train.worker import allow_tf32, exact_products, tuned
from tests.core.objectives import finetune_batch, make_finetune
from tests.core.tiny import tiny_sd21

WEIGHTS = {"denoising": 0.3, "distillation": 0.5, "block": 0.5}


def step(
    passes: int, *, share: float = 1.0, loop: Loop | None = None
) -> tuple[dict[str, Any], dict[str, Any], list[torch.Tensor]]:
    student = GatedUNet(tuned(tiny_sd21(1), loop or Loop()))
    code = student.space.random_code(0.6, torch.Generator().manual_seed(0))
    losses, statistics = backward(
        make_finetune(student, tiny_sd21()),
        finetune_batch() | {"text_mask": None, "codes": code.repeat(3, 1)},
        rows=3,
        passes=passes,
        weights=WEIGHTS,
        share=share,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        context=nullcontext(),
    )
    return losses, statistics, [p.grad for p in student.parameters() if p.grad is not None]


@pytest.mark.parametrize("passes", [2, 3, 7])
def test_a_step_in_several_passes_is_the_step_in_one(passes: int) -> None:
    """Also in uneven parts (3 rows in 2 passes), and in no more of them than there are rows."""
    losses, statistics, gradients = step(1)
    parted, other, accumulated = step(passes)
    for name, value in losses.items():
        torch.testing.assert_close(parted[name], value, rtol=1e-5, atol=1e-7)
    assert other.keys() == statistics.keys() and not any(value.requires_grad for value in parted.values())
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    assert len(gradients) == len(accumulated) > 100
    for expected, actual in zip(gradients, accumulated, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6 * largest)


def test_a_ranks_share_weighs_its_gradient_and_not_its_losses() -> None:
    losses, _, gradients = step(1)
    shared, _, weighed = step(1, share=1.5)
    assert shared == losses
    torch.testing.assert_close(weighed[0], 1.5 * gradients[0])


def test_checkpointing_and_memory_format_of_the_config_reach_the_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    losses, _, _ = step(1)
    assert not calls
    recomputed, _, _ = step(1, loop=Loop(gradient_checkpointing=True))
    assert len(calls) > 10
    unet = tuned(tiny_sd21(), Loop(channels_last=True))
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    last, _, _ = step(1, loop=Loop(channels_last=True))
    for name, value in losses.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(last[name], value, rtol=1e-3, atol=1e-6)


def test_tf32_is_the_configs_and_off_for_proofs() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        allow_tf32(True)
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        allow_tf32(False)
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_validation_is_a_mean_over_batches_without_a_trace() -> None:
    objective = make_finetune(tiny_sd21(1), tiny_sd21())
    batch = finetune_batch()
    halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 1), slice(1, 2))]
    found = evaluate(objective, halves, share=1.0, world_size=1, context=nullcontext())
    expected = global_means(objective(**{name: value[:2] for name, value in batch.items()})[0], 1.0, 1)
    assert found == pytest.approx(expected, rel=1e-5)
    assert objective.training and all(p.grad is None for p in objective.parameters())
