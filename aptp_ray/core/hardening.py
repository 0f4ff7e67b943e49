"""Both ends of a code's life: the logits it starts from, and the binary code that it becomes within the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from aptp_ray.core.budget import HardCodes, meet_budget
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.relaxation import GUMBEL_MEDIAN, binarize, gumbel, openness, relax
from aptp_ray.core.space import ArchitectureSpace

# Least softmax mass of a depth entry at the start: below it the cumulative softmax passes no gradient.
_LEAST_DEPTH_MASS = 1e-3


def harden_codes(
    logits: Tensor,
    space: ArchitectureSpace,
    macs: MacsModel,
    *,
    budget: float,
    shares: Tensor | None = None,
    alignment: int = 8,
    tolerance: float = 0.005,
    base: float = 3.0,
    ordered_depth: bool = True,
) -> HardCodes:
    """Makes codes binary by their noise-free masks at the Gumbel's median, within the budget.

    An entry is open if half of its noisy masks would be. The temperature plays no part: it moves no mask across 0.5.

    Args:
        logits: [K, dim], a router's `codes`.
        space: the layout.
        macs: the MACs of its codes.
        budget: wanted mean of MACs over the teacher's.
        shares: [K] of prompts that each code really gets; uniform by default.
        alignment: channel counts become multiples of this (8 suits tensor cores).
        tolerance: largest relative distance of the mean from the budget.
        base: the relaxation's base.
        ordered_depth: as in `openness`.

    Raises:
        ValueError: the budget is out of reach, or no combination of entries comes near enough.
    """
    x = openness(logits.detach().double().cpu(), space, ordered_depth=ordered_depth) + base + GUMBEL_MEDIAN
    return meet_budget(
        x, space, macs, budget=budget, shares=shares, alignment=alignment, tolerance=tolerance
    )


def start_logits(
    importance: Tensor,
    macs: MacsModel,
    space: ArchitectureSpace,
    *,
    budget: float,
    generator: torch.Generator,
    tau: float = 0.4,
    base: float = 3.0,
    spread: float = 1.5,
    draws: int = 256,
    ordered_depth: bool = True,
) -> Tensor:
    """Logits of a code that starts at the budget, with what is worth its MACs most open.

    Importance per MAC spans orders of magnitude and may be slightly negative, so its *rank* over all entries is spread
    evenly over +-`spread`: masks then start neither saturated nor alike. Depth logits are those whose cumulative
    softmax gives, in the protected order, the non-increasing sequence nearest to their ranks; or the ranks themselves.

    Args:
        importance: [dim], the rise of the error when an entry closes.
        macs: the MACs of codes.
        space: the layout.
        budget: mean MACs ratio of the noisy hard masks at the start, met within 1 %.
        generator: CPU generator of the noise that the mean is taken over.
        tau: the relaxation's temperature.
        base: the relaxation's base.
        spread: half the range of the ranks.
        draws: noisy codes that the mean is taken over.
        ordered_depth: as in `openness`.

    Returns:
        float32 [dim].

    Raises:
        ValueError: importance of the wrong shape or not finite; a budget out of reach.
    """
    if importance.shape != (space.dim,) or not importance.isfinite().all():
        raise ValueError(f"importance must be [{space.dim}] finite numbers, got shape {list(importance.shape)}")
    per_mac = importance.detach().double().cpu() / macs.entry_macs().double().cpu().clamp_min(1)
    ranks = spread * (2 * average_rank(per_mac) / max(space.dim - 1, 1) - 1)  # [dim] in +-spread
    noise = gumbel((draws, space.dim), generator).double()

    def logits_at(offset: float) -> Tensor:
        if not ordered_depth:
            return ranks + offset
        depth = _depth_logits(ranks[space.num_width :] + offset, space)
        return torch.cat([ranks[: space.num_width] + offset, depth])

    def mean_at(offset: float) -> float:
        soft = relax(logits_at(offset), space, noise=noise, tau=tau, base=base, ordered_depth=ordered_depth)
        return float(macs.ratio(binarize(soft, space)).mean())

    low, high = -base - spread - 12.0, spread + 12.0
    floor, ceiling = mean_at(low), mean_at(high)
    if not floor <= budget <= ceiling:
        raise ValueError(f"budget {budget} is out of reach of a start: noisy codes have {floor:.4f} to {ceiling:.4f}")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_at(middle) <= budget else (low, middle)
    mean = mean_at(low)
    if abs(mean / budget - 1) > 0.01:
        raise ValueError(f"the start's mean MACs ratio is {mean:.4f}, not {budget}; raise draws (now {draws})")
    return logits_at(low).float()


def average_rank(values: Tensor) -> Tensor:
    """Ranks 0..n-1 of a vector [n] as float64; equal values share the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double() - 1
    return (last - (counts - 1) / 2)[inverse]


def _depth_logits(x: Tensor, space: ArchitectureSpace) -> Tensor:
    """Depth logits [num_depth] whose `openness` is as near to `x` as the protected order allows.

    The order makes openness non-increasing from the most protected entry on, which always has p = 1.
    """
    if space.num_depth == 0:
        return x
    rank = torch.tensor(space.depth_rank)
    p = torch.sigmoid(_non_increasing(x[rank]))
    following = torch.cat([p[1:], p.new_zeros(1)])
    p = torch.cat([p.new_ones(1), p[1:]])
    mass = (p - following).clamp_min(_LEAST_DEPTH_MASS)  # the softmax in rank order, least protected last
    # openness accumulates the softmax from the front and flips it: the first logit belongs to the last rank.
    log_mass = (mass / mass.sum()).log().flip(0)
    logits = torch.empty_like(log_mass)
    logits[rank] = log_mass
    return logits - logits.mean()


def _non_increasing(values: Tensor) -> Tensor:
    """The non-increasing sequence nearest to `values` in least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        mean, count = value, 1
        while pools and pools[-1][0] < mean:
            left, size = pools.pop()
            mean, count = (left * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return torch.tensor([mean for mean, count in pools for _ in range(count)], dtype=values.dtype)
