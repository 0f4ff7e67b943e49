"""The losses as functions: plain tensors in, named losses out (APTP, section 3.3; design, "Losses").

Losses are returned without weights; `weighted_sum` puts them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

PredictionType = Literal["epsilon", "v_prediction", "sample"]
ContrastiveForm = Literal["softmax", "binary"]

PRUNE_LOSSES = (
    "denoising", "distillation", "block", "resource", "contrastive", "commitment", "spread", "peak",
)  # fmt: skip
FINETUNE_LOSSES = ("denoising", "distillation", "block")


# -- diffusion ---------------------------------------------------------------------------------------------------------


def add_noise(alphas_cumprod: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Noised latents `sqrt(a_t) x0 + sqrt(1 - a_t) noise` (DDPM, equation 4).

    Args:
        alphas_cumprod: [train timesteps], the scheduler's.
        x0: [batch, ...] clean latents.
        noise: [batch, ...] standard normal.
        t: [batch] int64.
    """
    a = _at(alphas_cumprod, t, x0)
    return a.sqrt() * x0 + (1 - a).sqrt() * noise


def prediction_target(
    alphas_cumprod: Tensor, x0: Tensor, noise: Tensor, t: Tensor, prediction_type: PredictionType
) -> Tensor:
    """What the UNet is trained to output: the noise, the clean latents, or v (Salimans and Ho 2022, appendix D).

    Args:
        alphas_cumprod: [train timesteps].
        x0: [batch, ...] clean latents.
        noise: [batch, ...].
        t: [batch] int64.
        prediction_type: the scheduler's.

    Raises:
        ValueError: an unknown prediction type.
    """
    check_prediction_type(prediction_type)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    a = _at(alphas_cumprod, t, x0)
    return a.sqrt() * noise - (1 - a).sqrt() * x0


def min_snr_weights(
    alphas_cumprod: Tensor, t: Tensor, gamma: float | None, prediction_type: PredictionType
) -> Tensor:
    """Loss weights [batch] float32 of timesteps t (Hang et al. 2023, section 3.4).

    With `snr = a / (1 - a)`: `min(snr, gamma)` for clean latents, divided by `snr` for noise and by `snr + 1` for v.
    Written so that nothing is divided by an snr: a schedule with zero terminal SNR has a = 0 at its last step.

    Args:
        alphas_cumprod: [train timesteps].
        t: [batch] int64.
        gamma: the cap, 5 in the paper; None weighs all timesteps 1.
        prediction_type: the scheduler's.

    Raises:
        ValueError: a non-positive gamma or an unknown prediction type.
    """
    check_prediction_type(prediction_type)
    if gamma is None:
        return torch.ones(len(t), device=t.device)
    if not gamma > 0:
        raise ValueError(f"min-SNR gamma must be positive, got {gamma}; None switches the weighting off")
    a = alphas_cumprod.to(t.device, torch.float64)[t]
    tiny = torch.finfo(torch.float64).tiny
    if prediction_type == "epsilon":
        weights = (gamma * (1 - a) / a.clamp_min(tiny)).clamp(max=1)
    elif prediction_type == "sample":
        weights = (a / (1 - a).clamp_min(tiny)).clamp(max=gamma)
    else:
        weights = torch.minimum(a, gamma * (1 - a))
    return weights.float()


# -- losses ------------------------------------------------------------------------------------------------------------


def contrastive_loss(
    features: Tensor,
    z: Tensor,
    *,
    temperature: float = 0.03,
    form: ContrastiveForm = "softmax",
    diagonal: bool = False,
) -> Tensor:
    """Makes architectures as near to one another as their prompts are (APTP, section 3.2, equation 6).

    Args:
        features: [B, dim] unit vectors of the prompts' architectures.
        z: [B, z_dim] prompt embeddings.
        temperature: of both softmaxes over the batch.
        form: "softmax" is the cross-entropy of the two distributions; "binary" the reference's element-wise form.
        diagonal: whether a prompt is compared with itself too. Then nearly all the mass of both distributions lies
            there and the loss only pushes all prompts apart.

    Returns:
        A scalar; 0 for a batch with nothing to compare.

    Raises:
        ValueError: an unknown form.
    """
    if form not in ("softmax", "binary"):
        raise ValueError(f"unknown contrastive form {form!r}; one of 'softmax', 'binary'")
    rows = len(z)
    if rows < 2:
        return features.sum() * 0
    z = nn.functional.normalize(z.to(features.dtype), dim=1)
    architectures, prompts = features @ features.T / temperature, z @ z.T / temperature  # [B, B]
    if not diagonal:
        others = ~torch.eye(rows, dtype=torch.bool, device=z.device)
        architectures, prompts = architectures[others].view(rows, rows - 1), prompts[others].view(rows, rows - 1)
    target = prompts.softmax(dim=1).detach()
    if form == "binary":
        return nn.functional.binary_cross_entropy(architectures.softmax(dim=1).clamp(0, 1), target)
    return -(target * architectures.log_softmax(dim=1)).sum(dim=1).mean()


