from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from aptp_ray.core.relaxation import GUMBEL_MEDIAN, binarize, gumbel, openness, relax, straight_through
from aptp_ray.core.sites import Site
from aptp_ray.core.space import ArchitectureSpace
from tests.core.tiny import tiny_sd21


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def space() -> ArchitectureSpace:
    return ArchitectureSpace.of(tiny_sd21())


def _one_site(width: int, channels: int) -> ArchitectureSpace:
    site = Site(name="mid_block.resnets.0", width=width, kind="resnet", start=0, block=None, channels=channels)
    return ArchitectureSpace((site,))


def test_gumbel_draws_have_the_distribution() -> None:
    draws = gumbel((200_000,), _generator()).double()
    assert abs(float(draws.mean()) - 0.5772157) < 0.01
    assert abs(float(draws.var()) - math.pi**2 / 6) < 0.03
    assert abs(float(draws.median()) - GUMBEL_MEDIAN) < 0.01
    assert torch.equal(gumbel((5,), _generator(1)), gumbel((5,), _generator(1)))


def _by_hand(logits: list[float], rank: tuple[int, ...], noise: float, tau: float, base: float) -> list[float]:
    """Depth masks in plain Python: the formula of the paper, entry by entry."""
    weights = [math.exp(logits[i]) for i in rank]
    n, total = len(rank), sum(weights)
    masks = [0.0] * n
    for position in range(n):
        p = min(1.0, sum(weights[: n - position]) / total)
        x = math.log(p + 1e-6) - math.log(1 - p + 1e-6)
        masks[rank[position]] = 1 / (1 + math.exp(-(x + noise + base) / tau))
    return masks


