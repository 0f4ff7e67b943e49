"""A batch -> named losses, for every stage that trains a UNet: against the data, and against a teacher if there is one.

All of these losses are means over a rank's own rows, which DistributedDataParallel averages. The formulas themselves are
in `losses.py`.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.losses import (
    PredictionType,
    add_noise,
    check_prediction_type,
    finetune_losses,
    min_snr_weights,
    prediction_target,
)
from aptp_ray.core.running import BlockRecorder, run_unet


class FinetuneObjective(nn.Module):
    """The step of every stage that trains a UNet: the shared phase, an expert, and (without a teacher) a teacher."""

    alphas_cumprod: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        alphas_cumprod: Tensor,
        prediction_type: PredictionType,
        gamma: float | None = 5.0,
        normalise_blocks: bool = True,
    ) -> None:
        """Freezes the teacher.

        Args:
            student: learns; a GatedUNet for training under codes, else a UNet (a pruned one, or the teacher to be).
            teacher: a UNet of its own, or None to train on the data alone.
            alphas_cumprod: [train timesteps], the scheduler's.
            prediction_type: the scheduler's.
            gamma: of the min-SNR weights.
            normalise_blocks: see `match_losses`.

        Raises:
            ValueError: the student's and the teacher's weights are the same tensors.
        """
        super().__init__()
        check_prediction_type(prediction_type)
        if teacher is not None and {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}:
            raise ValueError("student and teacher share weights; load the teacher a second time (or deepcopy it)")
        self.student = student
        self.teacher: nn.Module | None = None if teacher is None else teacher.requires_grad_(False).eval()
        wrapped: Any = student.unet if isinstance(student, GatedUNet) else student
        self._student_blocks = None if teacher is None else BlockRecorder(wrapped)
        self._teacher_blocks = None if teacher is None else BlockRecorder(cast(Any, teacher))
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().clone(), persistent=False)
        self.prediction_type, self.gamma, self.normalise_blocks = prediction_type, gamma, normalise_blocks

    def release(self) -> None:
        """Takes what records block outputs off student and teacher, for another objective of theirs; this one is done."""
        for recorder in (self._student_blocks, self._teacher_blocks):
            if recorder is not None:
                recorder.remove()

    def train(self, mode: bool = True) -> FinetuneObjective:
        """Trains the student only: the teacher's dropout stays off."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        text_states: Tensor,
        text_mask: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One batch.

        Args:
            latents: [b, channels, height, width], clean and scaled.
            noise: the same shape, standard normal.
            timesteps: [b] int64.
            text_states: [b, tokens, text_dim].
            text_mask: bool [b, tokens], or None.
            codes: bool [b, dim], each sample's own, for a GatedUNet; None runs the student as it is.

        Returns:
            The losses named in `FINETUNE_LOSSES`, and statistics: `match`, the distillation error over the mean square
            of the teacher's output.

        Raises:
            TypeError: codes for a student without gates.
        """
        student: Any = self.student
        if codes is not None and not isinstance(student, GatedUNet):
            raise TypeError("codes need a GatedUNet as the student; a pruned UNet has its code built in")
        inputs = (add_noise(self.alphas_cumprod, latents, noise, timesteps), timesteps, text_states, text_mask)
        stats = dict[str, Any]()
        teacher_output, teacher_blocks, student_blocks = None, list[Tensor](), list[Tensor]()
        if self.teacher is not None and self._teacher_blocks is not None:
            with torch.inference_mode():
                teacher_output, teacher_blocks = run_unet(self.teacher, *inputs), self._teacher_blocks.take()
        masks = student.use(codes) if isinstance(student, GatedUNet) and codes is not None else nullcontext()
        with masks:
            model_output = run_unet(student, *inputs)
        if self._student_blocks is not None:
            student_blocks = self._student_blocks.take()
        losses = finetune_losses(
            model_output=model_output,
            target=prediction_target(self.alphas_cumprod, latents, noise, timesteps, self.prediction_type),
            snr_weight=min_snr_weights(self.alphas_cumprod, timesteps, self.gamma, self.prediction_type),
            teacher_output=teacher_output, student_blocks=student_blocks, teacher_blocks=teacher_blocks,
            normalise_blocks=self.normalise_blocks,
        )  # fmt: skip
        if teacher_output is not None:
            scale = teacher_output.float().pow(2).mean().clamp_min(1e-12)
            stats["match"] = float(losses["distillation"].detach() / scale)
        return losses, stats
