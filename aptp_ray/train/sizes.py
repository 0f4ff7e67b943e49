"""Hardening by measurement: entries by importance, and how large each code should be by what its own prompts lose."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from aptp_ray.core.ablation import AblationPath
from aptp_ray.core.budget import HardCodes
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.router import PromptRouter
from aptp_ray.core.sizes import sized_codes
from aptp_ray.train.draws import noised_batch
from aptp_ray.train.worker import Worker

# Training prompts that are read for it, over all codes, and how many of one code are measured.
ROWS, ROWS_PER_CODE = 1024, 64


def same_code(router: PromptRouter, path: AblationPath, budget: float) -> HardCodes:
    """Gives all of the router's codes the entries that a code of the whole budget keeps, and sets its hard codes.

    Args:
        router: as it has been trained.
        path: codes of all sizes.
        budget: their MACs ratio.

    Raises:
        ValueError: if the budget is out of reach.
    """
    codes = path.code(budget).cpu().expand(router.num_codes, -1).contiguous()
    router.set_hard_codes(codes)
    ratios = path.macs.ratio(codes)
    return HardCodes(codes=codes, ratios=ratios, macs_ratio=float(ratios[0]), offset=0.0, flips=0)


def measured_codes(
    worker: Worker,
    router: PromptRouter,
    gated: GatedUNet,
    path: AblationPath,
    *,
    rows: dict[str, Any],
    shares: Tensor,
    alphas: Tensor,
) -> HardCodes:
    """Makes a code for each group of prompts that the router forms, and sets the router's hard codes.

    Args:
        worker: whose config says the budget.
        router: as it has been trained.
        gated: the teacher.
        path: codes of all sizes.
        rows: decoded training rows with embeddings.
        shares: [K] of held-out prompts.
        alphas: [train timesteps].

    Raises:
        ValueError: if a code gets none of the rows, or the budget is out of reach.
    """
    config, device = worker.config, worker.place.device
    expert = router.assign(torch.from_numpy(rows["embedding"])).expert
    groups = []
    for code in range(router.num_codes):
        mine = (expert == code).nonzero().flatten()[:ROWS_PER_CODE]
        if len(mine) < 2:
            raise ValueError(
                f"code {code} gets {len(mine)} of {len(expert)} prompts, too few to measure what it needs: lower router.experts, "
                "or use prune.hardening=masks"
            )
        # The same noise and timesteps for each code: what differs are the prompts.
        part = {name: rows[name][mine.numpy()] for name in ("mean", "text_states")}
        groups.append(noised_batch(part, config.prune.loop.seed, alphas, slice(0, None), device))
    hard = sized_codes(gated, groups, path=path, budget=config.prune.budget, shares=shares)
    router.set_hard_codes(hard.codes)
    sizes = ", ".join(f"{ratio:.3f}" for ratio in hard.ratios.tolist())
    print(f"[{worker.name}] sizes by measured need: {sizes}", file=sys.stderr, flush=True)
    return hard
