from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from aptp_ray.core.transport import (
    balanced_assignment,
    cluster_prompts,
    gather_rows,
    nearest_assignment,
    own_rows,
    prefer_lowest,
)


def random_similarity(rows: int, codes: int, seed: int = 0, scale: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    favourites = torch.randn(1, codes, generator=generator)  # some codes are nearer to every prompt
    return scale * (torch.randn(rows, codes, generator=generator) + favourites)


@pytest.mark.parametrize(("rows", "codes", "epsilon"), [(64, 4, 0.3), (257, 8, 0.3), (96, 16, 0.05), (3, 5, 0.3)])
def test_marginals_within_tolerance(rows: int, codes: int, epsilon: float) -> None:
    result = balanced_assignment(random_similarity(rows, codes), epsilon=epsilon, tol=1e-4)
    assert result.converged and result.residual <= 1e-4
    plan = result.plan.numpy()
    np.testing.assert_allclose(plan.sum(axis=1), 1 / rows, rtol=1e-9)
    np.testing.assert_allclose(plan.sum(axis=0), 1 / codes, rtol=1e-4)
    assert (plan >= 0).all()


def test_plan_agrees_with_plain_sinkhorn_in_numpy() -> None:
    similarity = random_similarity(40, 4)
    result = balanced_assignment(similarity, epsilon=0.1, relative=False, tol=1e-8)
    kernel = np.exp(similarity.double().numpy() / 0.1)
    v = np.ones(4)
    for _ in range(2000):
        u = 1 / 40 / (kernel @ v)
        v = 1 / 4 / (kernel.T @ u)
    np.testing.assert_allclose(result.plan.numpy(), u[:, None] * kernel * v, atol=1e-9)
    log_v = np.log(v)
    np.testing.assert_allclose(result.potentials.numpy(), log_v - log_v.mean(), atol=1e-6)
    assert abs(float(result.potentials.mean())) < 1e-12


def test_unequal_target_shares_are_met() -> None:
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])
    result = balanced_assignment(random_similarity(500, 4), epsilon=0.1, shares=2 * shares)
    torch.testing.assert_close(result.plan.sum(0), shares.double(), rtol=2e-3, atol=0)
    counts = torch.bincount(result.index, minlength=4) / 500
    torch.testing.assert_close(counts, shares, rtol=0, atol=0.03)


def test_the_nearest_code_gets_a_prompt_whatever_the_shares() -> None:
    similarity = random_similarity(40, 4)
    similarity[7] = 0.25  # a tie of all
    result = nearest_assignment(similarity)
    expected = np.argmax(similarity.double().numpy(), axis=1)
    np.testing.assert_array_equal(result.index.numpy(), expected)
    counts = np.bincount(expected, minlength=4)
    np.testing.assert_allclose(result.plan.numpy().sum(axis=0), counts / 40)
    np.testing.assert_allclose(result.plan.numpy().sum(axis=1), 1 / 40)
    assert result.residual == pytest.approx(np.abs(counts / 10 - 1).max()) and result.epsilon == 0
    assert result.potentials.tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 40 rows"):
        nearest_assignment(similarity.index_fill(0, torch.tensor([3]), float("nan")))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("copies", "codes"), [(1, 6), (8, 4), (5, 7)])
