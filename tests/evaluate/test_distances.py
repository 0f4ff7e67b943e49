"""Distances against torchmetrics, and against plain float64 formulas written another way."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from aptp_ray.evaluate import distances
from aptp_ray.evaluate.bootstrap import difference, draws, estimate, replicate, traffic_weights


def features(seed: int, rows: int, width: int, shift: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rows, width)) @ rng.normal(size=(width, width)) / width**0.5 + shift


class Passing(nn.Module):
    """Stands for an encoder: the "images" that torchmetrics hands over are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        # torchmetrics tries a custom encoder on a random picture to learn its width.
        return values if values.ndim == 2 else values.flatten(1)[:, : self.num_features].float()


@pytest.mark.parametrize(("rows", "width"), [(300, 16), (40, 64)])
def test_frechet_is_torchmetrics_and_scipys(rows: int, width: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    a, b = features(1, rows + 10, width), features(2, rows, width, 0.3)
    found = distances.frechet(a, b)(np.ones(rows))
    metric = FrechetInceptionDistance(feature=Passing(width)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    assert found == pytest.approx(float(metric.compute()), rel=1e-3)
    s1, s2 = np.cov(a.T), np.cov(b.T)
    root = scipy.linalg.sqrtm(s1 + 1e-12 * np.eye(width)) @ s2 @ scipy.linalg.sqrtm(s1 + 1e-12 * np.eye(width))
    cross = np.sqrt(np.linalg.eigvalsh(root).clip(min=0)).sum()
    assert found == pytest.approx(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2) - 2 * cross, rel=1e-5)


def test_kid_is_torchmetrics_on_one_subset_of_all() -> None:
    from torchmetrics.image.kid import KernelInceptionDistance

    a, b = features(3, 80, 12), features(4, 80, 12, 0.5)
    metric = KernelInceptionDistance(feature=Passing(12), subsets=1, subset_size=80)
    metric.update(torch.from_numpy(a), real=True)
    metric.update(torch.from_numpy(b), real=False)
    assert distances.kid(a, b)(np.ones(80)) == pytest.approx(float(metric.compute()[0]), rel=1e-3)


def test_cmmd_is_the_double_sum() -> None:
    a, b = features(5, 30, 8), features(6, 25, 8, 0.2)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def mean_kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.mean([[np.exp(-((p - q) ** 2).sum() / 200.0) for q in y] for p in x]))

    expected = 1000 * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
    assert distances.cmmd(a, b)(np.ones(25)) == pytest.approx(expected, rel=1e-6)


def test_a_set_against_itself() -> None:
    a = features(7, 60, 10)
    ones = np.ones(60)
    assert distances.frechet(a, a)(ones) == pytest.approx(0.0, abs=1e-9)
    unit = a / np.linalg.norm(a, axis=1, keepdims=True)
    assert distances.cmmd(unit, unit)(ones) == pytest.approx(0.0, abs=1e-12)
    # The U-statistic leaves out k(x, x) within the sets and not across them.
    kernel = (a @ a.T / 10 + 1) ** 3
    diagonal = np.trace(kernel) / 60
    others = (kernel.sum() - np.trace(kernel)) / (60 * 59)
    assert distances.kid(a, a)(ones) == pytest.approx(-2 / 60 * (diagonal - others), rel=1e-9)


@pytest.mark.parametrize("score", [distances.frechet, distances.kid, distances.cmmd])
@pytest.mark.parametrize("width", [6, 90])
def test_weights_are_repetitions(score: object, width: int) -> None:
    a, b = features(8, 50, width), features(9, 40, width, 0.2)
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    counts = draws(40, 1, seed=3)[0]
    repeated = np.repeat(b, counts.astype(int), axis=0)
    assert score(a, b)(counts) == pytest.approx(score(a, repeated)(np.ones(40)), rel=1e-8, abs=1e-10)  # type: ignore[operator]


def test_worse_sets_are_farther() -> None:
    a = features(10, 200, 8)
    near, far = a[::-1] + 0.1, a + 2.0
    for score in (distances.frechet, distances.kid):
        assert score(a, near)(np.ones(200)) < score(a, far)(np.ones(200))


def test_what_is_no_set_is_refused() -> None:
    good = features(11, 5, 4)
    with pytest.raises(ValueError, match="not \\[m, d\\] and \\[n, d\\]"):
        distances.frechet(good, features(11, 5, 3))
    with pytest.raises(ValueError, match="two of each"):
        distances.kid(good, good[:1])
    with pytest.raises(ValueError, match="NaN"):
        distances.cmmd(good, np.where(good > 1e9, good, np.nan))
    with pytest.raises(ValueError, match="weights"):
        distances.frechet(good, good)(np.ones(4))


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    values = np.random.default_rng(0).normal(size=400)
    found = estimate(*replicate(distances.mean_of(values), draws(400, 2000, seed=1)))
    error = values.std() / 400**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(1.96 * error, rel=0.1)
    assert found.value - found.low == pytest.approx(1.96 * error, rel=0.1)


def test_a_biased_distances_interval_holds_its_value() -> None:
    a, b = features(12, 150, 20), features(13, 120, 20, 0.1)
    value, replicates = replicate(distances.frechet(a, b), draws(120, 200, seed=0))
    assert replicates.mean() > value  # fewer distinct samples look farther away
    found = estimate(value, replicates)
    assert found.low < value < found.high


def test_paired_differences_see_what_unpaired_ones_do_not() -> None:
    rng = np.random.default_rng(2)
    shared = rng.normal(size=300) * 5  # hard and easy captions, for both systems
    first, second = shared + 0.2 + 0.1 * rng.normal(size=300), shared + 0.1 * rng.normal(size=300)
    counts = draws(300, 500, seed=0)
    paired = difference(replicate(distances.mean_of(first), counts), replicate(distances.mean_of(second), counts))
    other = draws(300, 500, seed=1)
    unpaired = difference(replicate(distances.mean_of(first), counts), replicate(distances.mean_of(second), other))
    assert 0 < paired.low < paired.value < paired.high
    assert unpaired.low < 0 < unpaired.high
    with pytest.raises(ValueError, match="paired"):
        difference(replicate(distances.mean_of(first), counts), replicate(distances.mean_of(second), counts[:10]))


def test_draws_repeat_and_differ_by_seed() -> None:
    assert (draws(50, 4, seed=5) == draws(50, 4, seed=5)).all()
    assert (draws(50, 4, seed=5) != draws(50, 4, seed=6)).any()
    assert (draws(50, 4, seed=5).sum(axis=1) == 50).all()


def test_traffic_weights_restore_the_shares() -> None:
    experts, values = [0] * 30 + [1] * 10, np.array([1.0] * 30 + [3.0] * 10)
    weights = traffic_weights(experts, [0.5, 0.5])
    assert distances.mean_of(values)(weights) == pytest.approx(2.0)
    assert weights.sum() == pytest.approx(40)
    with pytest.raises(ValueError, match=r"experts \[2\] have traffic"):
        traffic_weights(experts, [0.4, 0.4, 0.2])


def test_clip_score_is_the_cosine_of_each_pair() -> None:
    images, texts = np.eye(3), np.array([[1.0, 0, 0], [0, 0.6, 0.8], [0, 0, -1.0]])
    assert distances.clip_score(images, texts) == pytest.approx([100.0, 60.0, 0.0])
