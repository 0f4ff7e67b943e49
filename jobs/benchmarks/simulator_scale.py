"""How fast planner and simulator are, and what the simulator says of fleets of 1 to 4,096 GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from aptp_ray.config import load_config
from aptp_ray.core.macs import count_macs
from aptp_ray.plan.choose import make_plan
from aptp_ray.plan.fleet import Fleet, load_fleet
from aptp_ray.plan.scale import Workload, compare_fleets
from aptp_ray.plan.simulate import Host, poisson, simulate
from aptp_ray.plan.times import Model, StepTimes, step_times
from benchmarks.sd21 import RESOLUTION, TOKENS, sd21_unet

_ROOT = Path(__file__).resolve().parents[2]
_EXPERTS, _DEVICES = 100, 10
_TEACHER_MACS = 1_074_550_000_000  # Stable Diffusion 2.1's, of one row at 768 pixels
_GPUS, _REQUESTS, _MODELS = 1024, 100_000, 4
_TIMES = StepTimes(tuple(0.02 + 0.007 * images for images in range(1, 9)))  # of a made-up device: a constant, and the work

Say = Callable[[str], None]


def planner_seconds(say: Say) -> float:
    """Plans a hundred experts on ten kinds of GPUs; returns the median of three."""
    draw = np.random.default_rng(0)
    shares = draw.dirichlet(np.full(_EXPERTS, 2.0))
    models = [
        Model(f"expert-{k}", float(share), float(ratio), 4.0)
        for k, (share, ratio) in enumerate(zip(shares, draw.uniform(0.4, 0.9, _EXPERTS), strict=True))
    ]
    devices = [
        {
            "name": f"gpu-{number}", "accelerator_type": f"G{number}", "memory_gb": float(draw.choice([24, 48, 80])), "cpus": 12,
            "price_per_hour": float(speed / 50 * draw.uniform(0.8, 1.2)), "available": 400, "tflops": float(speed),
        }
        for number, speed in enumerate(np.linspace(60, 420, _DEVICES))
    ]  # fmt: skip
    tree = {"load": {"images_per_s": 100, "steps": {25: 0.8, 50: 0.2}}, "objective": {"p95_s": 8.0}, "devices": devices}
    fleet = Fleet.model_validate(tree)
    took = []
    for _ in range(3):
        begun = time.perf_counter()
        plan = make_plan(fleet, models, _TEACHER_MACS)
        took.append(time.perf_counter() - begun)
    say(f"planner: {_EXPERTS} experts on {_DEVICES} kinds of GPUs in {median(took):.2f} s, within {plan.gap:.2%} of the cheapest")
    return round(median(took), 3)


def requests_per_second(say: Say) -> int:
    """Simulates a large fleet at three quarters of its capacity; returns requests a second of one core's time."""
    rate = 0.75 * _GPUS * _TIMES.images_steps_per_s / 25
    hosts = [Host((gpu % _MODELS,)) for gpu in range(_GPUS)]
    arrivals = poisson(rate, _REQUESTS / rate, [1.0] * _MODELS, {25: 1.0}, seed=0)
    begun = time.process_time()
    simulate(hosts, [_TIMES.seconds] * _MODELS, arrivals)
    found = round(len(arrivals.at) / (time.process_time() - begun))
    say(f"simulator: {found:,} requests a second of one core, of {_GPUS} GPUs at three quarters of their capacity")
    return found


def scaled(say: Say) -> dict[str, Any]:
    """Compares fleets of the first GPU of clusters/fleet.yaml that serve Stable Diffusion 2.1 at 256 pixels, or its experts.

    The experts are as many and as small as jobs/configs/sd21_cc3m.yaml asks for, with equal shares of the traffic. Step times are
    estimated from MACs.
    """
    fleet, config = load_fleet(_ROOT / "clusters" / "fleet.yaml"), load_config(_ROOT / "jobs" / "configs" / "sd21_cc3m.yaml")
    device, experts = fleet.devices[0], config.router.experts
    with torch.device("meta"):
        unet = sd21_unet()
    macs = count_macs(unet, latent_size=(RESOLUTION // 8, RESOLUTION // 8), num_tokens=TOKENS)
    teacher = step_times(Model("teacher", 1.0, 1.0, 0.0), device, fleet, macs)
    expert = step_times(Model("expert-0", 1 / experts, config.prune.budget, 0.0), device, fleet, macs)
    say(
        f"{experts} experts at {config.prune.budget} of {macs / 1e9:.1f} GMACs on {device.name}: estimated ms a step with one "
        f"image {1000 * expert.seconds[0]:.1f} (teacher {1000 * teacher.seconds[0]:.1f}), with {expert.limit} "
        f"{1000 * expert.seconds[-1]:.1f} ({1000 * teacher.seconds[-1]:.1f})"
    )
    found = compare_fleets(Workload([1 / experts] * experts, fleet.load.mix(), teacher, [expert] * experts), say=say)
    rows = {str(row["gpus"]): [row["single"], row["mixture"], row["unrelated"]] for row in found["rows"]}
    return {"throughput_4096_vs_8": found["per_gpu_4096_vs_8"], "images_per_s_and_gpu": rows}
