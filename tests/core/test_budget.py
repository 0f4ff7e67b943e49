"""One MACs ratio: what the loss sees, the log shows, hardening meets and the pruned UNets measure is the same quantity."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.hardening import HardCodes, harden_codes, start_logits
from aptp_ray.core.macs import MacsModel, count_macs
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.prune_objective import PruneObjective
from aptp_ray.core.relaxation import binarize, gumbel, relax
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.space import ArchitectureSpace
from tests.core.objectives import ALPHAS, randn
from tests.core.tiny import tiny_sd21

LATENT, TOKENS, CODES, Z_DIM = (8, 8), 5, 3, 12
BUDGETS = (0.4, 0.65, 0.85)


@cache
def teacher() -> tuple[GatedUNet, MacsModel]:
    gated = GatedUNet(tiny_sd21())
    return gated, MacsModel.measure(gated.unet, LATENT, TOKENS, gated.space)


def make(budget: float) -> PruneObjective:
    gated, macs = teacher()
    generator = torch.Generator().manual_seed(3)
    importance = torch.rand(gated.space.dim, generator=generator).double() * macs.entry_macs()
    start = start_logits(importance, macs, gated.space, budget=budget, generator=generator)
    router = PromptRouter(gated.space, z_dim=Z_DIM, num_codes=CODES, generator=generator, start_logits=start)
    router.initialise_codes(randn(48, Z_DIM, seed=5), generator=generator)
    return PruneObjective(router, gated, macs, alphas_cumprod=ALPHAS, prediction_type="v_prediction", budget=budget)


def make_step(objective: PruneObjective, rows: int, step: int, noise: Tensor | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    drawn = gumbel((CODES, objective.router.space.dim), generator)
    return {
        "latents": randn(rows, 4, *LATENT, seed=step), "noise": randn(rows, 4, *LATENT, seed=step + 1),
        "timesteps": torch.randint(0, 1000, (rows,), generator=generator),
        "text_states": randn(rows, TOKENS, 24, seed=step + 2), "text_mask": None,
        "z": randn(48, Z_DIM, seed=5)[:rows], "gumbel_noise": drawn if noise is None else noise, "phase": "codes",
    }  # fmt: skip


def logits_of(codes: Tensor, space: ArchitectureSpace) -> Tensor:
    """Logits whose masks without noise are, rounded, the codes; depth closes only from the least protected entry on."""
    logits = torch.where(codes, 6.0, -12.0)
    rank = torch.tensor(space.depth_rank) + space.num_width
    for row, code in zip(logits, codes, strict=True):
        kept = code[rank]  # most protected first
        count = int(kept.sum())
        assert bool(kept[:count].all())
        # openness flips the cumulative softmax: all mass on one entry opens exactly the first `count` ranks.
        row[rank] = -30.0
        row[rank[space.num_depth - count]] = 30.0
    return logits


def counted_ratio(codes: Tensor) -> np.ndarray:
    """Of each code's physically pruned UNet, by the counter."""
    total = count_macs(tiny_sd21(), LATENT, TOKENS)
    return np.array([count_macs(prune_unet(tiny_sd21(), code), LATENT, TOKENS) / total for code in codes])


def hardened(objective: PruneObjective) -> tuple[HardCodes, Tensor]:
    """Codes after a few steps, with the shares that routing gives on prompts of their own."""
    optimizer = torch.optim.Adam(objective.router.parameters(), lr=0.05)
    for step in range(3):
        losses, _ = objective.train()(**make_step(objective, 4, step))
        optimizer.zero_grad()
        (2 * losses["resource"] + 0.2 * losses["distillation"] - losses["spread"]).backward()
        optimizer.step()
    router = objective.router
    router.fit_potentials(randn(48, Z_DIM, seed=5))
    shares = router.assign(randn(40, Z_DIM, seed=8)).expert.bincount(minlength=CODES).double() / 40
    return harden_codes(router.codes, router.space, objective.macs, budget=objective.budget, shares=shares), shares


@pytest.mark.parametrize("budget", BUDGETS)
def test_hardening_meets_the_budget_in_what_the_pruned_unets_measure(budget: float) -> None:
    hard, shares = hardened(make(budget))
    counted = counted_ratio(hard.codes)
    np.testing.assert_allclose(hard.ratios.numpy(), counted, rtol=1e-12)
    assert abs(float(shares.numpy() @ counted) / budget - 1) <= 0.005
    assert hard.macs_ratio == pytest.approx(float(shares.numpy() @ counted), rel=1e-12)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_loss_and_the_log_see_what_the_pruned_unets_measure(budget: float) -> None:
    """One noisy step: hard masks of every code, cut out and counted, weighted by the step's own assignment."""
    objective = make(budget).eval()
    router = objective.router
    batch = make_step(objective, 6, 11)
    with torch.no_grad():
        losses, stats = objective(**batch)
        codes = binarize(relax(router.codes, router.space, noise=batch["gumbel_noise"]), router.space)
    expected = float(np.array(stats["assignment_counts"]) / 6 @ counted_ratio(codes))
    assert stats["macs_ratio"] == pytest.approx(expected, rel=1e-9)
    assert losses["resource"].item() == pytest.approx(abs(np.log(expected / budget)), abs=1e-6)


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_hardened_code_has_the_same_ratio_back_in_the_loss(budget: float) -> None:
    objective = make(budget)
    hard, _ = hardened(objective)
    router = objective.router
    hard_codes = hard.codes.clone()
    logits = logits_of(hard_codes, router.space)
    with torch.no_grad():
        router.codes.copy_(logits)
        losses, stats = objective.eval()(**make_step(objective, 6, 13, noise=torch.zeros(CODES, router.space.dim)))
    expected = float(np.array(stats["assignment_counts"]) / 6 @ counted_ratio(hard_codes))
    assert stats["macs_ratio"] == pytest.approx(expected, rel=1e-9)
    assert losses["resource"].item() == pytest.approx(abs(np.log(expected / budget)), abs=1e-6)
