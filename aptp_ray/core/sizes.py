"""How large each code should be: its own prompts' error against MACs, and the sizes that lose least at one mean budget.

Where kinds of prompts need the same entries, the sizes are all that a mixture can tailor. Entries are then kept by importance
per MAC, the strongest rule for one code, and each code gets as many MACs as its prompts make the best use of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aptp_ray.core.ablation import AblationPath
from aptp_ray.core.budget import HardCodes
from aptp_ray.core.gates import GatedUNet
from aptp_ray.core.importance import ImportanceBatch

# Sizes at which errors are measured, as parts of the budget.
_GRID = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)


def sized_codes(
    gated: GatedUNet,
    groups: Sequence[ImportanceBatch],
    *,
    path: AblationPath,
    budget: float,
    shares: Tensor,
) -> HardCodes:
    """One code for each group of prompts: entries by importance per MAC, sizes by water-filling over the group's own errors.

    Where the sizes so found lose no less than equal ones on the groups themselves, all get the code of one.

    Args:
        gated: the teacher.
        groups: K groups of noised prompts, those of each code; the same noise and timesteps in all of them compare best.
        path: codes of all sizes, by importances over all prompts.
        budget: the mean MACs ratio, weighted by share; met as nearly as the path's codes meet their sizes.
        shares: [K] of the prompts.

    Raises:
        ValueError: a budget out of reach.
    """

    def code_of(ratio: float) -> Tensor:
        return path.code(ratio).to(groups[0].sample.device)

    kinds = [str(index) for index in range(len(groups))]
    codes, errors = dict[float, Tensor](), dict[float, dict[str, float]]()
    for size in sorted({min(part * budget, 1.0) for part in _GRID}):
        try:
            codes[size] = code_of(size)
        except ValueError:
            if size == budget:
                raise
            continue  # out of this teacher's reach
        errors[size] = {kind: match_error(gated, codes[size], group) for kind, group in zip(kinds, groups, strict=True)}
    weights = shares.double() / shares.sum()
    found = water_filling(errors, dict(zip(kinds, weights.tolist(), strict=True)), budget)
    sized = [code_of(found["ratios"][kind]) for kind in kinds]
    # Water-filling trusts what lies between the measured sizes; the codes themselves are measured before they are kept.
    lost = sum(
        weight * match_error(gated, code, group) for weight, code, group in zip(weights.tolist(), sized, groups, strict=True)
    )
    kept = torch.stack(sized if lost < found["equal"] else [codes[budget]] * len(groups)).cpu()
    ratios = path.macs.ratio(kept)
    return HardCodes(codes=kept, ratios=ratios, macs_ratio=float(ratios @ weights), offset=0.0, flips=0)


def water_filling(
    errors: dict[float, dict[str, float]], shares: dict[str, float], budget: float
) -> dict[str, Any]:
    """How unequal experts should be if each drew one kind of prompt, and what that gains: least mean error at a mean budget.

    Between measured budgets, log error is taken as linear in the MACs ratio; outside of them nothing is promised. At the optimum
    every kind that is not at an end loses as much error for a MAC as every other (the water level).

    Args:
        errors: {budget: {kind: error}} of one static code at each budget, in any measure that adds up.
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
