"""Both ends of a code's life: the logits it starts from, and the binary code that it becomes within the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aptp_ray.core.macs import MacsModel
from aptp_ray.core.relaxation import GUMBEL_MEDIAN, binarize, gumbel, openness, relax
from aptp_ray.core.sites import Site
from aptp_ray.core.space import ArchitectureSpace

# Least softmax mass of a depth entry at the start: below it the cumulative softmax passes no gradient.
_LEAST_DEPTH_MASS = 1e-3


@dataclass(frozen=True)
class HardCodes:
    """Binary codes whose weighted mean of MACs meets the budget.

    Attributes:
        codes: bool [K, dim].
        ratios: float64 [K], each code's MACs over the teacher's.
        macs_ratio: the mean of `ratios` under the shares.
        offset: what was added to all pre-activations to come near the budget.
        flips: how many single flips brought it within the tolerance.
    """

    codes: Tensor
    ratios: Tensor
    macs_ratio: float
    offset: float
    flips: int


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

    Raises:
        ValueError: the budget is out of reach, or no combination of entries comes near enough.
    """
    x = openness(logits.detach().double().cpu(), space) + base + GUMBEL_MEDIAN
    return meet_budget(
        x, space, macs, budget=budget, shares=shares, alignment=alignment, tolerance=tolerance
    )