def test_small_epsilon_equals_linear_assignment(copies: int, codes: int, seed: int) -> None:
    similarity = random_similarity(copies * codes, codes, seed)
    rows, columns = linear_sum_assignment(np.repeat(similarity.numpy(), copies, axis=1), maximize=True)
    result = balanced_assignment(similarity, epsilon=0.002, max_iter=200_000)
    assert result.converged
    np.testing.assert_array_equal(result.index.numpy(), columns[np.argsort(rows)] // copies)


@pytest.mark.parametrize("epsilon", [0.02, 0.3, 1.0])
def test_potentials_reproduce_the_assignment_one_row_at_a_time(epsilon: float) -> None:
    similarity = random_similarity(200, 5)
    result = balanced_assignment(similarity, epsilon=epsilon)
    torch.testing.assert_close(result.index, result.plan.argmax(dim=1))
    for row, index in zip(similarity.double(), result.index, strict=True):
        assert int((row + result.epsilon * result.potentials).argmax()) == int(index)
    assert result.epsilon == pytest.approx(epsilon * float(similarity.double().std(correction=0)), rel=1e-6)


def test_relative_epsilon_makes_the_assignment_scale_free() -> None:
    similarity = random_similarity(128, 4)
    big, small = balanced_assignment(similarity), balanced_assignment(similarity.double() * 1e-4 + 0.9)
    assert torch.equal(big.index, small.index)
    absolute = balanced_assignment(similarity.double() * 1e-4, epsilon=0.05, relative=False)
    # The fixed value sees nothing in similarities this close together: its plan is uniform.
    assert float(absolute.plan.std() / absolute.plan.mean()) < 0.01 < float(small.plan.std() / small.plan.mean())


def test_degenerate_inputs() -> None:
    flat = balanced_assignment(torch.full((6, 3), 0.7))
    assert flat.converged and flat.index.tolist() == [0] * 6 and flat.potentials.abs().max() < 1e-12
    torch.testing.assert_close(flat.plan, torch.full((6, 3), 1 / 18, dtype=torch.float64))
    single = balanced_assignment(random_similarity(5, 1))
    assert single.index.tolist() == [0] * 5 and single.potentials.tolist() == [0.0] and single.converged
    assert balanced_assignment(random_similarity(1, 4)).converged
    with pytest.raises(ValueError, match="NaN"):
        balanced_assignment(torch.tensor([[0.1, float("nan")], [0.2, 0.3]]))
    for shape in ((0, 3), (3, 0), (3,)):
        with pytest.raises(ValueError, match="similarity must be"):
            balanced_assignment(torch.zeros(shape))
    with pytest.raises(ValueError, match="epsilon"):
        balanced_assignment(torch.zeros(2, 2), epsilon=0.0)
    with pytest.raises(ValueError, match="shares"):
        balanced_assignment(torch.zeros(2, 2), shares=torch.tensor([1.0, 0.0]))


def test_missing_convergence_is_reported() -> None:
    result = balanced_assignment(random_similarity(64, 6), epsilon=0.01, max_iter=1)
    assert not result.converged and result.residual > 1e-3


def test_ties_go_to_the_lowest_index() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 0.0], [0.0, 2.0, 2.0], [0.0, 1.0, 1.001]], dtype=torch.float64)
    assert prefer_lowest(scores).tolist() == [0, 1, 2]


def test_clusters_recover_separated_groups_of_equal_size() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.nn.functional.normalize(torch.randn(4, 32, generator=generator), dim=1)
    truth = torch.arange(4).repeat_interleave(30)
    z = 3 * torch.ones(32) + centres[truth] + 0.05 * torch.randn(120, 32, generator=generator)
    index = cluster_prompts(z, 4, generator=torch.Generator().manual_seed(2))
    assert torch.bincount(index).tolist() == [30] * 4
    assert all(len(index[truth == group].unique()) == 1 for group in range(4))
    assert torch.equal(index, cluster_prompts(z, 4, generator=torch.Generator().manual_seed(2)))


def test_clusters_need_distinct_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="lower the number of codes"):
        cluster_prompts(torch.ones(20, 8), 3, generator=generator)
    with pytest.raises(ValueError, match="cannot form 5 clusters"):
        cluster_prompts(torch.eye(4), 5, generator=generator)
    assert cluster_prompts(torch.eye(4), 1, generator=generator).tolist() == [0] * 4


# -- two ranks against one process -------------------------------------------------------------------------------------


def joined_loss(predictor: torch.nn.Module, codes: Tensor, z: Tensor) -> Tensor:
    """A loss that couples all rows of the joined batch, with a transport in the middle."""
    e = gather_rows(predictor(z))
    similarity = torch.nn.functional.normalize(e, dim=1) @ torch.nn.functional.normalize(codes, dim=1).T
    index = balanced_assignment(similarity).index
    pairs = torch.log_softmax(e @ e.T, dim=1).diagonal().mean()
    return (1 - similarity.gather(1, index[:, None])).mean() - pairs


def rank_main(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    torch.manual_seed(0)
    predictor, codes = torch.nn.Linear(6, 5), torch.randn(3, 5)
    z = torch.randn(16, 6)
    parallel = torch.nn.parallel.DistributedDataParallel(predictor)
    # Ranks of one size, and of two: rank 0 holds 5 of 16 rows.
    for name, cut in (("even", 8), ("uneven", 5)):
        predictor.zero_grad()
        mine = z[:cut] if rank == 0 else z[cut:]
        loss = joined_loss(parallel, codes, mine)
        (loss * len(mine) * 2 / 16).backward()
        assert own_rows(mine) == (slice(0, cut) if rank == 0 else slice(cut, 16))
        assert torch.equal(gather_rows(mine), z)
        torch.save([loss.detach(), predictor.weight.grad, predictor.bias.grad], f"{folder}/{name}{rank}.pt")
    dist.barrier()
    # Gloo's threads outlive the group now and then, and then C++ ends an interpreter that exits by abort().
    os._exit(0)


def test_two_ranks_give_what_one_process_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    predictor, codes = torch.nn.Linear(6, 5), torch.randn(3, 5)
    loss = joined_loss(predictor, codes, torch.randn(16, 6))
    loss.backward()
    mp.spawn(rank_main, args=(str(tmp_path),), nprocs=2)
    for name in ("even0", "even1", "uneven0", "uneven1"):
        value, weight, bias = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(weight, predictor.weight.grad)
        torch.testing.assert_close(bias, predictor.bias.grad)
