"""Replays load against a fleet: discrete events, seeded; what the planner's formulas promise is checked by it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from aptp_ray.plan.choose import Plan, placement
from aptp_ray.plan.engines import Alone, Engine, Ledger, Shared, Tenant, Times
from aptp_ray.plan.fleet import Device, Fleet
from aptp_ray.plan.times import StepTimes

Policy = Literal["two_choices", "random", "round_robin"]


@dataclass(frozen=True)
class Host:
    """A device of a simulated fleet.

    Attributes:
        tenants: number of the model of each replica on it.
        lanes: replicas that run at full speed side by side.
        errand_s: core seconds of a request outside of its steps, where they run on the same cores; see ``engines.Shared``.
        turns: whether replicas take turns of a step each, as on a CPU; else they get equal times.
        refill_s: added to each step while more replicas are at work than there are lanes.
    """

    tenants: tuple[int, ...]
    lanes: int = 1
    errand_s: float = 0.0
    turns: bool = False
    refill_s: float = 0.0


@dataclass(frozen=True)
class Arrivals:
    """Requests of one image each, in the order of their arrival.

    Attributes:
        at: [n] seconds, not falling.
        model: [n] which expert the router gives it to.
        steps: [n] denoising steps.
    """

    at: np.ndarray
    model: np.ndarray
    steps: np.ndarray

    def __post_init__(self) -> None:
        if not len(self.at) == len(self.model) == len(self.steps):
            raise ValueError(f"{len(self.at)} arrivals, {len(self.model)} models, {len(self.steps)} step counts: not one each")
        if len(self.at) and (np.any(np.diff(self.at) < 0) or self.steps.min() < 1):
            raise ValueError("arrivals have to be in the order of time, with one step or more each: sort the trace")


@dataclass(frozen=True)
class Outcome:
    """What became of the requests.

    Attributes:
        arrivals: as they were.
        latency_s: [n] from arrival to the end, overhead included; NaN: refused.
        wait_s: [n] from arrival to the first step; NaN: refused.
        seconds: from the first arrival to the last end.
        busy: [hosts] part of that time in which the device was at work.
        batch_size: images in a step, mean over the steps.
    """

    arrivals: Arrivals
    latency_s: np.ndarray
    wait_s: np.ndarray
    seconds: float
    busy: np.ndarray
    batch_size: float

    @property
    def done(self) -> np.ndarray:
        """[n] whether each was drawn."""
        return ~np.isnan(self.latency_s)

    def settled(self, warm_up: float = 0.1) -> np.ndarray:
        """Returns [n] which requests came after the first part of the time, when the fleet was still filling up."""
        at = self.arrivals.at
        return at >= at[0] + warm_up * (at[-1] - at[0]) if len(at) else np.zeros(0, bool)

    def quantile(self, q: float, *, model: int | None = None, warm_up: float = 0.1) -> float:
        """Returns a quantile of the latency in seconds, a refused request counting as endless."""
        chosen = self.settled(warm_up) & (self.arrivals.model == model if model is not None else True)
        values = np.where(self.done, self.latency_s, np.inf)[chosen]
        return float(np.quantile(values, q, method="higher")) if len(values) else math.nan

    def attainment(self, limit_s: float) -> float:
        """Returns the share of the settled requests that ended within a limit."""
        chosen = self.settled()
        return float(np.mean(np.where(self.done, self.latency_s, np.inf)[chosen] <= limit_s)) if chosen.any() else 1.0


def poisson(
    rate: float, seconds: float, shares: Sequence[float], steps: Mapping[int, float], seed: int, *, purpose: int = 0
) -> Arrivals:
    """Returns arrivals of a Poisson process, each with an expert by share and a step count by its share."""
    draw = np.random.default_rng((seed, purpose))
    count = int(draw.poisson(rate * seconds))
    at = np.sort(draw.uniform(0.0, seconds, count))  # given their number, arrivals are uniform
    probabilities = np.asarray(shares, float) / np.sum(shares)
    mix = np.array(list(steps.values()), float)
    return Arrivals(
        at,
        draw.choice(len(probabilities), count, p=probabilities),
        np.array(list(steps))[draw.choice(len(mix), count, p=mix / mix.sum())],
    )


def simulate(
    hosts: Sequence[Host],
    times: Sequence[Times],
    arrivals: Arrivals,
    *,
    seed: int = 0,
    policy: Policy = "two_choices",
    overhead_s: float = 0.0,
    room: int | None = None,
) -> Outcome:
    """Runs the arrivals through the fleet until the last is drawn.

    Args:
        hosts: devices with their replicas.
        times: of each model: seconds of a step with 1, 2, ... images.
        arrivals: the load.
        seed: of the dispatch.
        policy: which of an expert's replicas gets a request. two_choices: the less loaded of two drawn at random, as Ray
            Serve's default does it; round_robin of constant service is one line before all of them.
        overhead_s: of each request outside of its steps.
        room: images that one replica takes in, its batch included; more are refused. None: no bound.

    Raises:
        ValueError: if a model that is asked for has no replica.
    """
    ledger = Ledger(arrivals.steps.tolist())
    devices, pools = _build(hosts, times, ledger)
    used: list[int] = np.unique(arrivals.model).tolist()
    empty = [model for model in used if not (0 <= model < len(pools) and pools[model])]
    if empty:
        raise ValueError(f"no replica of model {empty[0]}, which {int(np.sum(arrivals.model == empty[0]))} requests ask for")
    _dispatch(pools, arrivals, policy, math.inf if room is None else room, np.random.default_rng((seed, 1)))
    for device in devices:
        device.advance(math.inf)
    finished, admitted = np.array(ledger.finished), np.array(ledger.admitted)
    engines = [engine for pool in pools for engine in pool]
    errands = max(host.errand_s for host in hosts)  # whose end is not counted to a request, unless it is held up
    seconds = float(np.nanmax(finished) + errands - arrivals.at[0]) if np.isfinite(finished).any() else 0.0
    steps = sum(engine.batch_steps for engine in engines)
    return Outcome(
        arrivals,
        finished - arrivals.at + overhead_s,
        admitted - arrivals.at,
        seconds,
        np.array([device.busy_s for device in devices]) / max(seconds, 1e-12),
        sum(engine.image_steps for engine in engines) / max(1, steps),
    )


def _build(hosts: Sequence[Host], times: Sequence[Times], ledger: Ledger) -> tuple[list[Alone | Shared], list[list[Engine]]]:
    """Returns the devices, and each model's engines."""
    pools: list[list[Engine]] = [[] for _ in times]
    devices: list[Alone | Shared] = []
    for host in hosts:
        if len(host.tenants) == 1 and not host.errand_s:
            alone = Alone(times[host.tenants[0]], ledger)
            devices.append(alone)
            pools[host.tenants[0]].append(alone)
            continue
        shared = Shared(host.lanes, host.errand_s, host.turns, host.refill_s)
        devices.append(shared)
        for model in host.tenants:
            pools[model].append(Tenant(times[model], ledger, shared))
    return devices, pools


