"""The simulator of ``jobs/plan.py`` against the service that it stands for: the demo's, on this machine, under random arrivals.

What the simulator is told is measured on the service itself, beforehand: step times of each expert by batch while it is alone,
what a request takes outside of its steps, and, from a backlog that saturates the service, how much longer steps are while experts
alternate on the cores. A round measures, then replays a trace at each load: other tenants of a machine change its speed, from one
ten minutes to the next by more than what is to be shown. No figure is fitted to the traces that it is judged by. With ``--out``
all of it is kept as files that ``jobs/plan.py RUN_DIR OUT/0/fleet.yaml --trace OUT/0/trace-0.6.jsonl --deployed`` takes.
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from ray import serve

from aptp_ray.artifacts import RunDir, load_run
from aptp_ray.config import Config
from aptp_ray.core.batch_profile import BatchProfile, candidate_sizes, device_name
from aptp_ray.plan.fleet import load_fleet
from aptp_ray.plan.simulate import Arrivals, Host, simulate
from aptp_ray.plan.sources import models_of
from aptp_ray.plan.trace import compare, read_trace
from aptp_ray.serve.expert import Expert
from aptp_ray.serve.run import APP_NAME, stop
from benchmarks.serve import started
from benchmarks.serve_clients import GENERATE, STEPS, Answer, Client, backlog, poisson
from benchmarks.serve_cpu import cpu_seconds
from benchmarks.serve_run import cut_run, demo_prompts
from benchmarks.simulator_scale import planner_seconds, requests_per_second, scaled
from cli import ray_session
from plan import deployed

_LOADS = (0.3, 0.6, 0.8)  # of the saturated service's requests per second
_ROUNDS, _TRACE_S = 3, 15.0
_REPEATS, _STEPS = 2, 20  # of the calibration: of every size, and of every image
_BACKLOG, _BATCH = 64, 8  # the batch as in jobs/configs/openmoji.yaml
_IDLE = 12  # requests, one after another
_MOST_REFILL_S = 0.2

Say = Callable[[str], None]


@dataclass(frozen=True)
class Calibration:
    """What the simulator is told of the service.

    Attributes:
        profiles: of each expert, by its deployment's name: whole steps of the engine, not the UNet's alone.
        lanes: experts that denoise at the same time (see ``serve/turns.py``).
        refill_ms: of a step while more are at work; see :func:`refill_of`.
        overhead_ms: of a request, outside of its steps.
        side_ms: CPU time of a request, outside of its steps.
        images_per_s: of the saturated service.
    """

    profiles: dict[str, BatchProfile]
    lanes: int
    refill_ms: float
    overhead_ms: float
    side_ms: float
    images_per_s: float


def measure(say: Say, run_dir: str | None = None, out: str | None = None) -> dict[str, Any]:
    """Measures the service, replays traces to it, and simulates them.

    Args:
        say: writes a line for people.
        run_dir: a finished run of the demo; by default, one is cut from the shipped teacher.
        out: folder to keep each round's fleet file, profiles and traces in.
    """
    os.environ["RAY_worker_niceness"] = "0"  # as for the topic serve
    with tempfile.TemporaryDirectory() as folder:
        run, config = load_run(run_dir if run_dir else cut_run(f"{folder}/run").uri)
        rounds = [Path(out or f"{folder}/out") / str(number) for number in range(_ROUNDS)]
        rate = 0.0
        with ray_session(config):
            address = started(run, Expert, {"max_batch_size": _BATCH})
            try:
                for number, kept in enumerate(rounds):
                    kept.mkdir(parents=True, exist_ok=True)
                    found = asyncio.run(calibrate(address, run, config, number, say))
                    rate = rate or found.images_per_s
                    for load in _LOADS:
                        answers = asyncio.run(replayed(address, load * rate, 10 * number + round(10 * load)))
                        write_trace(kept / trace_name(load), answers)
                    write_fleet(kept, found)
            finally:
                stop()
        figures = judged(rounds, run, config, say)
    scale = scaled(say)
    return figures | {"planner_s": planner_seconds(say), "simulated_requests_per_s": requests_per_second(say)} | scale


# -- the service ---------------------------------------------------------------------------------------------------------


async def calibrate(address: str, run: RunDir, config: Config, number: int, say: Say) -> Calibration:
    """Asks for images of one expert alone, of an idle service, and for more at once than it can draw; other texts each round."""
    names = [f"expert-{entry['id']}" for entry in run.read_json("routing.json")["experts"]]
    lanes = max(1, (os.cpu_count() or 1) // config.serve.threads_per_expert)
    client, first = Client(address), number * (8 + _BACKLOG + _IDLE)
    await client.replay(backlog(8, first=first))
    profiles = await _profiles(client, names, say)
    idle = await _idle(client, first + 8 + _BACKLOG)
    over = [a.seconds * 1000 - a.ask.steps * profiles[a.facts["model"]].step_ms(1) for a in idle]
    before = cpu_seconds()
    answers = await client.replay(backlog(_BACKLOG, first=first + 8))
    after = cpu_seconds()
    cpu = {part: 1000 * (after[part] - before.get(part, 0.0)) / len(answers) for part in after}
    outside = sum(ms for part, ms in cpu.items() if part != "experts")
    # Texts are encoded while their request is in line; images are decoded beside the steps.
    inside = median(a.facts["queue_ms"] for a in idle) + median(a.facts["decode_ms"] for a in idle)
    refill_s = refill_of(answers, profiles, lanes, (outside + inside) / 1000)
    found = Calibration(
        profiles=profiles,
        lanes=lanes,
        refill_ms=round(1000 * refill_s, 2),
        overhead_ms=round(median(over), 2),
        side_ms=round(outside + inside, 2),
        images_per_s=len(answers) / max(answer.seconds for answer in answers),
    )
    say(
        f"{found.images_per_s:.2f} images/s; steps of {', '.join(f'{p.step_ms(1):.1f}' for p in profiles.values())} ms alone, "
        f"{found.refill_ms:.1f} more with over {lanes} at work; {found.overhead_ms:.0f} ms outside of the steps, of which "
        f"{found.side_ms:.0f} ms of a core; CPU ms of a request by part {({part: round(ms, 1) for part, ms in cpu.items()})}"
    )
    return found


async def _profiles(client: Client, names: Sequence[str], say: Say) -> dict[str, BatchProfile]:
    """Measures the steps of every expert by images in the batch, while nothing else runs."""
    times: dict[str, dict[int, list[float]]] = {}
    for name in names:
        handle = serve.get_deployment_handle(name, APP_NAME)
        (status,) = await handle.broadcast("status").results_async(timeout_s=30)
        times[name] = {size: [] for size in candidate_sizes(status["max_batch_size"])}
    for number in range(_REPEATS):  # in turns: the machine's speed changes from minute to minute
        for name, sizes in times.items():
            for size, found in sizes.items():
                found.append(await _step_ms(client, name, size, number))
    device = f"{device_name(torch.device('cpu'))}, in the service"
    profiles = {}
    for name, sizes in times.items():
        each = tuple(median(found) for found in sizes.values())
        profiles[name] = BatchProfile(device, tuple(sizes), each, each, "measured over HTTP, with guidance")
        say(f"{name}: ms a step by images " + ", ".join(f"{n}: {ms:.1f}" for n, ms in zip(sizes, each, strict=True)))
    return profiles


async def _step_ms(client: Client, model: str, images: int, seed: int) -> float:
    prompt = demo_prompts("validation", seed + 1)[seed]
    body = {"prompt": prompt, "model": model, "n": images, "num_inference_steps": _STEPS, "seed": seed}
    return float((await client.post(GENERATE, body))["aptp"]["denoise_ms"]) / _STEPS


def refill_of(answers: Sequence[Answer], profiles: dict[str, BatchProfile], lanes: int, errand_s: float) -> float:
    """Returns the seconds that are added to a step while more experts are at work than there are cores.

    Each then finds the caches full of another's weights and activations. What that costs is taken from a saturated service: the
    simulator is to take as long for the same requests.
    """
    names = list(profiles)
    times = [tuple(profile.step_ms(n) / 1000 for n in range(1, profile.sizes[-1] + 1)) for profile in profiles.values()]
    arrivals = Arrivals(
        np.zeros(len(answers)),
        np.array([names.index(answer.facts["model"]) for answer in answers]),
        np.array([answer.ask.steps for answer in answers]),
    )
    took = max(answer.seconds for answer in answers)
    low, high = 0.0, _MOST_REFILL_S
    for _ in range(12):
        middle = (low + high) / 2
        host = Host(tuple(range(len(names))), lanes, errand_s, turns=True, refill_s=middle)
        low, high = (middle, high) if simulate([host], times, arrivals).seconds < took else (low, middle)
    return (low + high) / 2


async def _idle(client: Client, first: int) -> list[Answer]:
    """Asks for one image after another, with texts that are new to the service."""
    return [(await client.replay([ask]))[0] for ask in backlog(_IDLE, first=first)]


async def replayed(address: str, rate: float, seed: int) -> list[Answer]:
    """Sends Poisson arrivals at a rate; returns their answers."""
    return await Client(address).replay(poisson(rate, _TRACE_S, seed))


# -- files ---------------------------------------------------------------------------------------------------------------


def trace_name(load: float) -> str:
    """Returns the name of a trace's file."""
    return f"trace-{load}.jsonl"


