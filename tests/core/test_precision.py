"""The training steps under autocast, gradient checkpointing, another memory format and the compiler: the same results."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from aptp_ray.core.finetune_objective import FinetuneObjective
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.losses import weighted_sum
from aptp_ray.core.macs import MacsModel, count_macs
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.prune_objective import PruneObjective
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.running import compile_unet
from aptp_ray.core.space import ArchitectureSpace
from tests.core.objectives import ALPHAS, WEIGHTS, finetune_batch, make_batch, randn
from tests.core.tiny import _build, inputs_for, tiny_sd21

FINETUNE_WEIGHTS = {"denoising": 1.0, "distillation": 0.5, "block": 0.5}


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).double().norm() / b.double().norm()).detach())


def tiniest(seed: int = 0) -> UNet2DConditionModel:
    """Two blocks of one layer: what a compiler traces in a test's time."""
    return _build(
        seed,
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[2, 2],
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
    )


def single_block(seed: int = 0) -> UNet2DConditionModel:
    """One block of one layer, and the mid block with its transformer: what a compiler makes kernels of in a test's time."""
    return _build(
        seed,
        sample_size=8,
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=2,
        cross_attention_dim=24,
        norm_num_groups=8,
        use_linear_projection=True,
    )


def prune_step(
    unet: UNet2DConditionModel, dtype: torch.dtype | None = None, phase: str = "codes", chunks: int = 1
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Losses, and the gradients of the codes and of the predictor's last layer."""
    gated = GatedUNet(unet)
    macs = MacsModel.measure(unet, (8, 8), 5, gated.space)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gated.space.dim, generator=generator) - 2.5
    router = PromptRouter(gated.space, z_dim=12, num_codes=3, generator=generator, start_logits=start)
    router.initialise_codes(randn(48, 12, seed=5), generator=generator)
    objective = PruneObjective(
        router, gated, macs, alphas_cumprod=ALPHAS, prediction_type="v_prediction", budget=0.65, chunks=chunks
    ).train()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        losses, _ = objective(**make_batch(objective, rows=4, phase=phase))
    weighted_sum(losses, WEIGHTS).backward()
    assert all(loss.dtype in (torch.float32, torch.float64) for loss in losses.values())
    codes, last = router.codes.grad, router.predictor[3].weight.grad
    assert codes is not None and last is not None
    return losses, codes, last


