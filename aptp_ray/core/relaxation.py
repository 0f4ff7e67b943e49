"""Logits to soft masks to hard codes: Gumbel-sigmoid widths, importance-ordered depths, binarization with alignment.

One logit vector holds a code's width logits and depth logits in the layout of its `ArchitectureSpace`. Everything here
works on any leading dimensions: [..., dim].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aptp_ray.core.space import ArchitectureSpace

GUMBEL_MEDIAN = -math.log(math.log(2.0))
"""Median of the standard Gumbel distribution, .3665: `noise=GUMBEL_MEDIAN` is what a noisy mask shows half the time."""

_DEPTH_EPSILON = 1e-6


def gumbel(shape: tuple[int, ...] | torch.Size, generator: torch.Generator) -> Tensor:
    """Standard Gumbel draws, float32 on the generator's device."""
    # -log(E) of a unit exponential E is a standard Gumbel draw.
    exponential = torch.empty(shape, device=generator.device).exponential_(generator=generator)
    return -exponential.log()


def openness(logits: Tensor, space: ArchitectureSpace, *, ordered_depth: bool = True) -> Tensor:
    """Noise-free pre-activations: what `relax` adds offset, noise and base to.

    A width entry's is its logit. A depth entry's comes from the cumulative softmax over all depth entries in rank
    order (APTP, section 3.2): `p = flip(cumsum(softmax(l)))`, `x = log(p + eps) - log(1 - p + eps)`, so that a more
    protected entry is never less open than a less protected one. The most protected has p = 1: without an offset it
    never closes.

    Args:
        logits: [..., dim].
        space: The layout.
        ordered_depth: False: a depth entry's is its logit, too, so that any block may close first.

    Returns:
        [..., dim] in the same layout and dtype.
    """
    space.check(logits)
    width, depth = logits[..., : space.num_width], logits[..., space.num_width :]
    if space.num_depth == 0 or not ordered_depth:
        return logits
    rank = torch.tensor(space.depth_rank, device=logits.device)
    # [..., num_depth] in rank order; accumulating rounding may leave the last sum a hair above 1
    p = depth[..., rank].softmax(dim=-1).cumsum(dim=-1).flip(-1).clamp(max=1.0)
    x = (p + _DEPTH_EPSILON).log() - (1.0 - p + _DEPTH_EPSILON).log()
    return torch.cat([width, x[..., rank.argsort()]], dim=-1)


def relax(
    logits: Tensor,
    space: ArchitectureSpace,
    *,
    noise: Tensor | float | None = None,
    tau: float = 0.4,
    base: float = 3.0,
    offset: Tensor | float = 0.0,
    ordered_depth: bool = True,
) -> Tensor:
    """Soft masks: `sigmoid((openness(logits) + offset + noise + base) / tau)`.

    Args:
        logits: [..., dim].
        space: The layout.
        noise: Gumbel draws that broadcast to [..., dim], a constant such as `GUMBEL_MEDIAN`, or None for none.
        tau: Temperature; smaller is closer to binary.
        base: Added to all entries, so that zero logits start open.
        offset: Added to width logits, and to depths *after* their transform (softmax does not see a shift).
            A number, or a tensor that broadcasts to [..., dim].
        ordered_depth: As in `openness`.

    Returns:
        [..., dim] in (0, 1).

    Raises:
        ValueError: If `tau` is not positive.
    """
    if tau <= 0.0:
        raise ValueError(f"tau={tau} must be positive; .4 is the paper's value")
    x = openness(logits, space, ordered_depth=ordered_depth) + offset + base
    if noise is not None:
        x = x + noise
    return torch.sigmoid(x / tau)


def binarize(soft: Tensor, space: ArchitectureSpace, alignment: int = 1) -> Tensor:
    """Hard code(s) of soft masks: open at .5 and above, never an empty width site, aligned channel counts.

    A width site keeps its most open entries; the first of equals. With `alignment` the number kept is rounded to the
    nearest (half: up) for which kept * channels is a multiple of it, at least one such multiple; a site with no such
    number stays whole. Depth entries are only thresholded.

    Args:
        soft: [..., dim] in [0, 1].
        space: The layout.
        alignment: Channel multiple wanted by the device's kernels (8 on GPUs).

    Returns:
        bool [..., dim].

    Raises:
        ValueError: If `alignment` is not positive or a mask is not a number.
    """
    if alignment < 1:
        raise ValueError(f"alignment={alignment} must be at least 1 (1: none; 8: tensor cores)")
    space.check(soft)
    if bool(soft.isnan().any()):
        raise ValueError("soft masks hold NaN; the logits that made them have probably diverged")
    hard = soft >= 0.5
    for site in space.width_sites:
        values = soft[..., site.slice]
        kept = hard[..., site.slice].sum(dim=-1)
        step = alignment // math.gcd(alignment, site.channels)
        most = site.width // step * step
        # floor(k / step + 1/2) in integers
        nearest = (2 * kept + step) // (2 * step) * step
        count = nearest.clamp(step, most) if most else torch.full_like(kept, site.width)
        rank = values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        hard[..., site.slice] = rank < count[..., None]
    return hard


def straight_through(soft: Tensor, space: ArchitectureSpace, alignment: int = 1) -> Tensor:
    """Hard in the forward pass, the gradient of `soft` in the backward pass: [..., dim], dtype of `soft`."""
    hard = binarize(soft.detach(), space, alignment).to(soft.dtype)
    # The bracket is exactly zero, so the values are exactly 0 and 1.
    return hard + (soft - soft.detach())
