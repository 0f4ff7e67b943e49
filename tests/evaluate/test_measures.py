"""Measures against scikit-learn, closed forms and counting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score

from aptp_ray.evaluate import measures


@pytest.mark.parametrize("seed", range(5))
def test_mutual_information_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    left = rng.integers(0, 5, 300)
    right = np.where(rng.random(300) < 0.6, left % 3, rng.integers(0, 4, 300))
    found = measures.normalized_mutual_information([f"group {value}" for value in left], right.tolist())
    assert found == pytest.approx(normalized_mutual_info_score(left, right), abs=1e-12)


def test_mutual_information_at_its_ends() -> None:
    assert measures.normalized_mutual_information("aabbcc", [2, 2, 0, 0, 1, 1]) == pytest.approx(1.0)
    assert measures.normalized_mutual_information("aabb", [0, 1, 0, 1]) == pytest.approx(0.0, abs=1e-12)
    assert measures.normalized_mutual_information("abc", [0, 0, 0]) == 0.0
    with pytest.raises(ValueError, match="3 and 2 labels"):
        measures.normalized_mutual_information("abc", [0, 1])


def test_shuffled_control_is_chance_and_repeats() -> None:
    labels = ["line", "color"] * 50
    experts = [index % 2 for index in range(100)]
    control = measures.shuffled_control(labels, experts, seed=3)
    assert measures.normalized_mutual_information(labels, experts) == pytest.approx(1.0)
    # Two independent balanced bits: n * 2 * I / log-units is chi-squared with one degree, so I is about 1 / (2 * 100).
    assert 0.0 < control.mean < 0.05 and control.deviation > 0.0
    assert measures.shuffled_control(labels, experts, seed=3) == control
    assert measures.shuffled_control(labels, experts, seed=4) != control


def test_caption_agreement_by_hand() -> None:
    # Image 0: 0 0 0 (3 of 3 pairs), image 1: 1 0 1 (1 of 3), image 2: 2 2 (1 of 1), image 3: nothing to compare.
    found = measures.caption_agreement([0, 1, 2, 0], [[0, 0], [0, 1], [2], []])
    assert found.images == 3
    assert found.all_agree == pytest.approx(2 / 3)
    assert found.pairs_agree == pytest.approx(5 / 7)
    assert found.by_chance == pytest.approx((4 / 8) ** 2 + (2 / 8) ** 2 + (2 / 8) ** 2)
    assert measures.caption_agreement([0, 1], [[], []]).all_agree is None


def test_overlap_of_codes_by_hand() -> None:
    codes = np.array([[1, 1, 0, 0], [1, 0, 0, 1], [0, 0, 1, 1]], dtype=bool)
    expected = [[1.0, 0.5, 0.0], [0.5, 1.0, 0.5], [0.0, 0.5, 1.0]]
    np.testing.assert_allclose(measures.code_overlap(codes), expected)
    with pytest.raises(ValueError, match="bool"):
        measures.code_overlap(codes.astype(float))


def test_shares_and_mixture() -> None:
    traffic = measures.shares([0, 2, 2, 2], 4)
    np.testing.assert_allclose(traffic, [0.25, 0.0, 0.75, 0.0])
    assert measures.mixture_ratio([40, 90, 80, 10], 100, traffic) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="there are 2 experts"):
        measures.shares([0, 2], 2)
    with pytest.raises(ValueError, match="add up"):
        measures.mixture_ratio([1, 2], 3, [0.5, 0.4])


def test_counts_by_label_come_largest_first() -> None:
    found = measures.counts_by_label(["b", "a", "a", "c"], [0, 1, 0, 1], 2)
    assert list(found.items()) == [("a", [1, 1]), ("b", [1, 0]), ("c", [0, 1])]


def test_distance_of_images() -> None:
    black, grey = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert measures.rmse(black, grey) == pytest.approx(0.2)
    assert measures.psnr([0.2]) == pytest.approx(20 * math.log10(1 / 0.2))
    assert measures.psnr([0.0, 0.2]) == pytest.approx(10 * math.log10(1 / 0.02))
    assert measures.psnr([measures.rmse(grey, grey)]) is None
    with pytest.raises(ValueError, match="do not compare"):
        measures.rmse(black, grey[:2])
