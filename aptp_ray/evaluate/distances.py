"""Distances between a set of generated images and a set of references, from any encoder's features, in float64.

Each is a :class:`Score`: a function of how much each generated image counts, so that the whole set, a bootstrap replicate of it
and a mixture weighted by traffic are the same computation, and nothing is encoded twice.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Weights of n samples (they add up to n; ones: the set as it is) -> the score.
Score = Callable[[np.ndarray], float]

# CMMD's bandwidth and scale (Jayasumana et al. 2024, "Rethinking FID", section 4 and the code released with it).
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


def frechet(reference: np.ndarray, samples: np.ndarray) -> Score:
    """Frechet distance of the Gaussians with the features' means and covariances (Heusel et al. 2017, equation 6).

    ``|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))`` with unbiased covariances. With Inception's pool features this is
    FID. The last trace is the sum of the roots of the eigenvalues of ``X S1 X^T / (n - 1)``, X the centred samples: the same
    values as those of ``S1 S2``, of a matrix that is symmetric, and no larger than the number of samples.

    Args:
        reference: [m, d].
        samples: [n, d].

    Raises:
        ValueError: if widths differ, a set has fewer than two rows, or values are not finite.
    """
    reference, samples = _pair(reference, samples)
    mean1 = reference.mean(axis=0)
    centred = reference - mean1
    covariance1 = centred.T @ centred / (len(reference) - 1)
    trace1, wide = float(np.trace(covariance1)), samples.shape[1] > len(samples)
    root1 = None if wide else _root(covariance1)
    gram = samples @ covariance1 @ samples.T if wide else None

    def score(weights: np.ndarray) -> float:
        weights = _weights(weights, len(samples))
        share = weights / weights.sum()
        spread = weights / (weights.sum() - 1)  # the unbiased covariance of a set in which a sample stands weights times
        mean2 = share @ samples
        offset = samples - mean2
        trace2 = float(spread @ (offset**2).sum(axis=1))
        if gram is not None:
            row = gram @ share
            inner = gram - row[:, None] - row[None, :] + share @ row
            scaled = np.sqrt(spread)
            values = np.linalg.eigvalsh(scaled[:, None] * inner * scaled[None, :])
        else:
            rotated = (offset * np.sqrt(spread)[:, None]) @ root1
            values = np.linalg.eigvalsh(rotated.T @ rotated)
        # Rounding leaves values a hair below zero.
        cross = float(np.sqrt(values.clip(min=0.0)).sum())
        return float(((mean1 - mean2) ** 2).sum()) + trace1 + trace2 - 2.0 * cross

    return score


def kid(reference: np.ndarray, samples: np.ndarray) -> Score:
    """Kernel distance (Binkowski et al. 2018): squared MMD under ``(x.y / d + 1)^3``, the unbiased U-statistic.

    Over all samples at once, not over random subsets, so that nothing is drawn. The estimator is centred on the true distance
    and may be negative; of a set against itself it gives ``-(2 / n) (mean k(x, x) - mean of k(x, y), x != y)``, not 0.

    Args:
        reference: [m, d].
        samples: [n, d].

    Raises:
        ValueError: as :func:`frechet`.
    """
    reference, samples = _pair(reference, samples)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    k11 = kernel(reference, reference)
    m = len(reference)
    within1 = (k11.sum() - np.trace(k11)) / (m * (m - 1))
    k22, across = kernel(samples, samples), kernel(reference, samples).mean(axis=0)
    diagonal = np.diag(k22).copy()

    def score(weights: np.ndarray) -> float:
        weights = _weights(weights, len(samples))
        n = weights.sum()
        within2 = (weights @ k22 @ weights - weights @ diagonal) / (n * (n - 1))
        return float(within1 + within2 - 2.0 * (across @ weights) / n)

    return score


def cmmd(reference: np.ndarray, samples: np.ndarray) -> Score:
    """CMMD (Jayasumana et al. 2024): squared MMD of embeddings under a Gaussian kernel, times 1000.

    As released: unit-length embeddings of CLIP's image encoder, ``exp(-|x - y|^2 / (2 sigma^2))`` with sigma 10, and the
    biased V-statistic, the means of whole kernel matrices (Gretton et al. 2012, equation 5). It is never negative, and 0 for
    a set against itself.

    Args:
        reference: [m, d], of unit length.
        samples: [n, d].

    Raises:
        ValueError: as :func:`frechet`.
    """
    reference, samples = _pair(reference, samples)

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        square = (x**2).sum(axis=1)[:, None] + (y**2).sum(axis=1)[None, :] - 2.0 * x @ y.T
        # exp(x) - 1 of tiny x keeps the digits that exp would lose beside 1; the ones cancel in the score.
        return np.expm1(-square.clip(min=0.0) / (2.0 * CMMD_SIGMA**2))

    within1, k22 = kernel(reference, reference).mean(), kernel(samples, samples)
    across = kernel(reference, samples).mean(axis=0)

    def score(weights: np.ndarray) -> float:
        share = _weights(weights, len(samples))
        share = share / share.sum()
        return float(CMMD_SCALE * (within1 + share @ k22 @ share - 2.0 * across @ share))

    return score


def mean_of(values: np.ndarray) -> Score:
    """The weighted mean of one value a sample.

    Raises:
        ValueError: if there are no values, or they are not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("a mean needs values, and finite ones")

    def score(weights: np.ndarray) -> float:
        weights = _weights(weights, len(values))
        return float(weights @ values / weights.sum())

    return score


def clip_score(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """CLIPScore of each image and its caption: ``100 max(cos, 0)`` (Hessel et al. 2021; the scale is torchmetrics').

    Args:
        images: [n, d] of unit length.
        texts: the same, row i for image i.

    Returns:
        float64 [n].

    Raises:
        ValueError: if the shapes differ.
    """
    if images.shape != texts.shape:
        raise ValueError(f"embeddings of images {list(images.shape)} and captions {list(texts.shape)} differ in shape")
    return 100.0 * (images.astype(np.float64) * texts).sum(axis=1).clip(min=0.0)


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric root of a positive semidefinite matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T


def _weights(weights: np.ndarray, count: int) -> np.ndarray:
    weights = np.asarray(weights, dtype=np.float64)
    if weights.shape != (count,) or (weights < 0).any() or weights.sum() <= 1.0:
        raise ValueError(f"weights {list(weights.shape)} of {count} samples: one each, not negative, more than 1 in all")
    return weights


def _pair(reference: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    reference, samples = np.asarray(reference, dtype=np.float64), np.asarray(samples, dtype=np.float64)
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(f"features {list(reference.shape)} and {list(samples.shape)} are not [m, d] and [n, d] of one d")
    if min(len(reference), len(samples)) < 2:
        raise ValueError(f"{len(reference)} references and {len(samples)} samples: a distance needs two of each")
    if not (np.isfinite(reference).all() and np.isfinite(samples).all()):
        raise ValueError("features hold NaN or infinity: a broken image, or an encoder that overflows in half precision")
    return reference, samples
