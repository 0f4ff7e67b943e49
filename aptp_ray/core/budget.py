"""Binary codes that meet a MACs budget: one threshold for all entries, then single flips of those nearest to it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aptp_ray.core.macs import MacsModel
from aptp_ray.core.relaxation import binarize
from aptp_ray.core.sites import Site
from aptp_ray.core.space import ArchitectureSpace


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