@pytest.mark.parametrize("phase", ["warmup", "codes"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_checkpointing_leaves_the_prune_steps_gradients(dtype: torch.dtype | None, phase: str) -> None:
    plain = prune_step(tiny_sd21(), dtype, phase)
    unet = tiny_sd21()
    unet.enable_gradient_checkpointing()
    checkpointed = prune_step(unet, dtype, phase)
    for name, loss in plain[0].items():
        torch.testing.assert_close(checkpointed[0][name], loss, rtol=1e-5, atol=1e-7)
    moved = plain[1:] if phase == "codes" else plain[2:]
    for expected, actual in zip(moved, checkpointed[1:] if phase == "codes" else checkpointed[2:], strict=True):
        assert float(expected.abs().max()) > 0 and relative(actual, expected) < 1e-4
    if dtype is not None:  # half precision moves the gradients, but not their direction
        exact = prune_step(tiny_sd21(), None, phase)
        assert all(gradient.isfinite().all() for gradient in plain[1:])
        for half, full in zip(moved, exact[1:] if phase == "codes" else exact[2:], strict=True):
            assert torch.nn.functional.cosine_similarity(half.flatten(), full.flatten(), dim=0) > 0.98
        # What does not go through the UNet is not touched by autocast at all.
        for name in ("resource", "contrastive", "commitment", "spread", "peak"):
            assert torch.equal(plain[0][name], exact[0][name]), name


@pytest.mark.parametrize("phase", ["warmup", "codes"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_prune_step_in_chunks_is_the_step_at_once(dtype: torch.dtype | None, phase: str) -> None:
    """Four rows in three chunks, the activations of which are made again in the backward pass, after masks are gone."""
    saved = [0, 0]

    def step(chunks: int) -> Any:
        def count(tensor: Tensor) -> Tensor:
            saved[chunks > 1] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return prune_step(tiny_sd21(), dtype, phase, chunks)

    plain, chunked = step(1), step(3)
    assert saved[1] < saved[0] / 2
    tolerance = 1e-5 if dtype is None else 5e-3
    for name, loss in plain[0].items():
        torch.testing.assert_close(chunked[0][name], loss, rtol=tolerance, atol=1e-6)
    for expected, actual in zip(plain[1:], chunked[1:], strict=True):
        if expected.any():
            assert relative(actual, expected) < (1e-4 if dtype is None else 3e-2)
        else:
            assert not actual.any()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("gated", [False, True], ids=["pruned", "gated"])
def test_checkpointing_leaves_the_finetune_steps_gradients(gated: bool, dtype: torch.dtype | None) -> None:
    code = ArchitectureSpace.of(tiny_sd21()).random_code(0.6, torch.Generator().manual_seed(0))

    def step(checkpointing: bool) -> list[Tensor]:
        student: Any = GatedUNet(tiny_sd21(1)) if gated else prune_unet(tiny_sd21(1), code)
        if checkpointing:
            (student.unet if gated else student).enable_gradient_checkpointing()
        objective = FinetuneObjective(student, tiny_sd21(), alphas_cumprod=ALPHAS, prediction_type="epsilon").train()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            losses, _ = objective(**finetune_batch(), codes=code.repeat(3, 1) if gated else None)
        weighted_sum(losses, FINETUNE_WEIGHTS).backward()
        return [p.grad for p in student.parameters() if p.grad is not None]

    plain, checkpointed = step(False), step(True)
    assert len(plain) == len(checkpointed) > 100
    largest = max(float(gradient.abs().max()) for gradient in plain)
    for expected, actual in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-6 * largest)


def test_channels_last_gives_the_same_step_and_the_same_pruned_unet() -> None:
    """Within 1e-4 of the largest value: convolutions sum in another order."""
    last = tiny_sd21().to(memory_format=torch.channels_last)
    assert last.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    plain, other = prune_step(tiny_sd21()), prune_step(last)
    for name, loss in plain[0].items():
        torch.testing.assert_close(other[0][name], loss, rtol=1e-4, atol=1e-6)
    for expected, actual in zip(plain[1:], other[1:], strict=True):
        assert relative(actual, expected) < 1e-3

    gated = GatedUNet(tiny_sd21())
    code = gated.space.random_code(0.6, torch.Generator().manual_seed(0))
    pruned = prune_unet(last, code).to(memory_format=torch.channels_last)
    inputs = inputs_for(gated.unet)
    with torch.no_grad():
        with gated.use(code):
            expected = gated(**inputs).sample
        inputs["sample"] = inputs["sample"].contiguous(memory_format=torch.channels_last)
        with gated.use(code):
            assert relative(gated(**inputs).sample, expected) < 1e-4
        output = pruned(**inputs).sample
    assert relative(output, expected) < 1e-4 and output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow  # the compiler
def test_a_compiled_pruned_unet_computes_the_same() -> None:
    """By the CPU compiler itself."""
    space = ArchitectureSpace.of(single_block())
    pruned = prune_unet(single_block(), space.random_code(0.5, torch.Generator().manual_seed(2)))
    inputs = inputs_for(pruned, size=8)
    macs, keys = count_macs(pruned, (8, 8), 5), list(pruned.state_dict())
    with torch.no_grad():
        expected = pruned(**inputs).sample
        compile_unet(pruned)
        assert relative(pruned(**inputs).sample, expected) < 1e-5
    assert list(pruned.state_dict()) == keys and count_macs(pruned, (8, 8), 5) == macs


@pytest.mark.slow  # the compiler
@pytest.mark.parametrize("stage", ["prune", "finetune"])
def test_compiled_steps_see_new_masks_and_every_block(stage: str) -> None:
    """Traced and differentiated by the compiler, run without its kernels, which the test above compiles."""

    def steps(compiled: bool) -> list[tuple[dict[str, Tensor], Tensor]]:
        unet = tiniest(1)
        gated = GatedUNet(unet)
        codes = torch.rand(3, 3, gated.space.dim, generator=torch.Generator().manual_seed(0)).round()
        codes[..., [site.start for site in gated.space.width_sites]] = 1.0
        if stage == "prune":
            macs = MacsModel.measure(unet, (8, 8), 5, gated.space)
            generator = torch.Generator().manual_seed(0)
            router = PromptRouter(gated.space, z_dim=12, num_codes=3, generator=generator)
            with torch.no_grad():
                router.codes.copy_(torch.randn(3, gated.space.dim, generator=generator) - 2.5)
            objective: Any = PruneObjective(
                router, gated, macs, alphas_cumprod=ALPHAS, prediction_type="epsilon", budget=0.9
            ).train()
        else:
            objective = FinetuneObjective(gated, tiniest(), alphas_cumprod=ALPHAS, prediction_type="epsilon").train()
        if compiled:
            compile_unet(unet, backend="aot_eager")
        found = []
        for step in range(2):
            objective.zero_grad()
            if stage == "prune":
                losses, _ = objective(**make_batch(objective, rows=3, seed=step))
                weighted_sum(losses, WEIGHTS).backward()
                gradient = objective.router.codes.grad
            else:
                losses, _ = objective(**finetune_batch(), codes=codes[step].bool())
                weighted_sum(losses, FINETUNE_WEIGHTS).backward()
                gradient = unet.conv_in.weight.grad
            found.append((copy.deepcopy({n: loss.detach() for n, loss in losses.items()}), gradient.clone()))
        return found

    plain, compiled = steps(False), steps(True)
    for (losses, gradient), (other, other_gradient) in zip(plain, compiled, strict=True):
        assert float(losses["block"]) > 0
        for name, loss in losses.items():
            torch.testing.assert_close(other[name], loss, rtol=1e-4, atol=1e-6)
        assert relative(other_gradient, gradient) < 1e-3