def match_losses(
    *,
    model_output: Tensor,
    target: Tensor,
    snr_weight: Tensor,
    teacher_output: Tensor | None = None,
    student_blocks: Sequence[Tensor] = (),
    teacher_blocks: Sequence[Tensor] = (),
    normalise_blocks: bool = True,
) -> dict[str, Tensor]:
    """`denoising`, `distillation` and `block`; those that need a teacher are 0 without one.

    `block` is the mean over blocks and samples of the squared error, each divided by the mean square of the teacher's
    output there: activations differ by orders of magnitude between blocks, and the largest would be the loss. By
    sample, so that the loss does not depend on how a batch is split over ranks.

    Args:
        model_output: [batch, ...] of the student.
        target: [batch, ...] of the denoising loss.
        snr_weight: [batch].
        teacher_output: [batch, ...].
        student_blocks: the student's block outputs.
        teacher_blocks: the teacher's, of the same shapes.
        normalise_blocks: False for plain squared errors, as in the reference.

    Raises:
        ValueError: different numbers of blocks.
    """
    output = model_output.float()
    if len(student_blocks) != len(teacher_blocks):
        raise ValueError(f"{len(student_blocks)} student blocks against {len(teacher_blocks)} of the teacher")
    errors = (output - target.float()).pow(2).flatten(1).mean(dim=1)  # [batch]
    zero = output.new_zeros(())
    block = []
    for student, teacher in zip(student_blocks, teacher_blocks, strict=True):
        expected = teacher.detach().float()
        error = (student.float() - expected).pow(2).flatten(1).mean(dim=1)  # [batch]
        scale = expected.pow(2).flatten(1).mean(dim=1).clamp_min(1e-12) if normalise_blocks else 1.0
        block.append((error / scale).mean())
    return {
        "denoising": (errors * snr_weight.to(errors)).mean(),
        "distillation": zero if teacher_output is None else (output - teacher_output.detach().float()).pow(2).mean(),
        "block": torch.stack(block).mean() if block else zero,
    }


def prune_losses(
    matches: dict[str, Tensor],
    *,
    ratios: Tensor,
    budget: float,
    z: Tensor,
    features: Tensor,
    code_features: Tensor | None = None,
    temperature: float = 0.03,
    contrastive_form: ContrastiveForm = "softmax",
    contrastive_diagonal: bool = False,
) -> dict[str, Tensor]:
    """All losses of the prune stage, by the names in `PRUNE_LOSSES`.

    Args:
        matches: what `match_losses` gives of a rank's own rows, run under masks.
        ratios: [B] MACs ratio of each prompt's architecture; this and the rest are of the joined batch.
        budget: target of the mean ratio.
        z: [B, z_dim] prompt embeddings.
        features: [B, dim] unit vectors of the prompts' embeddings e (`PromptRouter.centred`).
        code_features: [B, dim] unit vectors of their codes; None before there are codes.
        temperature: of the contrastive loss.
        contrastive_form: likewise.
        contrastive_diagonal: likewise.
    """
    # The root's gradient at no variance at all (one code) would be 0 / 0.
    std = (ratios.var(correction=0) + 1e-12).sqrt()
    commitment = features.new_zeros(()) if code_features is None else (1 - (features * code_features).sum(1)).mean()
    return matches | {
        "resource": (ratios.mean() / budget).log().abs().float(),
        "contrastive": contrastive_loss(
            features, z, temperature=temperature, form=contrastive_form, diagonal=contrastive_diagonal
        ),
        "commitment": commitment,
        "spread": -std.float(),
        "peak": (1 - ratios.max()).float(),
    }


def finetune_losses(**tensors: Any) -> dict[str, Tensor]:
    """All losses of the fine-tuning stages, by the names in `FINETUNE_LOSSES`; arguments as for `match_losses`."""
    return match_losses(**tensors)


def weighted_sum(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The total loss.

    Raises:
        ValueError: the two do not name the same losses; a loss is switched off by weight 0, not by leaving it out.
    """
    unknown, missing = sorted(set(weights) - set(losses)), sorted(set(losses) - set(weights))
    if unknown or missing:
        raise ValueError(
            f"loss weights do not fit the losses: unknown {unknown}, missing {missing}; the losses are "
            f"{sorted(losses)}, and weight 0 switches one off"
        )
    return torch.stack([float(weights[name]) * loss for name, loss in losses.items()]).sum()


def check_prediction_type(prediction_type: str) -> None:
    """Raises ValueError unless the type is one of diffusers' three."""
    if prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"unknown prediction type {prediction_type!r}; one of 'epsilon', 'v_prediction', 'sample'")


def _at(alphas_cumprod: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """a_t shaped to broadcast over `like`: [batch, 1, ...]."""
    return alphas_cumprod.to(like.device, like.dtype)[t].reshape(-1, *[1] * (like.ndim - 1))
