"""How much a score would move with other captions: bootstrap over captions, paired between systems.

All scores of a comparison see the same draws, so that a difference between two systems, which drew the same captions from the
same noise, is judged on the same captions too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from aptp_ray.core.randomness import key_seed
from aptp_ray.evaluate.distances import Score


@dataclass(frozen=True)
class Estimate:
    """A score of a whole set, with an interval that covers 95 % of what other captions would give.

    Attributes:
        value: on the captions at hand.
        low: lower end.
        high: upper end.
    """

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def draws(count: int, replicates: int, *, seed: int) -> np.ndarray:
    """How often each of ``count`` captions occurs in each replicate: float64 [replicates, count], rows adding up to count.

    Raises:
        ValueError: if there are fewer than two captions or no replicates.
    """
    if count < 2 or replicates < 1:
        raise ValueError(f"{replicates} replicates of {count} captions: a bootstrap needs 1 of 2 at least")
    generator = np.random.default_rng(key_seed(seed, "bootstrap", count))
    return generator.multinomial(count, np.full(count, 1.0 / count), size=replicates).astype(np.float64)


def replicate(score: Score, counts: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, np.ndarray]:
    """Evaluates a score on the whole set and on each replicate.

    Args:
        score: of n samples.
        counts: [replicates, n], from :func:`draws`.
        weights: [n] what each sample counts anyway, e.g. by its expert's traffic; None: the same.

    Returns:
        its value, and [replicates].
    """
    base = np.ones(counts.shape[1]) if weights is None else np.asarray(weights, dtype=np.float64)
    total = base.sum()
    values = []
    for count in counts:
        mass = base * count
        # A replicate that missed what has weight cannot be judged; there is hardly one among a hundred captions.
        values.append(score(mass * (total / mass.sum())) if mass.sum() > 0 else np.nan)
    return score(base), np.array(values)


def estimate(value: float, replicates: np.ndarray, *, level: float = 0.95) -> Estimate:
    """The interval of a score: its value, moved by the replicates' spread about their own mean.

    A plain percentile interval would not hold the value itself where a score is biased on few samples: a replicate has only
    63 % of the captions, and a Frechet distance grows as samples get fewer. Taking the replicates' mean off takes that bias off.
    """
    found = replicates[np.isfinite(replicates)]
    if not len(found):
        return Estimate(value, float("nan"), float("nan"))
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2]) - found.mean()
    return Estimate(value, value + float(low), value + float(high))


def difference(first: tuple[float, np.ndarray], second: tuple[float, np.ndarray]) -> Estimate:
    """The paired difference of two scores (first minus second) that saw the same draws.

    Raises:
        ValueError: if they saw another number of replicates.
    """
    if first[1].shape != second[1].shape:
        raise ValueError(f"{len(first[1])} and {len(second[1])} replicates: differences are paired, draw both from the same")
    return estimate(first[0] - second[0], first[1] - second[1])


def traffic_weights(experts: Sequence[int], shares: Sequence[float]) -> np.ndarray:
    """Weights by which samples stand for the traffic: each expert's samples count by its share, n in all.

    Args:
        experts: [n], who drew each sample.
        shares: [K] of the traffic; they add up to one.

    Raises:
        ValueError: if an expert with traffic drew no sample.
    """
    counts = np.bincount(np.asarray(experts, dtype=np.int64), minlength=len(shares)).astype(np.float64)
    wanted = np.asarray(shares, dtype=np.float64)
    if len(counts) > len(wanted) or ((counts == 0) & (wanted > 0)).any():
        missing = [index for index in range(len(wanted)) if counts[index] == 0 and wanted[index] > 0]
        raise ValueError(f"experts {missing} have traffic but drew no image: raise evaluation.images")
    scale = np.divide(wanted * len(experts), counts, out=np.zeros_like(wanted), where=counts > 0)
    return scale[np.asarray(experts, dtype=np.int64)]


def differences(values: dict[str, tuple[float, np.ndarray]], against: str) -> dict[str, Any]:
    """{system: paired difference to system ``against``}; of two that do not differ, the interval holds 0."""
    return {name: difference(one, values[against]).to_json() for name, one in values.items() if name != against}
