"""The plan: a kind of device for each expert, so that all together cost the least; a mixed-integer program by HiGHS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aptp_ray.plan.expectation import weighted_quantile
from aptp_ray.plan.fleet import Device, Fleet
from aptp_ray.plan.options import Option, at_load, best_option
from aptp_ray.plan.times import Model, StepTimes, step_times
from aptp_ray.section import UserError

_TIME_LIMIT_S = 4.0
_GAP = 1e-3  # relative, at which the search may end


class PlanError(UserError, ValueError):
    """No plan keeps the promise with what is at hand."""


@dataclass(frozen=True)
class Part:
    """One expert's part of a plan: an option, and how far it may scale."""

    option: Option
    min_replicas: int
    max_replicas: int


@dataclass(frozen=True)
class Plan:
    """What to deploy.

    Attributes:
        fleet: what it was made for.
        parts: one an expert, in their order.
        devices: name -> how many, at the target load.
        gap: relative difference between its cost and the least that the solver could not exclude.
    """

    fleet: Fleet
    parts: tuple[Part, ...]
    devices: dict[str, int]
    gap: float

    @property
    def cost_per_hour(self) -> float:
        prices = {device.name: device.price_per_hour for device in self.fleet.devices}
        return sum(prices[name] * count for name, count in self.devices.items())

    def quantile(self, q: float) -> float:
        """Returns an expected quantile of all requests' latency, in seconds."""
        found = [(part.option.expectation, part.option.model.share) for part in self.parts]
        values = np.concatenate([expectation.latency_s for expectation, _ in found])
        weights = np.concatenate([share * expectation.weight for expectation, share in found])
        return weighted_quantile(values, weights, q) + self.fleet.replica.overhead_ms / 1000


def make_plan(fleet: Fleet, models: Sequence[Model], teacher_macs: int, *, objective_s: float | None = None) -> Plan:
    """Returns the cheapest plan.

    Args:
        fleet: load, objective, devices.
        models: the experts, with their shares.
        teacher_macs: of one call with one row, for estimates.
        objective_s: to plan for, in place of the fleet's.

    Raises:
        PlanError: if there is none; says which expert, and what would help.
    """
    objective_s = fleet.objective.p95_s if objective_s is None else objective_s
    times = {(m.name, d.name): step_times(m, d, fleet, teacher_macs) for m in models for d in fleet.devices}
    options: list[Option] = []
    for model in models:
        found = [best_option(model, d, times[model.name, d.name], fleet, objective_s) for d in fleet.devices]
        kept = [option for option in found if option is not None]
        if not kept:
            raise PlanError(_nothing_fits(model, fleet, times, objective_s))
        options += kept
    chosen, devices, gap = _solve(fleet, models, options)
    return Plan(fleet, tuple(_part(option, fleet, objective_s) for option in chosen), devices, gap)


