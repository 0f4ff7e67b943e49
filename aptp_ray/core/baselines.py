"""Codes that need no learning: what a learned code has to beat at the same budget."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from aptp_ray.core.budget import meet_budget
from aptp_ray.core.hardening import average_rank
from aptp_ray.core.importance import Importance
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.sites import Site
from aptp_ray.core.space import ArchitectureSpace


def ablation_greedy(
    space: ArchitectureSpace,
    macs: MacsModel,
    budget: float,
    *,
    importance: Importance,
    alignment: int = 8,
    tolerance: float = 0.005,
) -> Tensor:
    """Removes entries, whole blocks included, in order of measured importance per MAC, least first.

    The static baseline that counts: pruning by ablation loses an order of magnitude less than pruning by weights.

    Args:
        space: the layout.
        macs: the MACs of its codes.
        budget: wanted MACs ratio.
        importance: from `measure_importance` on the same UNet.
        alignment: channel counts become multiples of this.
        tolerance: largest relative distance from the budget.

    Returns:
        bool [dim].

    Raises:
        ValueError: the budget cannot be met.
    """
    return _open_by(importance.per_mac, space, macs, budget, alignment, tolerance)


def norm_pruning(
    space: ArchitectureSpace,
    macs: MacsModel,
    budget: float,
    *,
    unet: nn.Module,
    alignment: int = 8,
    tolerance: float = 0.005,
) -> Tensor:
    """Removes the width entries of smallest weights (root mean square, relative to their site's mean).

    Blocks stay: the size of a block's weights says nothing about what the block is worth beside its shortcut.

    Args:
        space: the layout.
        macs: the MACs of its codes.
        budget: wanted MACs ratio.
        unet: the teacher whose weights are read.
        alignment: channel counts become multiples of this.
        tolerance: largest relative distance from the budget.

    Returns:
        bool [dim].

    Raises:
        ValueError: the budget cannot be met without removing blocks.
    """
    scores = torch.full((space.dim,), torch.inf, dtype=torch.float64)
    for site in space.width_sites:
        squares, count = _squared_weights(unet.get_submodule(site.name), site)
        size = (squares / count).sqrt()
        # Sites differ in scale by initialisation and fan-in alone; only differences within a site mean anything.
        scores[site.slice] = size / size.mean().clamp_min(1e-12)
    return _open_by(scores, space, macs, budget, alignment, tolerance)


def random_pruning(
    space: ArchitectureSpace,
    macs: MacsModel,
    budget: float,
    *,
    generator: torch.Generator,
    blocks: bool = False,
    alignment: int = 8,
    tolerance: float = 0.005,
) -> Tensor:
    """Removes entries in random order.

    Args:
        space: the layout.
        macs: the MACs of its codes.
        budget: wanted MACs ratio.
        generator: CPU generator of the order.
        blocks: whether whole blocks take part; else only width entries close.
        alignment: channel counts become multiples of this.
        tolerance: largest relative distance from the budget.

    Returns:
        bool [dim].

    Raises:
        ValueError: the budget cannot be met.
    """
    scores = torch.rand(space.dim, generator=generator, dtype=torch.float64)
    if not blocks:
        scores[space.num_width :] = torch.inf
    return _open_by(scores, space, macs, budget, alignment, tolerance)


def bk_sdm_blocks(space: ArchitectureSpace, variant: Literal["base", "small"] = "base") -> Tensor:
    """The blocks that BK-SDM removes (Kim et al., arXiv 2305.15798, section 3), as near as our sites can say it.

    BK-SDM-Base drops the second resnet-attention pair of every down block and the middle pair of every up block; Small
    drops the mid block as well. Our depth sites are the *last* resnet and transformer of a block: that is the second
    pair in a down block exactly, and in an up block the third pair in place of the second, so that the remaining
    resnets read other skip connections than BK-SDM's. The mid block is no depth site: Small closes all its width
    entries but one a site (its norms, projections and shortcuts remain). BK-SDM has no budget: the size of these codes
    is what it is.

    Args:
        space: the layout of a UNet whose depth sites are whole modules.
        variant: "base" or "small".

    Returns:
        bool [dim].

    Raises:
        ValueError: an unknown variant, a transformer, or depth sites that are single layers.
    """
    if variant not in ("base", "small"):
        raise ValueError(f"unknown BK-SDM variant {variant!r}; one of 'base', 'small'")
    if any("transformer_blocks." in site.name for site in space.depth_sites):
        raise ValueError("BK-SDM removes whole modules of a UNet: name a UNet teacher and router.depth=modules")
    code = space.full_code()
    code[space.num_width :] = False
    if variant == "small":
        for site in space.width_sites:
            if site.name.startswith("mid_block."):
                code[site.start + 1 : site.start + site.width] = False
    return code


def _open_by(
    scores: Tensor, space: ArchitectureSpace, macs: MacsModel, budget: float, alignment: int, tolerance: float
) -> Tensor:
    """Keeps the entries of highest score; those of infinite score always."""
    if scores.shape != (space.dim,) or scores.isnan().any():
        raise ValueError(f"scores must be [{space.dim}] numbers, got shape {list(scores.shape)}, or some are NaN")
    # Ranks: the budget search works on distances, and scores span orders of magnitude.
    x = torch.where(scores.isinf(), scores, average_rank(scores) / space.dim).unsqueeze(0)
    return meet_budget(x, space, macs, budget=budget, alignment=alignment, tolerance=tolerance).codes[0]


def _squared_weights(module: Any, site: Site) -> tuple[Tensor, int]:
    """Sum of squares [width] of the weights that go with each entry of a width site, and how many they are."""
    if site.kind == "resnet":
        into, out = [module.conv1.weight], module.conv2.weight
    elif site.kind == "attention":
        into, out = [module.to_q.weight, module.to_k.weight, module.to_v.weight], module.to_out[0].weight
    else:
        # A gated unit's projection holds values and gates, one half each.
        projection = module.net[0].proj.weight
        into, out = list(projection.split(site.width * site.channels)), module.net[2].weight
    # An entry's channels are rows of what leads into it and columns of what leads out.
    parts = [weight.detach().double().cpu().flatten(1).pow(2).sum(dim=1) for weight in into]
    parts.append(out.detach().double().cpu().pow(2).transpose(0, 1).flatten(1).sum(dim=1))
    squares = torch.stack(parts).sum(dim=0).reshape(site.width, site.channels).sum(dim=1)
    count = (sum(weight.numel() for weight in into) + out.numel()) // site.width
    return squares, count
