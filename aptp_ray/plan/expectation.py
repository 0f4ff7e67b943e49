"""What users of one expert can expect, by a formula: the planner asks it thousands of times; the simulator checks its answers.

An engine that denoises all its images by one step at a time is a processor-sharing queue whose speed depends on how many
are there: with n images each advances a step in t(n) seconds, so images leave at the rate n / (S t(n)) up to a full batch, and
wait in line beyond it. Such a queue with Poisson arrivals has the stationary distribution of a birth-death chain, whatever the
distribution of the steps S behind their mean (the insensitivity of symmetric queues, Kelly, "Reversibility and Stochastic
Networks", section 3.3; exact up to a full batch, an approximation beyond it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from aptp_ray.plan.times import StepTimes

_TAIL = 1e-6  # of probability, that is left out
_MOST_STATES = 1_000_000


@dataclass(frozen=True)
class Expectation:
    """Of one expert's requests.

    Attributes:
        latency_s: values that a request's latency takes, by what it finds on arrival.
        weight: their probabilities; sum to one.
        utilisation: load over what full batches carry.
        busy: probability that a replica is at work.
        in_flight: images with one replica, mean.
    """

    latency_s: np.ndarray
    weight: np.ndarray
    utilisation: float
    busy: float
    in_flight: float

    def quantile(self, q: float) -> float:
        """Returns a quantile of the latency, in seconds."""
        return weighted_quantile(self.latency_s, self.weight, q)


def weighted_quantile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    """Returns the least value up to which the weights sum to ``q`` of their total."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    return float(values[order][min(len(values) - 1, int(np.searchsorted(total, q * total[-1])))])


def expect(
    rate: float, steps: Mapping[int, float], times: StepTimes, replicas: int, *, lanes: int = 1, tenants: int = 1
) -> Expectation | None:
    """Returns what a pool of like replicas gives, or None if it cannot carry the load.

    The pool is taken as balanced: the two-choices dispatch of Ray Serve keeps queue lengths within about one of each other.

    Args:
        rate: images a second, over all replicas.
        steps: share of the images by denoising steps.
        times: of the model on the device.
        replicas: of the pool.
        lanes: replicas that a device runs side by side at full speed.
        tenants: replicas that share one device, this one included; the others are taken to be as busy as this one.
    """
    mean_steps = sum(count * share for count, share in steps.items())
    utilisation = rate * mean_steps * max(1.0, tenants / lanes) / (replicas * times.images_steps_per_s)
    if utilisation >= 1:
        return None
    stretch = max(1.0, tenants / lanes)
    if tenants > lanes:
        # Others are at work only now and then: from full speed up to the fixed point.
        stretch = 1.0
        for _ in range(8):
            chain = _chain(rate * stretch, mean_steps, times, replicas)
            busy = 1.0 if chain is None else _busy(chain, replicas)
            before, stretch = stretch, 0.5 * (stretch + max(1.0, (1 + (tenants - 1) * busy) / lanes))
            if abs(stretch - before) < 0.02 * stretch:
                break
    # Time in units of the stretched step: arrivals come so much the faster.
    chain = _chain(rate * stretch, mean_steps, times, replicas)
    if chain is None:
        return None
    found = np.arange(len(chain))  # images that an arrival finds in the pool
    seconds = np.asarray(times.seconds) * stretch
    batch = np.minimum(found // replicas, times.limit - 1)  # index of its batch's size, itself included
    wait = np.maximum(0, found - replicas * times.limit + 1) * mean_steps * seconds[-1] / (replicas * times.limit)
    # The chain's line is that of exponential service; steps vary less (Allen and Cunneen's factor, (1 + cv^2) / 2).
    wait *= (1 + sum(share * (count / mean_steps - 1) ** 2 for count, share in steps.items())) / 2
    # An arrival waits for the step under way: half of it on average, where there is one.
    wait = wait + np.where(found >= replicas, 0.5, 0.5 * found / replicas) * seconds[np.maximum(0, batch - 1)]
    counts = np.array(list(steps))
    latency = wait[:, None] + counts[None, :] * seconds[batch][:, None]  # [states, step counts]
    weight = chain[:, None] * np.array(list(steps.values()))[None, :]
    return Expectation(
        latency.ravel(), weight.ravel(), utilisation, _busy(chain, replicas), float(chain @ found) / replicas
    )


def _busy(chain: np.ndarray, replicas: int) -> float:
    return float(chain @ np.minimum(1.0, np.arange(len(chain)) / replicas))


def _chain(rate: float, mean_steps: float, times: StepTimes, replicas: int) -> np.ndarray | None:
    """Stationary probabilities of 0, 1, 2, ... images in a balanced pool; None if they would grow without end."""
    # Images a second that leave a replica with 0, 1, ... images.
    leave = np.concatenate([[0.0], np.arange(1, times.limit + 1) / (mean_steps * np.asarray(times.seconds))])
    # A larger batch may leave no faster; it holds for all states beyond.
    most = replicas * leave[-1]
    if rate >= most:
        return None
    full = replicas * times.limit
    tail = math.ceil(math.log(_TAIL) / math.log(rate / most))
    if full + tail > _MOST_STATES:
        return None  # so near to saturation that nobody would plan for it
    images = np.arange(1, full + 1) / replicas
    low = np.floor(images).astype(int)
    part = images - low
    rates = replicas * ((1 - part) * leave[low] + part * leave[np.minimum(low + 1, times.limit)])
    steps = np.concatenate([np.log(rate) - np.log(rates), np.full(tail, math.log(rate / most))])
    logs = np.concatenate([[0.0], np.cumsum(steps)])
    chain = np.exp(logs - logs.max())
    return np.asarray(chain / chain.sum())
