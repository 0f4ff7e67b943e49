"""What the real service did, against what the simulator says of the same requests."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aptp_ray.plan.engines import Times
from aptp_ray.plan.simulate import Arrivals, Host, simulate
from aptp_ray.section import ConfigError


@dataclass(frozen=True)
class Trace:
    """Requests of one image each, as a client saw them.

    Attributes:
        arrivals: in the order of time.
        latency_s: [n] from sending to the whole answer.
    """

    arrivals: Arrivals
    latency_s: np.ndarray


def read_trace(path: str | Path) -> Trace:
    """Reads JSON lines ``{"arrival_s": 0.31, "expert": 2, "steps": 20, "latency_s": 1.9}``; lines need not be in order.

    Raises:
        ConfigError: naming the first line that is none.
    """
    rows: list[tuple[float, int, int, float]] = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            expert = int(str(row["expert"]).removeprefix("expert-"))
            rows.append((float(row["arrival_s"]), expert, int(row["steps"]), float(row["latency_s"])))
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}: not a request with arrival_s, expert, steps and latency_s ({error!r})"
            ) from error
    if not rows:
        raise ConfigError(f"{path} holds no requests")
    rows.sort()
    at, model, steps, latency = (np.array(column) for column in zip(*rows, strict=True))
    return Trace(Arrivals(at - at[0], model, steps), latency)


def compare(
    trace: Trace, hosts: list[Host], times: list[Times], *, overhead_s: float, seed: int = 0, warm_up: float = 0.05
) -> dict[str, Any]:
    """Returns measured and simulated latencies of the same requests, and their ratios.

    ``overhead_s_by_trace`` is what the fastest requests took beyond their steps alone: a hint for ``replica.overhead_ms``.
    """
    result = simulate(hosts, times, trace.arrivals, seed=seed, overhead_s=overhead_s)
    settled = result.settled(warm_up)
    figures: dict[str, Any] = {"requests": len(trace.latency_s)}
    for name, q in (("p50", 0.5), ("p95", 0.95)):
        measured = float(np.quantile(trace.latency_s[settled], q, method="higher"))
        simulated = result.quantile(q, warm_up=warm_up)
        figures[f"{name}_measured_s"], figures[f"{name}_simulated_s"] = round(measured, 4), round(simulated, 4)
        figures[f"{name}_ratio"] = round(simulated / measured, 4)
    alone = np.array([times[m][0] * s for m, s in zip(trace.arrivals.model, trace.arrivals.steps, strict=True)])
    figures["overhead_s_by_trace"] = round(float(np.quantile(np.maximum(0, trace.latency_s - alone), 0.05)), 4)
    figures["within_20_percent"] = all(abs(figures[f"{name}_ratio"] - 1) <= 0.2 for name in ("p50", "p95"))
    return figures
