from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from scipy.stats import rankdata
from torch import Tensor

from aptp_ray.core.baselines import ablation_greedy
from aptp_ray.core.hardening import average_rank, harden_codes, meet_budget, start_logits
from aptp_ray.core.importance import Importance
from aptp_ray.core.macs import MacsModel
from aptp_ray.core.relaxation import binarize, gumbel, openness, relax
from aptp_ray.core.space import ArchitectureSpace
from tests.core.tiny import tiny_sd21

UNET = tiny_sd21()
SPACE = ArchitectureSpace.of(UNET)
MACS = MacsModel.measure(UNET, (16, 16), 5, SPACE)


def random_logits(codes: int, seed: int = 0) -> Tensor:
    return torch.randn(codes, SPACE.dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("codes", [1, 4])
@pytest.mark.parametrize("budget", [0.5, 0.65, 0.8])
def test_hard_codes_meet_the_budget(budget: float, codes: int, alignment: int) -> None:
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4]) if codes == 4 else torch.ones(1)
    result = harden_codes(random_logits(codes), SPACE, MACS, budget=budget, shares=shares, alignment=alignment)
    assert result.codes.shape == (codes, SPACE.dim) and result.codes.dtype == torch.bool
    exact = [MACS.exact(code) / MACS.total for code in result.codes]  # `exact` also checks that no site is empty
    assert abs(np.dot(shares.numpy(), exact) / budget - 1) <= 0.005
    assert result.macs_ratio == pytest.approx(np.dot(shares.numpy(), exact), rel=1e-6)
    np.testing.assert_allclose(result.ratios.numpy(), exact, rtol=1e-12)
    for site in SPACE.width_sites:
        kept = result.codes[:, site.slice].sum(dim=1)
        assert (kept * site.channels % alignment == 0).all()


def test_hardening_keeps_the_most_open_entries() -> None:
    logits = random_logits(2, seed=3)
    result = harden_codes(logits, SPACE, MACS, budget=0.65, alignment=1)
    for row, code in zip(logits, result.codes, strict=True):
        for site in SPACE.width_sites:
            kept, closed = row[site.slice][code[site.slice]], row[site.slice][~code[site.slice]]
            assert len(closed) == 0 or kept.min() >= closed.max()


def test_codes_of_unequal_size_stay_unequal() -> None:
    logits = torch.stack([torch.full((SPACE.dim,), 0.0), torch.full((SPACE.dim,), -1.5)])
    logits += 0.5 * random_logits(2)
    result = harden_codes(logits, SPACE, MACS, budget=0.65, alignment=1)
    assert result.ratios[0] > result.ratios[1] + 0.1


@pytest.mark.parametrize("seed", range(3))
def test_single_flips_reach_a_tolerance_that_the_offset_alone_misses(seed: int) -> None:
    logits = random_logits(4, seed)
    flips = [harden_codes(logits, SPACE, MACS, budget=b, alignment=8, tolerance=3e-4).flips for b in (0.5, 0.6, 0.7)]
    assert max(flips) > 0


def test_flips_change_the_entries_nearest_to_the_threshold() -> None:
    # A single offset moves all of these equal entries at once, so only flips can meet the budget.
    x = torch.zeros(1, SPACE.dim)
    x[0, SPACE.num_width :] = torch.inf
    resnets = torch.cat([torch.arange(s.start, s.start + s.width) for s in SPACE.sites if s.kind == "resnet"])
    x[0, resnets] = 5.0
    result = meet_budget(x, SPACE, MACS, budget=0.9, alignment=1, tolerance=0.002)
    assert result.flips > 5 and result.codes[0, resnets].all() and result.codes[0, SPACE.num_width :].all()


@pytest.mark.parametrize("budget", [0.1, 1.2])
def test_budget_out_of_reach_names_budget_and_floor(budget: float) -> None:
    floor = MACS.floor / MACS.total
    with pytest.raises(ValueError, match=rf"budget {budget} is out of reach.*floor {floor:.4f}"):
        harden_codes(random_logits(2), SPACE, MACS, budget=budget, alignment=1)


