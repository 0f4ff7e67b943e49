"""Do kinds of prompts differ in what they need of the model? Measured on the teacher, before anything is pruned.

Two ways in which they can: other entries matter (rank correlation of importances between kinds, against the correlation of
two halves of one kind, which is what sampling noise alone leaves), or the same MACs buy more quality for one kind than for
another (the teacher-match error of one and the same static code, by kind, over budgets).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aptp_ray.core.ablation import ablate
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.importance import Importance, ImportanceBatch, measure_importance, spearman
from aptp_ray.core.losses import add_noise
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.randomness import keyed_generator
from aptp_ray.core.sizes import match_error

NEEDS = ("evaluation", "needs.json")


@dataclass(frozen=True)
class KindSamples:
    """Encoded prompts of one kind.

    Attributes:
        latents: [n, channels, height, width], clean.
        text_states: [n, tokens, width].
    """

    latents: Tensor
    text_states: Tensor


def measure_needs(
    gated: GatedUNet,
    macs: MacsModel,
    kinds: dict[str, KindSamples],
    *,
    alphas_cumprod: Tensor,
    importance_samples: int,
    again: Sequence[float] = (),
    again_samples: int = 2,
    budgets: tuple[float, ...] = (0.9, 0.8, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4),
    seed: int = 0,
    chunk: int = 128,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures importances and error slopes by kind of prompt.

    Args:
        gated: the teacher.
        macs: of its codes.
        kinds: samples by kind; the first ``importance_samples`` of each (an even number) are used for importances.
        alphas_cumprod: [train timesteps].
        importance_samples: of each kind.
        again: MACs ratios on the way down at which entries are judged anew (`aptp_ray.core.ablation`).
        again_samples: of each kind, for these.
        budgets: at which the static codes are compared.
        seed: of noise.
        chunk: rows to a forward pass.
        progress: (kind, rows done, rows) during importances.

    Returns:
        ``between``: {"a | b": rank correlation}, ``within``: {kind: rank correlation of its halves, corrected to full length},
        ``error``: {budget: {kind: error over the power of the teacher's output}}, all rounded; where entries were judged anew,
        ``error_once``: the same of codes by the teacher's importances alone, and ``importances_at``.
    """
    halves: dict[str, tuple[Tensor, Tensor]] = {}
    for kind, samples in kinds.items():
        batch = noised(samples, alphas_cumprod, seed, importance_samples)
        report = None if progress is None else _bound(progress, kind)
        first, second = (
            measure_importance(gated, [_part(batch, half)], macs=macs, chunk=chunk, progress=report).score
            for half in (slice(0, None, 2), slice(1, None, 2))
        )
        halves[kind] = (first, second)
    scores = {kind: (a + b) / 2 for kind, (a, b) in halves.items()}
    names = list(kinds)
    between = {
        f"{a} | {b}": round(spearman(scores[a], scores[b]), 3) for i, a in enumerate(names) for b in names[i + 1 :]
    }
    # Spearman-Brown: what two whole measurements of the same kind would correlate by, from two halves.
    within = {kind: round(2 * r / (1 + r), 3) for kind, r in ((k, spearman(*pair)) for k, pair in halves.items())}
    pooled = torch.stack(list(scores.values())).mean(0)

    def measure(code: Tensor, before: int) -> Importance:
        if not before:
            return Importance(pooled, macs.entry_macs().double().cpu())
        batches = [noised(samples, alphas_cumprod, seed, again_samples, before) for samples in kinds.values()]
        report = None if progress is None else _bound(progress, f"again, {before} of {len(again)}")
        return measure_importance(gated, [_joined(batches)], macs=macs, code=code, chunk=chunk, progress=report)

    def errors(sizes: Sequence[float]) -> dict[str, dict[str, float]]:
        path = ablate(macs, measure, sizes, alignment=1, tolerance=0.01)
        judged = {kind: noised(samples, alphas_cumprod, seed, len(samples.latents)) for kind, samples in kinds.items()}
        return {
            str(budget): {kind: round(match_error(gated, path.code(budget), batch), 5) for kind, batch in judged.items()}
            for budget in budgets
        }

    once = errors([])
    found = {"between": between, "within": within, "error": once}
    return found | {"error": errors(again), "error_once": once, "importances_at": list(again)} if again else found


def noised(samples: KindSamples, alphas_cumprod: Tensor, seed: int, count: int, before: int = 0) -> ImportanceBatch:
    """Noises the first samples, or those after as many batches of them; every kind gets the same noise and timesteps.

    The timesteps are spread evenly over the schedule.
    """
    at = (before * count + torch.arange(min(count, len(samples.latents)))) % len(samples.latents)
    latents = samples.latents[at]
    generator = keyed_generator(seed, "needs", *([before] if before else []))
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = ((torch.arange(len(latents)) + 0.5) / len(latents) * len(alphas_cumprod)).long()
    return ImportanceBatch(add_noise(alphas_cumprod, latents, noise, timesteps), timesteps, samples.text_states[at])


def _joined(batches: Sequence[ImportanceBatch]) -> ImportanceBatch:
    return ImportanceBatch(
        torch.cat([one.sample for one in batches]),
        torch.cat([one.timesteps for one in batches]),
        torch.cat([one.text_states for one in batches]),
    )


def _part(batch: ImportanceBatch, part: slice) -> ImportanceBatch:
    return ImportanceBatch(batch.sample[part], batch.timesteps[part], batch.text_states[part])


def _bound(progress: Callable[[str, int, int], None], kind: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(kind, done, total)
