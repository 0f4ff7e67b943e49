"""Do kinds of prompts differ in what they need of the model? Measured on the teacher, before anything is pruned.

Two ways in which they can: other entries matter (rank correlation of importances between kinds, against the correlation of
two halves of one kind, which is what sampling noise alone leaves), or the same MACs buy more quality for one kind than for
another (the teacher-match error of one and the same static code, by kind, over budgets).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aptp_ray.core.baselines import ablation_greedy
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.importance import Importance, ImportanceBatch, measure_importance, spearman
from aptp_ray.core.losses import add_noise
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.randomness import keyed_generator

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
        budgets: at which the static codes are compared.
        seed: of noise.
        chunk: rows to a forward pass.
        progress: (kind, rows done, rows) during importances.

    Returns:
        ``between``: {"a | b": rank correlation}, ``within``: {kind: rank correlation of its halves, corrected to full length},
        ``error``: {budget: {kind: error over the power of the teacher's output}}, all rounded.
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
    pooled = Importance(torch.stack(list(scores.values())).mean(0), macs.entry_macs().double().cpu())
    error = {}
    for budget in budgets:
        code = ablation_greedy(gated.space, macs, budget, importance=pooled, alignment=1, tolerance=0.01)
        error[str(budget)] = {
            kind: round(match_error(gated, code, noised(samples, alphas_cumprod, seed, len(samples.latents))), 5)
            for kind, samples in kinds.items()
        }
    return {"between": between, "within": within, "error": error}


def noised(samples: KindSamples, alphas_cumprod: Tensor, seed: int, count: int) -> ImportanceBatch:
    """Noises samples; every kind gets the same noise and the same timesteps, spread evenly over the schedule."""
    latents = samples.latents[:count]
    generator = keyed_generator(seed, "needs")
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = ((torch.arange(len(latents)) + 0.5) / len(latents) * len(alphas_cumprod)).long()
    return ImportanceBatch(add_noise(alphas_cumprod, latents, noise, timesteps), timesteps, samples.text_states[:count])


def water_filling(
    errors: dict[float, dict[str, float]], shares: dict[str, float], budget: float
) -> dict[str, Any]:
    """How unequal experts should be if each drew one kind of prompt, and what that gains: least mean error at a mean budget.

    Between measured budgets, log error is taken as linear in the MACs ratio; outside of them nothing is promised. At the optimum
    every kind that is not at an end loses as much error for a MAC as every other (the water level).

    Args:
        errors: {budget: {kind: error}} of one static code at each budget, as :func:`measure_needs` finds them.
        shares: {kind: share of the prompts}; adds up to one.
        budget: the mean MACs ratio, weighted by share.

    Returns:
        ``ratios`` {kind: MACs ratio}, ``equal`` the mean error with all kinds at the budget, ``unequal`` with these ratios.

    Raises:
        ValueError: if the budget lies outside of the measured ones.
    """
    from scipy.optimize import minimize

    measured = sorted(errors)
    if not measured[0] <= budget <= measured[-1]:
        raise ValueError(f"budget {budget} lies outside of the measured ones, {measured[0]} to {measured[-1]}")
    kinds = list(shares)
    weight = np.array([shares[kind] for kind in kinds])
    logs = np.log([[max(errors[at][kind], 1e-12) for at in measured] for kind in kinds])  # [kinds, budgets]

    def mean_error(ratios: np.ndarray) -> float:
        return float(weight @ [np.exp(np.interp(ratio, measured, log)) for ratio, log in zip(ratios, logs, strict=True)])

    equal = mean_error(np.full(len(kinds), budget))
    # Relative to equal sizes, or the errors are too small for the optimizer's tolerance.
    found = minimize(
        lambda ratios: mean_error(ratios) / equal,
        np.full(len(kinds), budget),
        method="SLSQP",
        bounds=[(measured[0], measured[-1])] * len(kinds),
        constraints={"type": "eq", "fun": lambda ratios: weight @ ratios - budget},
    )
    return {
        "ratios": {kind: round(float(ratio), 4) for kind, ratio in zip(kinds, found.x, strict=True)},
        "equal": equal,
        "unequal": mean_error(found.x),
    }


@torch.no_grad()
def match_error(gated: GatedUNet, code: Tensor, batch: ImportanceBatch) -> float:
    """Mean squared error between the outputs with a code and without, over the power of the output without."""
    inputs = (batch.sample, batch.timesteps, batch.text_states)
    expected = gated(*inputs).sample
    with gated.use(code.unsqueeze(0).expand(len(batch.sample), -1)):
        found = gated(*inputs).sample
    return float((found - expected).square().mean() / expected.square().mean())


def _part(batch: ImportanceBatch, part: slice) -> ImportanceBatch:
    return ImportanceBatch(batch.sample[part], batch.timesteps[part], batch.text_states[part])


def _bound(progress: Callable[[str, int, int], None], kind: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(kind, done, total)