def _dispatch(
    pools: list[list[Engine]], arrivals: Arrivals, policy: Policy, room: float, draw: np.random.Generator
) -> None:
    """Hands every request to an engine. Engines that nobody looks at do not move: that is where the speed comes from."""
    first, second = draw.random((2, len(arrivals.at))).tolist()
    turns = [0] * len(pools)
    for request, (now, model) in enumerate(zip(arrivals.at.tolist(), arrivals.model.tolist(), strict=True)):
        pool = pools[model]
        size = len(pool)
        if size == 1:
            engine = pool[0]
            engine.advance(now)
        elif policy == "two_choices":
            one = int(first[request] * size)
            other = int(second[request] * (size - 1))
            engine, rival = pool[one], pool[other + (other >= one)]
            engine.advance(now)
            rival.advance(now)
            if rival.load < engine.load:
                engine = rival
        else:
            if policy == "random":
                engine = pool[int(first[request] * size)]
            else:
                engine = pool[turns[model] % size]
                turns[model] += 1
            engine.advance(now)
        if engine.load < room:
            engine.arrive(request, now)


def fleet_of(plan: Plan) -> tuple[list[Host], list[Times]]:
    """Returns the hosts and step times of a plan at its target load."""
    hosts = [host_of(device, tenants, plan.fleet) for device, tenants in placement(plan)]
    return hosts, [simulated_times(part.option.times, part.option.device) for part in plan.parts]


def host_of(device: Device, tenants: Sequence[int], fleet: Fleet) -> Host:
    """Returns a device as the simulator takes it."""
    errand_s = 0.0 if device.gpu else fleet.replica.side_ms / 1000
    return Host(tuple(tenants), device.lanes, errand_s, turns=not device.gpu, refill_s=device.refill_ms / 1000)


def simulated_times(times: StepTimes, device: Device) -> Times:
    """Returns step times as the simulator takes them: on a CPU, what is done beside the steps is an errand of its own."""
    return times.seconds if device.gpu else times.steps_alone


def check(plan: Plan, *, requests: int = 20_000, seed: int = 0, rate: float | None = None) -> Outcome:
    """Simulates a plan under Poisson load at its target, or at another rate."""
    load = plan.fleet.load
    rate = load.images_per_s if rate is None else rate
    hosts, times = fleet_of(plan)
    shares = [part.option.model.share for part in plan.parts]
    arrivals = poisson(rate, requests / rate, shares, load.mix(), seed)
    return simulate(hosts, times, arrivals, seed=seed, overhead_s=plan.fleet.replica.overhead_ms / 1000)