def _solve(fleet: Fleet, models: Sequence[Model], options: list[Option]) -> tuple[list[Option], dict[str, int], float]:
    """Picks one option a model: min sum_d price_d n_d, subject to sum of shares on d <= n_d <= available_d, n_d whole."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    count, kinds = len(options), list(fleet.devices)
    index = {device.name: number for number, device in enumerate(kinds)}
    rank = {model.name: number for number, model in enumerate(models)}
    of_model = np.array([rank[option.model.name] for option in options])
    of_device = np.array([index[option.device.name] for option in options])
    shares = np.array([option.devices for option in options])
    columns = np.arange(count)
    one_each = csr_array((np.ones(count), (of_model, columns)), shape=(len(models), count + len(kinds)))
    rows = np.concatenate([of_device, np.arange(len(kinds))])
    filled = csr_array(
        (np.concatenate([shares, -np.ones(len(kinds))]), (rows, np.arange(count + len(kinds)))),
        shape=(len(kinds), count + len(kinds)),
    )
    prices = np.array([device.price_per_hour for device in kinds])
    # Among plans of one price, the faster one.
    latency = np.array([option.expectation.quantile(0.95) for option in options])
    tie = 1e-4 * prices.min() * latency / (latency.max() * len(models))
    result = milp(
        np.concatenate([tie, prices]),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(filled, -np.inf, 0)],
        integrality=np.ones(count + len(kinds)),
        bounds=Bounds(0, np.concatenate([np.ones(count), [device.available for device in kinds]])),
        options={"time_limit": _TIME_LIMIT_S, "mip_rel_gap": _GAP},
    )
    if result.x is None:
        raise PlanError(_too_few(fleet, options))
    picked = [options[number] for number in np.flatnonzero(result.x[:count] > 0.5)]
    picked.sort(key=lambda option: rank[option.model.name])
    filled_by = {device.name: sum(o.devices for o in picked if o.device.name == device.name) for device in kinds}
    devices = {name: int(np.ceil(total - 1e-9)) for name, total in filled_by.items() if total > 0}
    return picked, devices, float(getattr(result, "mip_gap", 0.0) or 0.0)


def _part(option: Option, fleet: Fleet, objective_s: float) -> Part:
    def replicas(load: float) -> int | None:
        found = at_load(option.model, option.device, option.times, option.fraction, fleet, objective_s, load)
        return None if found is None else found.replicas

    # What the surge would need may not be there: then all that is.
    most = replicas(fleet.load.surge) or int(option.device.available / option.fraction)
    least = replicas(fleet.load.quiet) or option.replicas
    return Part(option, min(least, option.replicas), max(most, option.replicas))


def _nothing_fits(model: Model, fleet: Fleet, times: dict[tuple[str, str], StepTimes], objective_s: float) -> str:
    reasons = []
    for device in fleet.devices:
        idle = times[model.name, device.name].seconds[0] * max(fleet.load.mix()) + fleet.replica.overhead_ms / 1000
        if model.memory_gb > device.memory_gb:
            reasons.append(f"{device.name}: {model.memory_gb:.1f} GB do not fit into {device.memory_gb:g}")
        elif fleet.replica.cpus > device.cpus:
            reasons.append(f"{device.name}: replica.cpus={fleet.replica.cpus:g}, but {device.cpus:g} come with one")
        elif idle > objective_s:
            reasons.append(f"{device.name}: an image alone takes {idle:.2f} s")
        else:
            reasons.append(f"{device.name}: {device.available} are too few for its share of the load")
    return (
        f"{model.name} cannot keep a 95th percentile of {objective_s:.2f} s anywhere ({'; '.join(reasons)}): "
        "raise objective.p95_s, draw fewer load.steps, or add faster or more devices"
    )


def _too_few(fleet: Fleet, options: list[Option]) -> str:
    needs = {}
    for device in fleet.devices:
        alone = [option.devices for option in options if option.device.name == device.name]
        needs[device.name] = f"{device.available} {device.name} (all experts would fill {sum(alone):.1f})"
    return f"not enough devices: {', '.join(needs.values())}: raise devices.available, or lower load.images_per_s"


def placement(plan: Plan) -> list[tuple[Device, list[int]]]:
    """Returns every device with the experts (by number) of the replicas on it.

    Shares are powers of two and placed from the largest down, so what is free on a device is always a multiple of the next
    one's size: whatever sums up to n devices fits on n. Replicas of one expert keep apart where they can.
    """
    placed: list[tuple[Device, list[int]]] = []
    free: list[float] = []
    order = sorted(range(len(plan.parts)), key=lambda number: -plan.parts[number].option.fraction)
    for number in order:
        option = plan.parts[number].option
        for _ in range(option.replicas):
            able = [
                at
                for at, (device, _) in enumerate(placed)
                if device.name == option.device.name and free[at] >= option.fraction - 1e-9
            ]
            if able:
                at = min(able, key=lambda at: (placed[at][1].count(number), free[at], at))
            else:
                at = len(placed)
                placed.append((option.device, []))
                free.append(1.0)
            placed[at][1].append(number)
            free[at] -= option.fraction
    return placed
