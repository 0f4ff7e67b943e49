"""For one expert on one kind of device: the least replicas, and the least share of a device for each, that keep the promise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from aptp_ray.plan.expectation import Expectation, expect
from aptp_ray.plan.fleet import Device, Fleet
from aptp_ray.plan.times import Model, StepTimes

# Powers of two: shares that sum up to whole devices can then always be placed on so many (see ``placement``).
FRACTIONS = (1.0, 0.5, 0.25, 0.125, 0.0625)


@dataclass(frozen=True)
class Option:
    """One way to serve an expert.

    Attributes:
        model: the expert.
        device: its kind.
        times: of its steps there.
        fraction: of a device, for each replica; covers its memory, its CPUs and its load.
        replicas: at the target load.
        expectation: of its requests, without what a request takes outside of its steps.
    """

    model: Model
    device: Device
    times: StepTimes
    fraction: float
    replicas: int
    expectation: Expectation

    @property
    def devices(self) -> float:
        """Devices that it fills, together."""
        return self.fraction * self.replicas


def best_option(model: Model, device: Device, times: StepTimes, fleet: Fleet, objective_s: float) -> Option | None:
    """Returns the option that fills the fewest devices, or None if the kind cannot keep the promise.

    Args:
        model: with its share of the traffic.
        device: a kind.
        times: of the model on it.
        fleet: load, utilisation and what a replica needs.
        objective_s: 95th percentile to stay below, in seconds.
    """
    found: list[Option] = []
    for fraction in FRACTIONS:
        if model.memory_gb > fraction * device.memory_gb or fleet.replica.cpus > fraction * device.cpus:
            break  # smaller ones hold it even less
        # A bound from the load alone spares the formula where another fraction already does better.
        least = _by_load(model, device, times, fraction, fleet, 1.0)
        if found and least * fraction >= min(option.devices for option in found):
            continue
        option = at_load(model, device, times, fraction, fleet, objective_s)
        if option is not None:
            found.append(option)
    # Of equals the one with the larger share: it depends the least on its neighbours.
    return min(found, key=lambda option: (option.devices, -option.fraction), default=None)


def at_load(
    model: Model, device: Device, times: StepTimes, fraction: float, fleet: Fleet, objective_s: float, load: float = 1.0
) -> Option | None:
    """Returns the least replicas of a given share that keep the promise at ``load`` times the target, or None."""
    most = math.floor(device.available / fraction)
    idle = times.seconds[0] * max(fleet.load.mix())
    if idle + fleet.replica.overhead_ms / 1000 > objective_s:
        return None  # not even alone

    def option(replicas: int) -> Option | None:
        expectation = expect(
            model.share * fleet.load.images_per_s * load,
            fleet.load.mix(),
            times,
            replicas,
            lanes=device.lanes,
            tenants=round(1 / fraction),
        )
        if expectation is None or expectation.quantile(0.95) + fleet.replica.overhead_ms / 1000 > objective_s:
            return None
        return Option(model, device, times, fraction, replicas, expectation)

    low = _by_load(model, device, times, fraction, fleet, load)
    if low > most:
        return None
    high, best = low, option(low)
    while best is None and high < most:
        low, high = high + 1, min(most, 2 * high)
        best = option(high)
    while best is not None and low < high:
        middle = (low + high) // 2
        found = option(middle)
        if found is None:
            low = middle + 1
        else:
            best, high = found, middle
    return best


def _by_load(model: Model, device: Device, times: StepTimes, fraction: float, fleet: Fleet, load: float) -> int:
    """Replicas whose shares of a device carry the load at the utilisation that is allowed."""
    mean_steps = sum(count * share for count, share in fleet.load.mix().items())
    work = model.share * fleet.load.images_per_s * load * mean_steps / times.images_steps_per_s  # devices at full speed
    share = min(1.0, fraction * device.lanes)
    return max(fleet.replica.least, math.ceil(work / (share * fleet.objective.utilisation) - 1e-9))