def write_trace(path: Path, answers: Sequence[Answer]) -> None:
    """Writes what ``jobs/plan.py --trace`` reads: as the client saw it, from when it really sent."""
    rows = [
        {
            "arrival_s": answer.ask.at + answer.late,
            "expert": answer.facts["expert"],
            "steps": answer.ask.steps,
            "latency_s": answer.seconds - answer.late,
            # For people who look into it.
            **{name: answer.facts[name] for name in ("queue_ms", "denoise_ms", "decode_ms", "batch_size")},
        }
        for answer in answers
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def write_fleet(folder: Path, found: Calibration) -> None:
    """Writes this machine as a fleet of one device."""
    for name, profile in found.profiles.items():
        (folder / f"{name}.json").write_text(profile.to_json(), encoding="utf-8")
    device = {
        "name": "this-machine",
        "gpu": False,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "cpus": os.cpu_count() or 1,
        "lanes": found.lanes,
        "refill_ms": found.refill_ms,
        "price_per_hour": 1.0,
        "profiles": {name: f"{name}.json" for name in found.profiles},
        "tflops": 1.0,  # of the teacher, which is not served
    }
    tree = {
        "load": {"images_per_s": round(0.6 * found.images_per_s, 2), "steps": dict.fromkeys(STEPS, 1.0)},
        "objective": {"p95_s": 10.0},
        "replica": {"cpus": 0.2, "reserve_gb": 0.5, "overhead_ms": found.overhead_ms, "side_ms": found.side_ms},
        "max_batch_size": max(max(profile.sizes) for profile in found.profiles.values()),
        "devices": [device],
    }
    (folder / "fleet.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def judged(rounds: Sequence[Path], run: RunDir, config: Config, say: Say) -> dict[str, Any]:
    """Simulates traces by what was measured in their round; returns simulated over measured latencies by load, medians."""
    figures: dict[str, Any] = {"simulated_vs_real_p50": {}, "simulated_vs_real_p95": {}, "traces": {}}
    fleets = [load_fleet(folder / "fleet.yaml") for folder in rounds]
    machines = []
    for fleet in fleets:
        models, teacher_macs = models_of(run, config, fleet)
        machines.append(deployed(config, fleet, models, teacher_macs))
    for load in _LOADS:
        found = [
            compare(read_trace(folder / trace_name(load)), hosts, times, overhead_s=fleet.replica.overhead_ms / 1000)
            for folder, fleet, (hosts, times) in zip(rounds, fleets, machines, strict=True)
        ]
        figures["traces"][str(load)] = found
        said = [f"load {load}: {', '.join(str(one['requests']) for one in found)} requests"]
        for name in ("p50", "p95"):
            figures[f"simulated_vs_real_{name}"][str(load)] = round(median(one[f"{name}_ratio"] for one in found), 4)
            pairs = ", ".join(f"{one[f'{name}_simulated_s']:.2f} ({one[f'{name}_measured_s']:.2f})" for one in found)
            said.append(f"{name} simulated (measured), s: {pairs}")
        say("; ".join(said))
    ratios = [ratio for name in ("p50", "p95") for ratio in figures[f"simulated_vs_real_{name}"].values()]
    return figures | {"within_20_percent": all(abs(ratio - 1) <= 0.2 for ratio in ratios)}