def meet_budget(
    x: Tensor,
    space: ArchitectureSpace,
    macs: MacsModel,
    *,
    budget: float,
    shares: Tensor | None = None,
    alignment: int = 1,
    tolerance: float = 0.005,
) -> HardCodes:
    """Opens the entries of largest `x` until the weighted mean of MACs meets the budget.

    First one offset for everything, by bisection (the mean never falls as the offset grows); then single flips, in
    aligned steps, of the entries nearest to the threshold.

    Args:
        x: float64 [K, dim], how open each entry is; only order and distances matter. Infinities are allowed.
        space: the layout.
        macs: the MACs of its codes.
        budget: wanted mean MACs ratio.
        shares: [K] weights of the mean; uniform by default.
        alignment: as in `binarize`.
        tolerance: largest relative distance of the mean from the budget.

    Raises:
        ValueError: NaN, shares that do not fit, or a budget that cannot be met; names the reachable range.
    """
    x = x.detach().double().cpu()
    if x.isnan().any():
        raise ValueError("the code logits hold NaN; the prune stage has diverged (lower its learning rates)")
    weights = _weights(shares, len(x))

    def harden(offset: float) -> tuple[Tensor, float]:
        codes = _threshold(x + offset, space, alignment)
        return codes, float(macs.ratio(codes) @ weights)

    finite = x[x.isfinite()]
    reach = float(finite.abs().max()) + 1.0 if finite.numel() else 1.0
    low, high = -reach, reach
    floor, ceiling = harden(low)[1], harden(high)[1]
    if not floor * (1 - tolerance) <= budget <= ceiling * (1 + tolerance):
        raise ValueError(
            f"budget {budget} is out of reach: with alignment {alignment} the mean MACs ratio lies between the floor "
            f"{floor:.4f} (what cannot be pruned, and one step of every site) and {ceiling:.4f}; change the budget"
            + (", or lower the alignment" if alignment > 1 else "")
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if harden(middle)[1] <= budget else (low, middle)
    offset = min(low, high, key=lambda value: abs(harden(value)[1] - budget))
    codes, _ = harden(offset)
    codes, flips = _flip_to_budget(codes, x + offset, space, macs, weights, budget, alignment, tolerance)
    ratios = macs.ratio(codes)
    mean = float(ratios @ weights)
    if abs(mean / budget - 1) > tolerance:
        raise ValueError(
            f"the nearest mean MACs ratio to budget {budget} is {mean:.4f}, not within {tolerance:.2%} of it: "
            f"single entries at alignment {alignment} are too coarse; raise the tolerance or lower the alignment"
        )
    return HardCodes(codes=codes, ratios=ratios, macs_ratio=mean, offset=offset, flips=flips)


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
) -> Tensor:
    """Logits of a code that starts at the budget, with what is worth its MACs most open.

    Importance per MAC spans orders of magnitude and may be slightly negative, so its *rank* over all entries is spread
    evenly over +-`spread`: masks then start neither saturated nor alike. Depth logits are those whose cumulative
    softmax gives, in the protected order, the non-increasing sequence nearest to their ranks.

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
        depth = _depth_logits(ranks[space.num_width :] + offset, space)
        return torch.cat([ranks[: space.num_width] + offset, depth])

    def mean_at(offset: float) -> float:
        soft = relax(logits_at(offset), space, noise=noise, tau=tau, base=base)
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


def _weights(shares: Tensor | None, num_codes: int) -> Tensor:
    if shares is None:
        return torch.full((num_codes,), 1 / num_codes, dtype=torch.float64)
    weights = shares.detach().double().cpu()
    if weights.shape != (num_codes,) or not weights.isfinite().all() or (weights < 0).any() or not weights.sum() > 0:
        raise ValueError(f"shares must be {num_codes} non-negative numbers with a positive sum, got {weights.tolist()}")
    return weights / weights.sum()


def _threshold(x: Tensor, space: ArchitectureSpace, alignment: int) -> Tensor:
    """Hard codes of pre-activations: x >= 0, through `binarize`."""
    # Softsign, not sigmoid: it keeps the order of strongly open entries where sigmoid rounds them all to 1.
    squashed = torch.where(x.isinf(), x.sign(), x / (1 + x.abs()))
    return binarize(0.5 + 0.5 * squashed, space, alignment)


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


def _flip_to_budget(
    codes: Tensor,
    x: Tensor,
    space: ArchitectureSpace,
    macs: MacsModel,
    weights: Tensor,
    budget: float,
    alignment: int,
    tolerance: float,
) -> tuple[Tensor, int]:
    """Flips the entries nearest to the threshold, one step at a time, until the mean is within the tolerance."""
    codes, flips = codes.clone(), 0
    error = float(macs.ratio(codes) @ weights) - budget
    while abs(error) > tolerance * budget:
        found = _best_flip(codes, x, space, macs, weights, error, alignment, tolerance * budget)
        if found is None:
            break
        k, flipped = found
        codes[k] = flipped
        flips += 1
        error = float(macs.ratio(codes) @ weights) - budget
    return codes, flips


def _best_flip(
    codes: Tensor,
    x: Tensor,
    space: ArchitectureSpace,
    macs: MacsModel,
    weights: Tensor,
    error: float,
    alignment: int,
    allowed: float,
) -> tuple[int, Tensor] | None:
    """The flip nearest to the threshold that brings the mean nearer: (code, its new row), or None if none does.

    Flips that would overshoot by more than `allowed` come last: no block is dropped while heads would do. Entries of
    infinite `x` are not flipped.
    """
    candidates: list[tuple[float, int, Tensor]] = []
    for k in range(len(codes)):
        if weights[k] > 0:
            for site in space.sites:
                step = _step(codes[k], x[k], site, alignment, opening=error < 0)
                if step is not None and x[k, step].isfinite().all():
                    flipped = codes[k].clone()
                    flipped[step] ^= True
                    candidates.append((float(x[k, step].abs().mean()), k, flipped))
    if not candidates:
        return None
    rows = torch.tensor([k for _, k, _ in candidates])
    change = weights[rows] * (macs.ratio(torch.stack([code for *_, code in candidates])) - macs.ratio(codes)[rows])
    keys = []
    for position, ((margin, _, _), delta) in enumerate(zip(candidates, change.tolist(), strict=True)):
        after = error + delta
        if abs(after) < abs(error) * (1 - 1e-9):
            overshoots = after * error < 0 and abs(after) > allowed
            keys.append((overshoots, margin, position))
    if not keys:
        return None
    _, k, flipped = candidates[min(keys)[2]]
    return k, flipped


def _step(code: Tensor, x: Tensor, site: Site, alignment: int, *, opening: bool) -> Tensor | None:
    """Entries [n] of one aligned step of a site: the most open closed ones, or the least open kept ones."""
    entries = torch.arange(site.start, site.start + site.width)
    kept = code[entries]
    pool = entries[~kept] if opening else entries[kept]
    if site.kind == "depth":
        return pool if len(pool) else None
    size = alignment // math.gcd(alignment, site.channels)
    whole = site.width // size * size
    count = int(kept.sum())
    if whole == 0 or (count + size > whole if opening else count - size < size):
        return None
    order = x[pool].argsort(descending=opening, stable=True)
    return pool[order[:size]]
