"""The prune stage's batch -> named losses: where router, gates, transport and MACs meet (APTP, section 3.3).

Losses that compare prompts with one another (`resource`, `contrastive`, `commitment`, `spread`, `peak`) are computed on
the joined batch of all ranks, on every rank; the others are means over a rank's own rows, which DistributedDataParallel
averages. The formulas themselves are in `losses.py`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aptp_ray.core.code_router import CodeRouter
from aptp_ray.core.collapse import embedding_spread, perplexity
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.losses import (
    ContrastiveForm,
    PredictionType,
    add_noise,
    check_prediction_type,
    match_losses,
    min_snr_weights,
    prediction_target,
    prune_losses,
)
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.relaxation import straight_through
from aptp_ray.core.running import BlockRecorder, run_unet
from aptp_ray.core.transport import Assignment, balanced_assignment, gather_rows, nearest_assignment, own_rows, prefer_lowest

Phase = Literal["warmup", "codes"]
AssignmentRule = Literal["transport", "nearest"]


class PruneObjective(nn.Module):
    """The prune stage's step: only the router's predictor and codes have gradients; wrap it in DDP as it is.

    In the warm-up every prompt runs under its own e. Then every prompt runs under the code that the assignment gives it:
    the task (through the UNet) and the budget move the codes, `contrastive` and `commitment` move e.

    The keyword switches are the departures from the reference implementation, each at the design's choice by default.
    """

    alphas_cumprod: Tensor
    shares: Tensor
    routed_shares: Tensor

    def __init__(
        self,
        router: CodeRouter,
        gated: GatedUNet,
        macs: MacsModel,
        *,
        alphas_cumprod: Tensor,
        prediction_type: PredictionType,
        budget: float,
        gamma: float | None = 5.0,
        assignment: AssignmentRule = "transport",
        assignment_epsilon: float = 0.3,
        relative_epsilon: bool = True,
        temperature: float = 0.03,
        contrastive_form: ContrastiveForm = "softmax",
        contrastive_diagonal: bool = False,
        unet_masks: Literal["soft", "hard"] = "soft",
        resource_masks: Literal["soft", "hard"] = "hard",
        noise_per: Literal["code", "sample"] = "code",
        noisy_similarity: bool = False,
        normalise_blocks: bool = True,
        chunks: int = 1,
    ) -> None:
        """Freezes the UNet.

        Args:
            router: learns.
            gated: the teacher, with gates.
            macs: the MACs of its codes.
            alphas_cumprod: [train timesteps], the scheduler's.
            prediction_type: the scheduler's.
            budget: target of the mean MACs ratio.
            gamma: of the min-SNR weights.
            assignment: which code a prompt trains: "transport" shares the batch out evenly, "nearest" takes each prompt's most
                similar code and leaves the router's duals as they are.
            assignment_epsilon: the transport's regularization.
            relative_epsilon: whether in units of the similarities' standard deviation.
            temperature: of the contrastive loss.
            contrastive_form: see `contrastive_loss`.
            contrastive_diagonal: see `contrastive_loss`.
            unet_masks: what the UNet sees; "hard" is straight-through.
            resource_masks: what the MACs are counted on; "hard" is straight-through.
            noise_per: one Gumbel draw for each code or for each sample.
            noisy_similarity: whether codes are compared under this step's noise (needs `noise_per="code"`).
            normalise_blocks: see `match_losses`.
            chunks: parts in which the UNets run, one after the other; more than one keep no activations but recompute them
                in the backward pass. Losses that compare prompts need the whole batch, so it cannot be cut further out.

        Raises:
            ValueError: a budget outside (floor, 1], or switches that exclude one another.
        """
        super().__init__()
        check_prediction_type(prediction_type)
        _check_choices(macs, budget, assignment, unet_masks, resource_masks, noise_per, noisy_similarity)
        self.router, self.gated, self.macs = router, gated.requires_grad_(False).eval(), macs
        self._blocks = BlockRecorder(gated.unet)
        self.register_buffer("alphas_cumprod", alphas_cumprod.detach().clone(), persistent=False)
        # Running shares of the prompts: what the transport gives to each code, and what routing would. A part of the state,
        # so that a resumed run logs what an undisturbed one would.
        self.register_buffer("shares", torch.zeros(router.num_codes, dtype=torch.float64))
        self.register_buffer("routed_shares", torch.zeros(router.num_codes, dtype=torch.float64))
        self.prediction_type, self.budget, self.gamma = prediction_type, budget, gamma
        self.assignment, self.assignment_epsilon, self.relative_epsilon = assignment, assignment_epsilon, relative_epsilon
        self.contrastive: dict[str, Any] = {
            "temperature": temperature,
            "contrastive_form": contrastive_form,
            "contrastive_diagonal": contrastive_diagonal,
        }
        self.unet_masks, self.resource_masks = unet_masks, resource_masks
        self.noise_per, self.noisy_similarity, self.normalise_blocks = noise_per, noisy_similarity, normalise_blocks
        self.chunks = chunks

    def train(self, mode: bool = True) -> PruneObjective:
        """Trains the router only: the teacher's dropout stays off."""
        super().train(mode)
        self.gated.eval()
        return self

    def forward(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        text_states: Tensor,
        text_mask: Tensor | None,
        z: Tensor,
        gumbel_noise: Tensor,
        phase: Phase,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """One batch of b rows on this rank.

        Args:
            latents: [b, channels, height, width], clean and scaled.
            noise: the same shape, standard normal.
            timesteps: [b] int64.
            text_states: [b, tokens, text_dim].
            text_mask: bool [b, tokens] of real tokens, or None.
            z: [b, z_dim] prompt embeddings.
            gumbel_noise: standard Gumbel draws: [b, dim] in the warm-up and for `noise_per="sample"`, else [K, dim],
                the same on every rank.
            phase: "warmup" or "codes".

        Returns:
            The losses named in `PRUNE_LOSSES`, and statistics: `macs_ratio` (mean; what `resource` sees),
            `macs_ratio_std`, `embedding_spread`; in phase "codes" also `assignment_counts` [K], `assignment_converged`,
            `assignment_residual`, `assignment_epsilon`, `assignment_perplexity` and `routed_perplexity` (codes in use, by
            the running shares), `similarity_std`, and `agreement` of the assignment with deterministic routing under the
            past steps' duals.
        """
        if phase not in ("warmup", "codes"):
            raise ValueError(f"unknown phase {phase!r}; one of 'warmup', 'codes'")
        self._check_noise(gumbel_noise, phase, len(latents))
        # Logits, masks and MACs need more than half precision: a code's ratios differ in the fourth digit.
        with torch.autocast(latents.device.type, enabled=False):
            z_all, e_all = gather_rows(z.float()), gather_rows(self.router.embed(z.float()))  # [B, ...]
            own = own_rows(z)
            if self.training:
                self.router.update_means(e_all.detach())
            uncentred = self.router.features(e_all)  # [B, dim]
            features = self.router.centred(uncentred, self.router.mean_embedding)
            if phase == "warmup":
                masks, ratios = self._own_masks(e_all[own], gumbel_noise)
                code_features, stats = None, dict[str, Any]()
            else:
                masks, ratios, code_features, stats = self._code_masks(e_all, gumbel_noise, own)

        matches = self._match(latents, noise, timesteps, text_states, text_mask, masks)
        with torch.autocast(latents.device.type, enabled=False):
            losses = prune_losses(
                matches, ratios=ratios, budget=self.budget, z=z_all, features=features,
                code_features=code_features, **self.contrastive,
            )  # fmt: skip
            # DDP waits for a gradient of every parameter, and codes have none in the warm-up.
            losses["denoising"] = losses["denoising"] + 0 * self.router.codes.sum()
        ratio = ratios.detach()
        stats["embedding_spread"] = embedding_spread(uncentred.detach())
        return losses, {"macs_ratio": float(ratio.mean()), "macs_ratio_std": float(ratio.std(correction=0)), **stats}

    def _own_masks(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Masks [b, dim] of this rank's samples and the MACs ratios [B] of all."""
        soft, hard = self._masks(logits, noise)
        return (hard if self.unet_masks == "hard" else soft), gather_rows(self._ratio(soft, hard))

    def _code_masks(
        self, e_all: Tensor, noise: Tensor, rows: slice
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
        """Assigns the joined batch; this rank's masks [b, dim], all ratios [B], all code features [B, dim]."""
        router = self.router
        similarity = router.similarity(e_all.detach(), noise=noise if self.noisy_similarity else None).detach()
        # Every rank has the same rows and computes the same plan.
        assignment = (
            balanced_assignment(similarity, epsilon=self.assignment_epsilon, relative=self.relative_epsilon)
            if self.assignment == "transport"
            else nearest_assignment(similarity)
        )
        index, own = assignment.index, assignment.index[rows]
        stats = self._assignment_stats(assignment, similarity)
        if self.noise_per == "code":
            soft, hard = self._masks(router.codes, noise)
            masks, ratios = (hard if self.unet_masks == "hard" else soft)[own], self._ratio(soft, hard)[index]
        else:
            masks, ratios = self._own_masks(router.codes[own], noise)
        # Detached: the commitment draws e to the code, the task alone says where the code is.
        code_features = router.centred(router.features(router.codes.detach()), router.mean_codes)[index]
        return masks, ratios, code_features, stats

    def _masks(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        soft = self.router.soft_masks(logits, noise)
        return soft, straight_through(soft, self.router.space)

    def _ratio(self, soft: Tensor, hard: Tensor) -> Tensor:
        return self.macs.ratio(hard if self.resource_masks == "hard" else soft)

    def _assignment_stats(self, assignment: Assignment, similarity: Tensor) -> dict[str, Any]:
        router = self.router
        routed = prefer_lowest(similarity.double() + router.prices())
        counts = assignment.index.bincount(minlength=router.num_codes)
        routed_counts = routed.bincount(minlength=router.num_codes)
        if self.training:
            if self.assignment == "transport":
                router.track_potentials(assignment)
            _track(self.shares, counts, router.mean_momentum)
            _track(self.routed_shares, routed_counts, router.mean_momentum)
        return {
            "assignment_counts": counts.tolist(),
            # In evaluation there may be no running shares yet.
            "assignment_perplexity": perplexity(self.shares if self.training else counts),
            "routed_perplexity": perplexity(self.routed_shares if self.training else routed_counts),
            "assignment_converged": assignment.converged,
            "assignment_residual": assignment.residual,
            "assignment_epsilon": assignment.epsilon,
            "similarity_std": float(similarity.std(correction=0)),
            "agreement": float((routed == assignment.index).double().mean()),
        }

    def _match(self, *inputs: Any) -> dict[str, Tensor]:
        """`denoising`, `distillation` and `block` of this rank's rows, [b, ...] each: the UNets' part, in `chunks`."""
        rows = len(inputs[0])
        count = min(self.chunks, rows)
        losses: dict[str, Tensor] = {}
        for index in range(count):
            part = slice(index * rows // count, (index + 1) * rows // count)
            rows_of: list[Any] = [None if x is None else x[part] for x in inputs]
            found = self._match_rows(*rows_of, recompute=count > 1)
            for name, value in found.items():
                share = (part.stop - part.start) / rows * value
                losses[name] = losses[name] + share if name in losses else share
        return losses

    def _match_rows(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        text_states: Tensor,
        text_mask: Tensor | None,
        masks: Tensor,
        *,
        recompute: bool,
    ) -> dict[str, Tensor]:
        noised = add_noise(self.alphas_cumprod, latents, noise, timesteps)
        inputs = (noised, timesteps, text_states, text_mask)
        # Not in inference mode: autocast keeps the cast weights of this first pass for the second, which needs a graph.
        with torch.no_grad():
            teacher_output, teacher_blocks = run_unet(self.gated, *inputs), self._blocks.take()

        def masked(masks: Tensor) -> dict[str, Tensor]:
            # Masks come as an argument: what is recomputed in the backward pass, after `use` has ended, runs under them too.
            with self.gated.use(masks):
                model_output, student_blocks = run_unet(self.gated, *inputs), self._blocks.take()
            with torch.autocast(latents.device.type, enabled=False):
                return match_losses(
                    model_output=model_output,
                    target=prediction_target(self.alphas_cumprod, latents, noise, timesteps, self.prediction_type),
                    snr_weight=min_snr_weights(self.alphas_cumprod, timesteps, self.gamma, self.prediction_type),
                    teacher_output=teacher_output,
                    student_blocks=student_blocks,
                    teacher_blocks=teacher_blocks,
                    normalise_blocks=self.normalise_blocks,
                )

        return checkpoint(masked, masks, use_reentrant=False) if recompute else masked(masks)

    def _check_noise(self, noise: Tensor, phase: Phase, rows: int) -> None:
        per_sample = phase == "warmup" or self.noise_per == "sample"
        expected = (rows if per_sample else self.router.num_codes, self.router.space.dim)
        if tuple(noise.shape) != expected:
            raise ValueError(f"gumbel_noise must be {list(expected)} in phase {phase!r}, got {list(noise.shape)}")


def _track(shares: Tensor, counts: Tensor, momentum: float) -> None:
    """Moves running shares [K] toward those of a batch's counts [K], in place."""
    shares.lerp_(counts.to(shares) / counts.sum(), 1 - momentum if bool(shares.any()) else 1.0)


def _check_choices(
    macs: MacsModel,
    budget: float,
    assignment: str,
    unet_masks: str,
    resource_masks: str,
    noise_per: str,
    noisy_similarity: bool,
) -> None:
    floor = macs.floor / macs.total
    if not floor < budget <= 1:
        raise ValueError(f"budget {budget} is outside ({floor:.4f}, 1]: below lies what cannot be pruned")
    for name, value, allowed in (
        ("assignment", assignment, ("transport", "nearest")),
        ("unet_masks", unet_masks, ("soft", "hard")),
        ("resource_masks", resource_masks, ("soft", "hard")),
        ("noise_per", noise_per, ("code", "sample")),
    ):
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}; one of {', '.join(map(repr, allowed))}")
    if noisy_similarity and noise_per != "code":
        raise ValueError("noisy_similarity compares codes under their own noise; it needs noise_per='code'")