def test_bad_inputs() -> None:
    with pytest.raises(ValueError, match="NaN"):
        harden_codes(torch.full((1, SPACE.dim), torch.nan), SPACE, MACS, budget=0.6)
    with pytest.raises(ValueError, match="shares"):
        harden_codes(random_logits(2), SPACE, MACS, budget=0.6, shares=torch.ones(3))
    with pytest.raises(ValueError, match="importance"):
        start_logits(torch.ones(3), MACS, SPACE, budget=0.6, generator=torch.Generator())
    with pytest.raises(ValueError, match="too coarse"):
        harden_codes(random_logits(1), SPACE, MACS, budget=0.61234, alignment=32, tolerance=1e-6)


@pytest.mark.parametrize("budget", [0.5, 0.65, 0.8])
def test_start_is_at_the_budget_under_noise_and_in_order_of_importance(budget: float) -> None:
    generator = torch.Generator().manual_seed(0)
    importance = torch.rand(SPACE.dim, generator=generator) ** 6 * MACS.entry_macs() - 1e-3  # some slightly negative
    logits = start_logits(importance, MACS, SPACE, budget=budget, generator=generator)
    assert logits.shape == (SPACE.dim,) and logits.isfinite().all()
    fresh = gumbel((400, SPACE.dim), torch.Generator().manual_seed(9))
    ratio = float(MACS.ratio(binarize(relax(logits, SPACE, noise=fresh), SPACE)).mean())
    assert abs(ratio / budget - 1) < 0.01

    width = slice(0, SPACE.num_width)
    order = (importance / MACS.entry_macs())[width].argsort()
    assert (logits[width][order].diff() >= 0).all()
    assert 2.5 < float(logits[width].max() - logits[width].min()) <= 3.0
    # Not saturated: every gate's slope is far from zero for typical noise.
    soft = relax(logits, SPACE, noise=fresh)
    slopes = (soft * (1 - soft)).mean(dim=0)
    assert float((slopes > 1e-3).double().mean()) > 0.95


def test_start_depths_are_the_nearest_that_the_protected_order_allows() -> None:
    importance = torch.rand(SPACE.dim, generator=torch.Generator().manual_seed(4)).double() * MACS.entry_macs()
    logits = start_logits(importance, MACS, SPACE, budget=0.65, generator=torch.Generator().manual_seed(0))
    offset = float(logits[: SPACE.num_width].double().mean())
    ranks = 1.5 * (2 * (rankdata(importance / MACS.entry_macs()) - 1) / (SPACE.dim - 1) - 1)
    offset -= ranks[: SPACE.num_width].mean()
    rank = list(SPACE.depth_rank)
    expected = isotonic_regression(ranks[SPACE.num_width :][rank], increasing=False).x + offset
    actual = openness(logits.double(), SPACE)[SPACE.num_width :][rank].numpy()
    assert (np.diff(actual) < 0).all()
    # Plateaus are tilted by the least softmax mass that every depth entry keeps, 1e-3 of a probability.
    np.testing.assert_allclose(actual[1:], expected[1:], atol=0.25)


def test_free_depths_start_at_their_own_rank_and_harden_to_the_static_code() -> None:
    generator = torch.Generator().manual_seed(4)
    importance = torch.rand(SPACE.dim, generator=generator).double() * MACS.entry_macs() ** 2
    logits = start_logits(importance, MACS, SPACE, budget=0.65, generator=generator, ordered_depth=False)
    per_mac = importance / MACS.entry_macs()
    assert (logits[per_mac.argsort()].diff() >= 0).all()  # depths among the widths
    noise = gumbel((400, SPACE.dim), torch.Generator().manual_seed(9))
    ratio = float(MACS.ratio(binarize(relax(logits, SPACE, noise=noise, ordered_depth=False), SPACE)).mean())
    assert abs(ratio / 0.65 - 1) < 0.01
    hard = harden_codes(logits[None], SPACE, MACS, budget=0.65, alignment=1, ordered_depth=False)
    static = ablation_greedy(SPACE, MACS, 0.65, importance=Importance(importance, MACS.entry_macs().double()), alignment=1)
    assert not static[SPACE.num_width :].all()  # whole blocks went
    assert float((hard.codes[0] == static).double().mean()) > 0.98


def test_average_rank_is_scipys() -> None:
    values = torch.tensor([3.0, 1.0, 1.0, -2.0, 3.0, 3.0, 7.0])
    np.testing.assert_allclose(average_rank(values).numpy(), rankdata(values.numpy()) - 1)