def test_masks_follow_the_formula(space: ArchitectureSpace) -> None:
    logits = torch.randn(space.dim, generator=_generator(2), dtype=torch.float64)
    soft = relax(logits, space, noise=GUMBEL_MEDIAN, tau=0.7, base=-1.0)
    width = [1 / (1 + math.exp(-(x - 1.0 + GUMBEL_MEDIAN) / 0.7)) for x in logits[: space.num_width].tolist()]
    depth = _by_hand(logits[space.num_width :].tolist(), space.depth_rank, GUMBEL_MEDIAN, 0.7, -1.0)
    torch.testing.assert_close(soft, torch.tensor(width + depth, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_protected_depths_never_close_before_others(space: ArchitectureSpace) -> None:
    for seed in range(20):
        x = openness(3 * torch.randn(space.dim, generator=_generator(seed)), space)[space.num_width :]
        ranked = x[list(space.depth_rank)]
        assert bool((ranked.diff() <= 1e-5).all())
        assert float(ranked[0]) > 10  # p = 1


def test_free_depths_are_their_own_logits(space: ArchitectureSpace) -> None:
    logits = torch.randn(3, space.dim, generator=_generator(1), dtype=torch.float64)
    assert openness(logits, space, ordered_depth=False) is logits
    soft = relax(logits, space, noise=0.2, tau=0.7, base=1.0, ordered_depth=False)
    torch.testing.assert_close(soft, torch.sigmoid((logits + 1.2) / 0.7))


def test_offset_moves_depths_although_softmax_does_not_see_shifts(space: ArchitectureSpace) -> None:
    logits = torch.randn(2, space.dim, generator=_generator(), dtype=torch.float64)
    shifted = logits.clone()
    shifted[:, space.num_width :] += 5.0
    torch.testing.assert_close(openness(shifted, space), openness(logits, space))
    for offset in (-2.0, torch.tensor([[-2.0], [-2.0]], dtype=torch.float64)):
        expected = torch.sigmoid((openness(logits, space) - 2.0 + 3.0) / 0.4)
        torch.testing.assert_close(relax(logits, space, offset=offset), expected)
    with pytest.raises(ValueError, match=r"tau=0\.0"):
        relax(logits, space, tau=0.0)


def test_the_median_noise_decides_like_half_of_the_draws(space: ArchitectureSpace) -> None:
    logits = torch.randn(space.dim, generator=_generator(5)) - 3.0
    noisy = relax(logits, space, noise=gumbel((4000, space.dim), _generator(6))) >= 0.5
    share = noisy.float().mean(dim=0)
    at_median = relax(logits, space, noise=GUMBEL_MEDIAN) >= 0.5
    clear = (share - 0.5).abs() > 0.03
    assert int(clear.sum()) > 0.8 * space.dim
    assert torch.equal(at_median[clear], share[clear] > 0.5)


def test_every_logit_gets_a_gradient(space: ArchitectureSpace) -> None:
    logits = torch.randn(2, space.dim, generator=_generator(), requires_grad=True)
    weights = torch.randn(space.dim, generator=_generator(1))
    soft = relax(logits, space, noise=gumbel((2, space.dim), _generator(2)), base=0.0)
    ((soft * weights).sum()).backward()
    assert logits.grad is not None and bool(logits.grad.isfinite().all())
    assert bool((logits.grad != 0).float().mean() > 0.99)


def test_binarize_keeps_what_is_open_and_one_of_each_site(space: ArchitectureSpace) -> None:
    soft = torch.rand(4, space.dim, generator=_generator())
    soft[0, : space.num_width] *= 0.4  # nothing is open
    hard = binarize(soft, space)
    assert torch.equal(hard[1:] | (soft[1:] < 0.5), torch.ones_like(hard[1:]))
    for site in space.width_sites:
        values = soft[0, site.slice]
        assert hard[0, site.slice].nonzero().flatten().tolist() == [int(values.argmax())]
    assert torch.equal(hard[:, space.num_width :], soft[:, space.num_width :] >= 0.5)
    space.validate(hard)


def _aligned_by_search(values: Tensor, channels: int, alignment: int) -> set[int]:
    """Which entries stay, by trying every count: nearest allowed one, the larger of two."""
    count = int((values >= 0.5).sum())
    allowed = [k for k in range(1, len(values) + 1) if k * channels % alignment == 0] or [len(values)]
    best = min(allowed, key=lambda k: (abs(k - count), -k))
    return set(sorted(range(len(values)), key=lambda i: (-float(values[i]), i))[:best])


@pytest.mark.parametrize("alignment", [1, 2, 8, 16, 64])
def test_alignment_agrees_with_a_search(alignment: int) -> None:
    for seed in range(120):
        generator = _generator(seed)
        width, channels = (int(torch.randint(1, high, (1,), generator=generator)) for high in (34, 41))
        # Few distinct values, so that ties occur.
        soft = torch.rand(width, generator=generator).mul(8).round().div(8)
        kept = binarize(soft, _one_site(width, channels), alignment).nonzero().flatten().tolist()
        assert set(kept) == _aligned_by_search(soft, channels, alignment), (seed, width, channels)


def test_a_batch_is_binarized_row_by_row(space: ArchitectureSpace) -> None:
    soft = torch.rand(2, 3, space.dim, generator=_generator())
    hard = binarize(soft, space, 8)
    for i in range(2):
        for j in range(3):
            assert torch.equal(hard[i, j], binarize(soft[i, j], space, 8))


def test_binarize_refuses_nonsense(space: ArchitectureSpace) -> None:
    with pytest.raises(ValueError, match="NaN"):
        binarize(torch.full((space.dim,), float("nan")), space)
    with pytest.raises(ValueError, match="alignment=0"):
        binarize(torch.ones(space.dim), space, 0)
    with pytest.raises(ValueError, match="another UNet"):
        binarize(torch.ones(space.dim + 1), space)


def test_straight_through_is_hard_forward_and_soft_backward(space: ArchitectureSpace) -> None:
    soft = torch.rand(2, space.dim, generator=_generator(), requires_grad=True)
    weights = torch.randn(2, space.dim, generator=_generator(1))
    hard = straight_through(soft, space)
    assert torch.equal(hard, binarize(soft.detach(), space).float())
    (hard * weights).sum().backward()
    assert soft.grad is not None
    torch.testing.assert_close(soft.grad, weights)
