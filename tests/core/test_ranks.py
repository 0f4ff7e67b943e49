"""Ranks that each hold a part of a batch compute what one process computes on the joined batch: losses and gradients.

Under DistributedDataParallel a gradient is the *mean* over ranks of each rank's own. `prune_losses` fits that in two ways:
`denoising`, `distillation` and `block` are means over a rank's own rows, so that the mean over (equally large) ranks is the
mean over all rows (of 8 rows, 3 ranks hold 2, 3 and 3, and a rank's losses count by its part); the losses that compare
prompts are computed on the joined batch by every rank alike, and `gather_rows`
hands each row's owner the sum of what all ranks found, world size times the gradient, which the mean makes right again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from aptp_ray.core.losses import PRUNE_LOSSES, weighted_sum
from tests.core.objectives import WEIGHTS, make_batch, make_objective

ROWS = 8
OWN_ROWS = ("denoising", "distillation", "block")
# A weight of 1 for a loss whose own would hide its gradient among the others'.
ALONE = [{name: float(name == only) for name in PRUNE_LOSSES} for only in PRUNE_LOSSES]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("warmup", {}),
    ("codes", {}),
    ("codes", {"noise_per": "sample"}),
    ("codes", {"unet_masks": "hard", "contrastive_form": "binary"}),
]


def step(case: tuple[str, dict[str, Any]], rank: int | None, world: int) -> dict[str, Any]:
    """Losses, statistics and gradients of one step on all rows (rank None) or on a rank's part of them."""
    phase, options = case
    objective = make_objective(**options).train()
    batch = make_batch(objective, rows=ROWS, phase=phase)
    module: torch.nn.Module = objective
    if rank is not None:
        per_row = phase == "warmup" or objective.noise_per == "sample"
        mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
        for name, value in batch.items():
            if isinstance(value, Tensor) and (name != "gumbel_noise" or per_row):
                batch[name] = value[mine]
        module = torch.nn.parallel.DistributedDataParallel(objective)
    share = len(batch["z"]) * world / ROWS
    losses, stats = module(**batch)
    found: dict[str, Any] = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
    (share * weighted_sum(losses, WEIGHTS)).backward()
    found["share"] = torch.tensor(share)
    router = objective.router
    found |= {f"gradient/{name}": p.grad for name, p in router.named_parameters() if p.grad is not None}
    found |= {"mean_embedding": router.mean_embedding, "potentials": router.potentials, "shares": objective.shares}
    found |= {f"stat/{name}": torch.tensor(stats[name]) for name in ("macs_ratio", "macs_ratio_std")}
    if phase == "codes":
        found["stat/counts"] = torch.tensor(stats["assignment_counts"])
    return found


def single_losses(rank: int | None, world: int) -> dict[str, Tensor]:
    """The gradient of the codes (or, for what moves none, of the predictor's last layer) by each loss alone."""
    found = {}
    for weights in ALONE:
        objective = make_objective().train()
        batch = make_batch(objective, rows=ROWS)
        module: torch.nn.Module = objective
        if rank is not None:
            mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
            batch |= {k: v[mine] for k, v in batch.items() if isinstance(v, Tensor) and k != "gumbel_noise"}
            module = torch.nn.parallel.DistributedDataParallel(objective)
        losses, _ = module(**batch)
        # DDP waits for every parameter; a zero of each keeps the others out of the sum.
        zero = sum(0 * p.sum() for p in objective.router.parameters())
        share = len(batch["z"]) * world / ROWS
        (share * weighted_sum(losses, weights) + zero).backward()
        name = next(n for n, w in weights.items() if w)
        codes, last = objective.router.codes.grad, objective.router.predictor[3].weight.grad
        assert codes is not None and last is not None
        found[name] = codes if codes.any() else last
    return found


def rank_main(rank: int, folder: str, worlds: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    for world in worlds:  # the largest first; then the first ranks form smaller groups
        if rank >= world:
            break
        dist.init_process_group("gloo", init_method=f"file://{folder}/init{world}", rank=rank, world_size=world)
        found = {"cases": [step(case, rank, world) for case in CASES], "alone": single_losses(rank, world)}
        torch.save(found, f"{folder}/{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    # Gloo's threads outlive the group now and then, and then C++ ends an interpreter that exits by abort().
    os._exit(0)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What 4, then 3, and then 2 ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(rank_main, args=(str(folder), (4, 3, 2)), nprocs=4)
    return folder


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_give_what_one_process_gives(ranks: Path, world: int) -> None:
    found = [torch.load(ranks / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]
    for number, case in enumerate(CASES):
        expected = step(case, None, 1)
        assert {f"loss/{name}" for name in PRUNE_LOSSES} < set(expected) and "gradient/codes" in expected
        for name, value in expected.items():
            if name == "share":
                continue
            values = [rank["cases"][number][name] for rank in found]
            if name.removeprefix("loss/") in OWN_ROWS:
                shares = torch.stack([rank["cases"][number]["share"] for rank in found])
                values = [(shares * torch.stack(values)).mean()]
            for actual in values:
                scale = float(value.double().abs().max())
                # The reference's form takes log(1 - p) of a p that here is 3 roundings below 1: the last bit moves its gradient.
                near = 3e-2 if "contrastive_form" in case[1] and "predictor" in name else 1e-4
                torch.testing.assert_close(actual, value, atol=1e-6 + near * scale, rtol=1e-4, msg=f"{case} {name}")


@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_losss_own_gradient_is_the_joined_batchs(ranks: Path, world: int) -> None:
    expected = single_losses(None, 1)
    for rank in range(world):
        found = torch.load(ranks / f"{world}-{rank}.pt", weights_only=True)["alone"]
        assert set(found) == set(PRUNE_LOSSES)
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            assert scale > 0, name
            torch.testing.assert_close(found[name], gradient, atol=2e-3 * scale, rtol=1e-3, msg=name)
