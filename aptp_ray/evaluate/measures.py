"""Figures of a finished mixture, from plain arrays: what routing follows, how experts differ, what traffic costs."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from aptp_ray.core.randomness import key_seed


def normalized_mutual_information(left: Sequence[Hashable], right: Sequence[Hashable]) -> float:
    """Mutual information of two labellings over the mean of their entropies (Strehl and Ghosh 2002, arithmetic form).

    Returns:
        0 (one says nothing about the other) to 1 (each determines the other); 0 where either has a single value, since
        nothing can be learned about it.

    Raises:
        ValueError: if the lengths differ or there are no labels.
    """
    if len(left) != len(right) or not len(left):
        raise ValueError(f"{len(left)} and {len(right)} labels: give as many of each, one at least")
    joint = _contingency(left, right) / len(left)
    rows, columns = joint.sum(axis=1), joint.sum(axis=0)
    entropies = _entropy(rows), _entropy(columns)
    if min(entropies) == 0.0:
        return 0.0
    # I(L; R) = H(L) + H(R) - H(L, R); rounding may leave it a hair below zero.
    information = entropies[0] + entropies[1] - _entropy(joint.ravel())
    return min(1.0, max(0.0, 2.0 * information / sum(entropies)))


@dataclass(frozen=True)
class Control:
    """A measure's mean and standard deviation over shuffles, which is what chance alone gives on this many rows."""

    mean: float
    deviation: float


def shuffled_control(left: Sequence[Hashable], right: Sequence[Hashable], *, seed: int, rounds: int = 20) -> Control:
    """Normalized mutual information after shuffling one side: small samples have some by chance.

    Raises:
        ValueError: as :func:`normalized_mutual_information`, or if there is no round.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; one shuffle at least")
    values = []
    for index in range(rounds):
        order = np.random.default_rng(key_seed(seed, "shuffled control", index)).permutation(len(right))
        values.append(normalized_mutual_information(left, [right[i] for i in order]))
    return Control(float(np.mean(values)), float(np.std(values)))


@dataclass(frozen=True)
class CaptionAgreement:
    """Whether captions of one image are routed alike.

    Attributes:
        images: images with two captions at least.
        all_agree: share of them whose captions all go to one expert; None where there are none.
        pairs_agree: share of pairs of captions of one image that go to one expert, over all such pairs.
        by_chance: the same for pairs of captions drawn at random from these images: the sum of squared shares.
    """

    images: int
    all_agree: float | None
    pairs_agree: float | None
    by_chance: float | None


def caption_agreement(experts: Sequence[int], alternates: Sequence[Sequence[int]]) -> CaptionAgreement:
    """Compares the expert of each image's caption with those of its other captions.

    Args:
        experts: [n] of the captions.
        alternates: n lists, of the other captions.

    Raises:
        ValueError: if the lengths differ.
    """
    if len(experts) != len(alternates):
        raise ValueError(f"{len(experts)} captions but {len(alternates)} lists of alternates")
    images = [[first, *others] for first, others in zip(experts, alternates, strict=True) if len(others)]
    if not images:
        return CaptionAgreement(0, None, None, None)
    pairs = [a == b for image in images for a, b in combinations(image, 2)]
    routed = np.bincount([expert for image in images for expert in image])
    return CaptionAgreement(
        images=len(images),
        all_agree=sum(len(set(image)) == 1 for image in images) / len(images),
        pairs_agree=sum(pairs) / len(pairs),
        by_chance=float(((routed / routed.sum()) ** 2).sum()),
    )


def code_overlap(codes: np.ndarray) -> np.ndarray:
    """Share of entries in which two hard codes agree: bool [K, dim] -> float64 [K, K], ones on the diagonal.

    Raises:
        ValueError: if ``codes`` is not bool [K, dim].
    """
    if codes.ndim != 2 or codes.dtype != np.bool_:
        raise ValueError(f"hard codes are bool [K, dim], got {codes.dtype} {list(codes.shape)}")
    return (codes[:, None, :] == codes[None, :, :]).mean(axis=2)


def shares(experts: Sequence[int], num_experts: int) -> np.ndarray:
    """Share of prompts that each expert gets: [n] -> float64 [K].

    Raises:
        ValueError: if there are no prompts, or one names an expert that is not there.
    """
    counts = np.bincount(np.asarray(experts, dtype=np.int64), minlength=num_experts)
    if not counts.sum() or len(counts) > num_experts:
        raise ValueError(f"{len(experts)} prompts routed to experts 0..{len(counts) - 1}; there are {num_experts} experts")
    return counts / counts.sum()


def counts_by_label(labels: Sequence[Hashable], experts: Sequence[int], num_experts: int) -> dict[Hashable, list[int]]:
    """Prompts of each label that each expert gets: {label: [K]}, labels in order of their number of prompts."""
    found: dict[Hashable, list[int]] = {}
    for label, expert in zip(labels, experts, strict=True):
        found.setdefault(label, [0] * num_experts)[expert] += 1
    return dict(sorted(found.items(), key=lambda item: (-sum(item[1]), str(item[0]))))


def mixture_ratio(macs: Sequence[int], teacher_macs: int, traffic: Sequence[float] | np.ndarray) -> float:
    """MACs of the mixture over the teacher's: the experts' MACs weighted by the shares of prompts that they get.

    Raises:
        ValueError: if the shares do not add up to one.
    """
    if not math.isclose(float(np.sum(traffic)), 1.0, rel_tol=1e-9):
        raise ValueError(f"the shares {list(traffic)} add up to {float(np.sum(traffic))}, not to 1")
    return float(sum(count * share for count, share in zip(macs, traffic, strict=True)) / teacher_macs)


def rmse(left: np.ndarray, right: np.ndarray) -> float:
    """Root of the mean squared difference of two uint8 images of one shape, in units of white (0 to 1).

    Raises:
        ValueError: if the shapes differ or these are not 8-bit images.
    """
    if left.shape != right.shape or left.dtype != np.uint8 or right.dtype != np.uint8:
        raise ValueError(f"images of {left.dtype} {list(left.shape)} and {right.dtype} {list(right.shape)} do not compare")
    return float(np.sqrt(np.mean((left.astype(np.float64) - right) ** 2)) / 255.0)


def psnr(errors: Sequence[float] | np.ndarray) -> float | None:
    """Peak signal-to-noise ratio in dB of images with these RMSEs (their squares' mean); None where nothing differs."""
    mean_square = float(np.mean(np.square(errors)))
    return None if mean_square == 0.0 else -10.0 * math.log10(mean_square)


def _contingency(left: Sequence[Hashable], right: Sequence[Hashable]) -> np.ndarray:
    """How often each pair of values occurs, float64 [values of left, values of right]."""
    rows = {value: i for i, value in enumerate(dict.fromkeys(left))}
    columns = {value: i for i, value in enumerate(dict.fromkeys(right))}
    table = np.zeros((len(rows), len(columns)))
    np.add.at(table, ([rows[value] for value in left], [columns[value] for value in right]), 1.0)
    return table


def _entropy(probabilities: np.ndarray) -> float:
    present = probabilities[probabilities > 0]
    # A certain outcome has entropy 0; -(1 * log 1) would be -0.0.
    return abs(float(-(present * np.log(present)).sum()))
