"""What a mixture carries on 1 to thousands of GPUs, against two other fleets of the same size; all of it simulated.

The three fleets have the same GPUs, the same requests and the same promise: 95 % of the requests within a multiple of what the
teacher takes for one alone.

- single: the teacher on every GPU; any GPU may take any request.
- mixture: K experts with their own step times; a request goes to a replica of its expert.
- unrelated: K models that know nothing of one another, each of the teacher's size, routed with the same shares: what the mixture
  would be if its experts were not pruned from one teacher under one budget. Loading times and models that are seldom asked for,
  which such fleets also pay for, are left out in its favour.

Shares of the traffic are taken as known and steady, replicas as always up, and the network, the routers and Serve's controller as
no bottleneck: one controller of thousands of replicas is beyond what this says anything about.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aptp_ray.plan.engines import Times
from aptp_ray.plan.simulate import Arrivals, Host, poisson, simulate
from aptp_ray.plan.times import StepTimes

GPUS = (1, 8, 64, 512, 4096)
ATTAINMENT = 0.95
_SLO = 3.0  # times what the teacher takes for a request alone
_REQUESTS = 12_000  # at least, of one simulation
_SPAN = 15.0  # at least: times what the teacher takes for a request alone
_ROUNDS = 7  # of bisection: the rate is known within 1 %
_MANY = 64  # GPUs from which sharing them among experts is not tried: whole ones divide finely enough


@dataclass(frozen=True)
class Workload:
    """What is asked of all fleets.

    Attributes:
        shares: of the experts in the traffic.
        steps: share of requests by their denoising steps.
        teacher: its step times.
        experts: [K] theirs.
        seed: of arrivals and dispatch.
    """

    shares: Sequence[float]
    steps: Mapping[int, float]
    teacher: StepTimes
    experts: Sequence[StepTimes]
    seed: int = 0

    @property
    def alone_s(self) -> float:
        """What the teacher takes for a mean request on an idle device."""
        return self.teacher.seconds[0] * sum(count * share for count, share in self.steps.items())


def compare_fleets(work: Workload, gpus: Sequence[int] = GPUS, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Returns images a second and GPU of the three fleets at each size, and what the issue of scale comes down to."""
    experts = [times.seconds for times in work.experts]
    full = [work.teacher.seconds] * len(experts)
    rows = []
    for count in gpus:
        row: dict[str, Any] = {"gpus": count}
        row["single"], _ = best_rate(work, count, [1.0], [work.teacher.seconds])
        row["mixture"], row["mixture_tenants"] = best_rate(work, count, work.shares, experts)
        row["unrelated"], row["unrelated_tenants"] = best_rate(work, count, work.shares, full)
        row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
        rows.append(row)
        say(
            f"{count:>5} GPUs, images/s and GPU: single {row['single']:.3f}, mixture {row['mixture']:.3f} "
            f"({_ratio(row, 'single')}), unrelated {row['unrelated']:.3f}"
        )
    by_size = {row["gpus"]: row for row in rows}
    figures: dict[str, Any] = {"slo_s": round(_SLO * work.alone_s, 3), "attainment": ATTAINMENT, "rows": rows}
    if 8 in by_size and 4096 in by_size and by_size[8]["mixture"]:
        figures["per_gpu_4096_vs_8"] = round(by_size[4096]["mixture"] / by_size[8]["mixture"], 4)
    return figures


def _ratio(row: dict[str, Any], base: str) -> str:
    return f"{row['mixture'] / row[base]:.2f}x" if row[base] else "-"


def best_rate(work: Workload, gpus: int, shares: Sequence[float], times: Sequence[Times]) -> tuple[float, int]:
    """Returns the highest rate that keeps the promise, in images a second and GPU, and the replicas that share a GPU for it."""
    kinds = len(times)
    tenants = [1] if gpus >= _MANY or kinds == 1 else sorted({1, 2, 4, kinds})
    able = [count for count in tenants if count * gpus >= kinds and count <= max(kinds, 1)]
    return max((_highest_rate(work, fleet(gpus, count, shares, times), shares, times), count) for count in able)


def fleet(gpus: int, tenants: int, shares: Sequence[float], times: Sequence[Times]) -> list[Host]:
    """Deals replicas to GPUs: of each model as its work asks for, one at least; no two of one on a GPU if possible."""
    work = [share * of[-1] / len(of) for share, of in zip(shares, times, strict=True)]
    replicas = [1] * len(work)
    slots = gpus * tenants
    total = sum(work)
    # Whole numbers in proportion first, then one by one to the model whose replicas have the most to do.
    replicas = [max(1, math.floor(slots * part / total)) for part in work]
    while sum(replicas) > slots:  # the least that each needs was more than its part
        able = [k for k in range(len(work)) if replicas[k] > 1]
        replicas[min(able, key=lambda k: work[k] / (replicas[k] - 1))] -= 1
    while sum(replicas) < slots:
        replicas[max(range(len(work)), key=lambda k: work[k] / replicas[k])] += 1
    dealt = [model for model, count in enumerate(replicas) for _ in range(count)]
    return [Host(tuple(dealt[gpu::gpus])) for gpu in range(gpus)]


def _highest_rate(work: Workload, hosts: list[Host], shares: Sequence[float], times: Sequence[Times]) -> float:
    """Bisects between no load and what full batches everywhere could carry."""
    mean_steps = sum(count * share for count, share in work.steps.items())
    # GPUs of each model; tenants of one share it.
    held = [sum(host.tenants.count(k) / len(host.tenants) for host in hosts) for k in range(len(times))]
    if len(hosts[0].tenants) > 1:  # what one leaves, its neighbours take
        most = len(hosts) / sum(share * of[-1] / len(of) for share, of in zip(shares, times, strict=True))
    else:
        most = min(gpus * len(of) / of[-1] / share for gpus, of, share in zip(held, times, shares, strict=True) if share)
    low, high = 0.0, most / mean_steps
    for _ in range(_ROUNDS):
        rate = (low + high) / 2
        kept = _attainment(work, hosts, shares, times, rate) >= ATTAINMENT
        low, high = (rate, high) if kept else (low, rate)
    return low / len(hosts)


def _attainment(work: Workload, hosts: list[Host], shares: Sequence[float], times: Sequence[Times], rate: float) -> float:
    seconds = max(_REQUESTS / rate, _SPAN * work.alone_s)
    arrivals: Arrivals = poisson(rate, seconds, shares, work.steps, work.seed)
    return simulate(hosts, times, arrivals, seed=work.seed).attainment(_SLO * work.alone_s)
