"""The serving plane, measured: HTTP against the bare engine, experts against the teacher, batching against two other ways.

What is compared shares the machine, the models, the requests and the run. The clients are on the same cores as the service;
``cpu_ms_per_image`` says what they and each part take of it.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

from aptp_ray.artifacts import RunDir, load_run
from aptp_ray.config import Config
from aptp_ray.serve.app import ServeArgs, assemble
from aptp_ray.serve.expert import Expert
from aptp_ray.serve.protocol import TEACHER
from aptp_ray.serve.router import load_router
from aptp_ray.serve.run import deploy, free_port, stop
from benchmarks.serve_clients import Answer, Client, backlog, poisson
from benchmarks.serve_cpu import cpu_seconds
from benchmarks.serve_idle import idle
from benchmarks.serve_run import cut_run, demo_prompts
from benchmarks.serve_systems import BatchedExpert, Engines
from cli import ray_session

_LOADS = (0.3, 0.6, 0.9)  # of the saturated service's requests per second
_TRACE_S = 20.0
_ROUNDS, _BACKLOG = 3, 160  # of so many images, all there at once
# Queues that hold whatever a system that cannot keep up leaves waiting: all requests count, none is refused.
_ROOM = {"max_queued_requests": 4096, "max_waiting_images": 4096}
_SLO = 3.0  # times the idle latency of the same step count

Say = Callable[[str], None]


def measure(say: Say, run_dir: str | None = None) -> dict[str, Any]:
    """Runs all parts; returns the ratios that the benchmark's last line holds, and what they are made of.

    Args:
        say: writes a line for people.
        run_dir: a finished run of the demo; by default, one is cut from the shipped teacher.
    """
    # Ray's workers are nice by 15: whatever else this machine does would come before the service, but not before the pipeline.
    os.environ["RAY_worker_niceness"] = "0"
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        run, config = load_run(run_dir if run_dir else cut_run(f"{folder}/run").uri)
        say(f"experts: {run.uri}, ready after {time.monotonic() - begun:.0f} s")
        with ray_session(config):
            address = started(run, Expert, {})
            figures = asyncio.run(saturated(address, run, config, say))
            figures |= asyncio.run(routing(address, say))
            figures |= idle(run, config, address, say)
            capacity = figures["http_images_per_s"]
            loads = {"service": asyncio.run(under_load(address, "service", capacity, say))}
            stop()
            for name, options, expert in (
                ("one at a time", {"max_batch_size": 1}, Expert),
                ("serve.batch", {}, BatchedExpert),
            ):
                address = started(run, expert, options)
                loads[name] = asyncio.run(under_load(address, name, capacity, say))
                stop()
        figures |= compared(loads, figures["idle_ms_by_steps"], say)
    return {"run": "given" if run_dir else "experts cut, not trained", **figures}


def started(run: RunDir, expert: type[Expert], options: dict[str, Any]) -> str:
    """Starts a service whose experts are of this class; returns its address."""
    application = assemble(ServeArgs(run_dir=run.uri, serve=_ROOM | options), expert)
    return deploy(application, "127.0.0.1", free_port("127.0.0.1", 0))


# -- saturated -----------------------------------------------------------------------------------------------------------


async def saturated(address: str, run: RunDir, config: Config, say: Say) -> dict[str, Any]:
    """Images a second of the same requests, all there at once: by the engine, through HTTP, and by the teacher in the engine.

    They take turns, for other tenants of the machine change its speed from minute to minute. The engine gets its requests routed;
    the teacher has a replica for each core, and so all of the machine.
    """
    router = load_router(run, config)
    count = len(run.read_json("routing.json")["experts"])
    experts, teachers = Engines(run, list(range(count))), Engines(run, [TEACHER] * (os.cpu_count() or 1))
    client = Client(address)
    rates: dict[str, list[float]] = {"engine": [], "http": [], "teacher": []}
    cpu: list[dict[str, float]] = []
    batches: list[float] = []
    await client.replay(backlog(16, first=_ROUNDS * _BACKLOG))  # connections between the service's parts
    for number in range(_ROUNDS):
        asks = backlog(_BACKLOG, first=number * _BACKLOG)  # others each time: no text is known already
        chosen = router.route([ask.prompt for ask in asks]).expert.tolist()
        parted = [[ask for ask, k in zip(asks, chosen, strict=True) if k == expert] for expert in range(count)]
        rates["engine"].append(await experts.rate(parted))
        before = cpu_seconds()
        answers = await client.replay(asks)
        after = cpu_seconds()
        cpu.append({part: 1000 * (after[part] - before.get(part, 0.0)) / len(asks) for part in after})
        rates["http"].append(len(asks) / max(answer.seconds for answer in answers))
        batches += [answer.facts["batch_size"] for answer in answers]
        replicas = len(teachers.sizes)
        rates["teacher"].append(await teachers.rate([asks[n::replicas] for n in range(replicas)]))
        say(f"{_BACKLOG} images at once, images/s: " + ", ".join(f"{name} {rate[-1]:.2f}" for name, rate in rates.items()))
    experts.stop()
    teachers.stop()
    parts = {part: round(median(entry[part] for entry in cpu), 1) for part in cpu[0]}
    say(f"batches of {np.mean(batches):.1f}; CPU ms an image through HTTP: {parts}")
    return {
        "http_vs_engine": round(median(a / b for a, b in zip(rates["http"], rates["engine"], strict=True)), 3),
        "mixture_vs_teacher": round(median(a / b for a, b in zip(rates["engine"], rates["teacher"], strict=True)), 3),
        "http_images_per_s": round(median(rates["http"]), 2),
        "engine_images_per_s": round(median(rates["engine"]), 2),
        "teacher_images_per_s": round(median(rates["teacher"]), 2),
        "rounds": {name: [round(rate, 2) for rate in some] for name, some in rates.items()},
        "largest_batches": {"experts": experts.sizes, "teacher": teachers.sizes},
        "saturated_batch_size": round(float(np.mean(batches)), 1),
        "cpu_ms_per_image": parts,
    }


# -- routing -------------------------------------------------------------------------------------------------------------


async def routing(address: str, say: Say) -> dict[str, Any]:
    """POST /v1/route: of one prompt, one call after another, and of a thousand in one call."""
    client, prompts = Client(address), demo_prompts("validation", 1000)
    single = []
    for prompt in prompts[:100]:
        begun = time.perf_counter()
        await client.post("/v1/route", {"prompts": [prompt]})
        single.append(1000 * (time.perf_counter() - begun))
    many = []
    for _ in range(3):
        begun = time.perf_counter()
        await client.post("/v1/route", {"prompts": prompts})
        many.append(len(prompts) / (time.perf_counter() - begun))
    client.close()
    say(f"route: {median(single):.1f} ms for one prompt; {median(many):.0f} prompts/s in calls of {len(prompts)}")
    return {
        "route_p50_ms": round(median(single), 2),
        "route_p95_ms": round(float(np.quantile(single, 0.95)), 2),
        "route_prompts_per_s": round(median(many)),
    }


# -- arrivals at random --------------------------------------------------------------------------------------------------


async def under_load(address: str, name: str, capacity: float, say: Say) -> dict[float, list[Answer]]:
    """Replays the same arrivals to whatever serves at an address."""
    found = {}
    await Client(address).replay(backlog(8))
    for load in _LOADS:
        answers = await Client(address).replay(poisson(load * capacity, _TRACE_S, seed=round(10 * load)))
        found[load] = answers
        seconds = [answer.seconds for answer in answers]
        late = 1000 * max(answer.late for answer in answers)
        batch = np.mean([answer.facts["batch_size"] for answer in answers])
        say(
            f"{name}, load {load}: {len(answers)} requests, p50 {1000 * median(seconds):.0f} ms, p95 "
            f"{1000 * np.quantile(seconds, 0.95):.0f} ms; batches of {batch:.1f}; the client was late by {late:.0f} ms at most"
        )
    return found


def compared(loads: dict[str, dict[float, list[Answer]]], idle_ms: dict[str, float], say: Say) -> dict[str, Any]:
    """Sets the service's latencies against the better of the two others, and tells who kept the promised time how often."""

    def latency(name: str, load: float, part: float) -> float:
        return float(np.quantile([answer.seconds for answer in loads[name][load]], part))

    def kept(answer: Answer) -> bool:
        return 1000 * answer.seconds <= _SLO * idle_ms[str(answer.ask.steps)]

    others = [name for name in loads if name != "service"]
    figures: dict[str, Any] = {
        f"p{round(100 * part)}_vs_best": {
            str(load): round(latency("service", load, part) / min(latency(name, load, part) for name in others), 3)
            for load in _LOADS
        }
        for part in (0.5, 0.95)
    }
    figures["slo_attainment"] = {
        str(load): {name: round(float(np.mean([kept(a) for a in found[load]])), 3) for name, found in loads.items()}
        for load in _LOADS
    }
    for part in (50, 95):
        figures[f"p{part}_ms"] = {
            str(load): {name: round(1000 * latency(name, load, part / 100)) for name in loads} for load in _LOADS
        }
    say(f"promised (3x idle), kept: {figures['slo_attainment']}")
    return figures
