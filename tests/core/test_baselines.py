from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from aptp_ray.core.baselines import ablation_greedy, bk_sdm_blocks, norm_pruning, random_pruning
from aptp_ray.core.importance import Importance
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.prune import prune_unet
from aptp_ray.core.space import ArchitectureSpace
from tests.core.tiny import inputs_for, tiny_pixart, tiny_sd21, tiny_sdxl

UNET = tiny_sd21()
SPACE = ArchitectureSpace.of(UNET)
MACS = MacsModel.measure(UNET, (16, 16), 5, SPACE)


def some_importance(seed: int = 0) -> Importance:
    score = torch.rand(SPACE.dim, generator=torch.Generator().manual_seed(seed)).double() * MACS.entry_macs()
    return Importance(score, MACS.entry_macs())


BASELINES: dict[str, Callable[..., Tensor]] = {
    "ablation": lambda budget, **kw: ablation_greedy(SPACE, MACS, budget, importance=some_importance(), **kw),
    "norm": lambda budget, **kw: norm_pruning(SPACE, MACS, budget, unet=UNET, **kw),
    "random": lambda budget, **kw: random_pruning(
        SPACE, MACS, budget, generator=torch.Generator().manual_seed(0), **kw
    ),
    "random with blocks": lambda budget, **kw: random_pruning(
        SPACE, MACS, budget, generator=torch.Generator().manual_seed(0), blocks=True, **kw
    ),
}


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("budget", [0.6, 0.75, 0.9])
@pytest.mark.parametrize("name", BASELINES)
def test_budget_and_alignment_are_met(name: str, budget: float, alignment: int) -> None:
    code = BASELINES[name](budget, alignment=alignment)
    assert abs(MACS.exact(code) / MACS.total / budget - 1) <= 0.005
    for site in SPACE.width_sites:
        assert int(code[site.slice].sum()) * site.channels % alignment == 0


def test_ablation_removes_the_least_important_per_mac_first() -> None:
    importance = some_importance()
    code = ablation_greedy(SPACE, MACS, 0.7, importance=importance, alignment=1)
    free = torch.ones(SPACE.dim, dtype=torch.bool)
    for site in SPACE.width_sites:
        if int(code[site.slice].sum()) == 1:  # its last entry has to stay whatever it is worth
            free[site.slice] = False
    removed, kept = importance.per_mac[free & ~code], importance.per_mac[free & code]
    assert not code[SPACE.num_width :].all() and code[SPACE.num_width :].any()
    # Up to a few flips at the end, a single threshold separates them.
    assert removed.quantile(0.98) <= kept.quantile(0.02)


def test_norm_pruning_removes_entries_whose_weights_were_made_small() -> None:
    unet = tiny_sd21()
    resnet = next(s for s in SPACE.width_sites if s.kind == "resnet" and s.width > 2)
    heads = next(s for s in SPACE.width_sites if s.kind == "attention" and s.width > 2)
    chunks = next(s for s in SPACE.width_sites if s.kind == "feed_forward")
    with torch.no_grad():
        module = unet.get_submodule(resnet.name)
        module.conv1.weight[resnet.channels : 2 * resnet.channels] *= 1e-3
        module.conv2.weight[:, resnet.channels : 2 * resnet.channels] *= 1e-3
        module = unet.get_submodule(heads.name)
        for projection in (module.to_q, module.to_k, module.to_v):
            projection.weight[heads.channels : 2 * heads.channels] *= 1e-3
        module.to_out[0].weight[:, heads.channels : 2 * heads.channels] *= 1e-3
        module = unet.get_submodule(chunks.name)
        inner = chunks.width * chunks.channels
        module.net[0].proj.weight[5 * chunks.channels : 6 * chunks.channels] *= 1e-3  # values
        module.net[0].proj.weight[inner + 5 * chunks.channels : inner + 6 * chunks.channels] *= 1e-3  # gates
        module.net[2].weight[:, 5 * chunks.channels : 6 * chunks.channels] *= 1e-3
    small = [resnet.start + 1, heads.start + 1, chunks.start + 5]
    code = norm_pruning(SPACE, MACS, 0.99, unet=unet, alignment=1)
    assert not code[small].any() and int((~code).sum()) < 60
    assert norm_pruning(SPACE, MACS, 0.99, unet=UNET, alignment=1)[small].any()
    assert code[SPACE.num_width :].all()


def test_random_pruning_depends_on_the_generator_only() -> None:
    codes = [
        random_pruning(SPACE, MACS, 0.7, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])
    assert codes[0][SPACE.num_width :].all()


@pytest.mark.parametrize("make", [tiny_sd21, tiny_sdxl])
def test_bk_sdm_removes_blocks_and_leaves_a_unet_that_runs(make: Callable[[], torch.nn.Module]) -> None:
    unet = make()
    space = ArchitectureSpace.of(unet)
    macs = MacsModel.measure(unet, (8, 8), 5, space)
    base, small = bk_sdm_blocks(space, "base"), bk_sdm_blocks(space, "small")
    assert base[: space.num_width].all() and not base[space.num_width :].any()
    assert macs.floor < macs.exact(small) < macs.exact(base) < macs.total
    removed = (base & ~small).nonzero().flatten().tolist()
    assert removed and all(space.sites[int(space.site_of_entry[e])].name.startswith("mid_block.") for e in removed)
    pruned = prune_unet(unet, small)
    assert pruned(**inputs_for(unet, batch=1, size=8)).sample.isfinite().all()
    with pytest.raises(ValueError, match="tiny"):
        bk_sdm_blocks(space, "tiny")  # type: ignore[arg-type]


def test_bk_sdm_is_for_unets_cut_by_modules() -> None:
    for space in (ArchitectureSpace.of(tiny_sdxl(), depth="layers"), ArchitectureSpace.of(tiny_pixart())):
        with pytest.raises(ValueError, match="router.depth=modules"):
            bk_sdm_blocks(space)


def test_budget_out_of_reach_without_removing_blocks() -> None:
    with pytest.raises(ValueError, match="out of reach"):
        norm_pruning(SPACE, MACS, 0.24, unet=UNET, alignment=1)
