"""A mixture in one Python process against its engine alone, which has its prompts parted already."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from aptp_ray.artifacts import load_run
from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.sampler import Sampler
from aptp_ray.hub.mixture import MixturePipeline
from benchmarks.serve_run import cut_run, demo_prompts

_ROUNDS, _PROMPTS = 3, 24
_LARGEST_BATCH = 8

Say = Callable[[str], None]


def measure(say: Say, run_dir: str | None = None) -> dict[str, Any]:
    """Draws the same prompts by both, in turns; each round has prompts of its own, so that no text is known already.

    Args:
        say: writes a line for people.
        run_dir: a finished run of the demo; by default, one is cut from the shipped teacher.
    """
    with tempfile.TemporaryDirectory() as folder:
        run, config = load_run(run_dir if run_dir else cut_run(f"{folder}/run").uri)
        pipe = MixturePipeline.from_pretrained(run.uri, max_batch_size=_LARGEST_BATCH)
        parts = load_components(run.local("teacher"))
        engines = [
            Sampler.from_components(
                load_unet(run.local("experts", str(k))),
                parts,
                scheduler=config.sampling.scheduler,
                resolution=config.data.resolution,
                max_batch_size=_LARGEST_BATCH,
            )
            for k in range(pipe.num_experts)
        ]
        sampling = {
            "num_inference_steps": config.sampling.num_inference_steps,
            "guidance_scale": config.sampling.guidance_scale,
        }

        def by_engines(prompts: list[str], experts: list[int]) -> None:
            for k in sorted(set(experts)):
                rows = [row for row, expert in enumerate(experts) if expert == k]
                engines[k].generate([prompts[row] for row in rows], rows, **sampling)

        warm = ["warm up"] * pipe.num_experts
        by_engines(warm, list(range(pipe.num_experts)))
        for k in range(pipe.num_experts):
            pipe("warm up", expert=k)
        rates: dict[str, list[float]] = {"pipeline": [], "engine": []}
        routing: list[float] = []
        every = demo_prompts("validation", _ROUNDS * _PROMPTS)
        for number in range(_ROUNDS):
            prompts = every[number * _PROMPTS : (number + 1) * _PROMPTS]
            begun = time.perf_counter()
            experts = pipe.router.route(prompts).expert.tolist()
            routing.append((time.perf_counter() - begun) / len(prompts))
            ways = {"pipeline": lambda: pipe(prompts), "engine": lambda: by_engines(prompts, experts)}  # noqa: B023
            for name in sorted(ways, reverse=bool(number % 2)):
                begun = time.perf_counter()
                ways[name]()
                rates[name].append(len(prompts) / (time.perf_counter() - begun))
            say(f"{len(prompts)} images, images/s: " + ", ".join(f"{name} {rate[-1]:.2f}" for name, rate in rates.items()))
    return {
        "pipeline_vs_engine": round(median(a / b for a, b in zip(rates["pipeline"], rates["engine"], strict=True)), 3),
        "rounds": {name: [round(rate, 3) for rate in some] for name, some in rates.items()},
        "routing_ms_per_prompt": round(1000 * median(routing), 2),
        "experts": pipe.num_experts,
        "run": "given" if run_dir else "experts cut, not trained",
    }
