"""One request on an idle service, beside the same image by the bare diffusers pipeline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config
from aptp_ray.core.components import load_components, load_unet
from benchmarks.serve_clients import GENERATE, STEPS, Answer, Ask, Client
from benchmarks.serve_run import demo_prompts
from benchmarks.serve_systems import GUIDANCE

_REQUESTS = 16  # one after another, beside the pipeline; half as many for each step count
_STEPS = 20


def idle(run: RunDir, config: Config, address: str, say: Callable[[str], None]) -> dict[str, Any]:
    """One request at a time, each beside the same image by the bare diffusers pipeline in this process.

    The pipeline has as many threads as one expert. Its time is scaled by the step times of the expert that drew the image and
    the teacher, both of the bare UNet, which are taken in the same minutes.
    """
    torch.set_num_threads(config.serve.threads_per_expert)
    pipeline = bare_pipeline(run)
    experts = [load_unet(run.local("experts", str(entry["id"]))) for entry in run.read_json("routing.json")["experts"]]
    asks = [Ask(0.0, prompt, _STEPS, seed) for seed, prompt in enumerate(demo_prompts("validation", _REQUESTS))]
    draw(pipeline, asks[0])
    served, bare, teacher_ms = [], [], []
    expert_ms: dict[int, list[float]] = {k: [] for k in range(len(experts))}
    client = Client(address)
    with asyncio.Runner() as runner:
        for ask in asks:
            answer = runner.run(one(client, ask))
            served.append(answer)
            bare.append(timed(lambda ask=ask: draw(pipeline, ask)))  # type: ignore[misc]
            for _ in range(4):
                teacher_ms.append(step_ms(pipeline.unet))
                for k, unet in enumerate(experts):
                    expert_ms[k].append(step_ms(unet))
        by_steps = {}
        for steps in STEPS:
            own = [runner.run(one(client, Ask(0.0, a.prompt, steps, a.seed))).seconds for a in asks[::2]]
            by_steps[str(steps)] = round(1000 * median(own), 1)
        client.close()
    ratios = [median(times) / median(teacher_ms) for times in expert_ms.values()]
    ratio = float(np.mean([ratios[answer.facts["expert"]] for answer in served]))
    http_ms, bare_ms = 1000 * median(a.seconds for a in served), 1000 * median(bare)
    parts = {key: round(median(a.facts[key] for a in served), 1) for key in ("queue_ms", "denoise_ms", "decode_ms")}
    parts["route_and_way_ms"] = round(http_ms - sum(parts.values()), 1)
    say(
        f"idle: {http_ms:.1f} ms for {_STEPS} steps through HTTP; bare pipeline {bare_ms:.1f} ms by the teacher, whose step "
        f"takes {median(teacher_ms):.1f} ms, an expert's {ratio:.2f} of it; made of {parts}"
    )
    return {
        "idle_p50_excess_ms": round(http_ms - bare_ms * ratio, 1),
        "idle_p50_ms": round(http_ms, 1),
        "idle_parts": parts,
        "bare_pipeline_p50_ms": round(bare_ms, 1),
        "expert_vs_teacher_step": round(ratio, 3),
        "idle_ms_by_steps": by_steps,
    }


def bare_pipeline(run: RunDir) -> Any:
    """Returns the teacher as diffusers runs it."""
    from diffusers import StableDiffusionPipeline

    parts = load_components(run.local("teacher"))
    pipeline = StableDiffusionPipeline(
        vae=parts.vae, text_encoder=parts.text_encoder, tokenizer=parts.tokenizer, scheduler=parts.scheduler,
        unet=load_unet(run.local("teacher", "unet")), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, ask: Ask) -> None:
    """Draws an image with the bare pipeline."""
    generator = torch.Generator().manual_seed(ask.seed)
    pipeline(ask.prompt, num_inference_steps=ask.steps, guidance_scale=GUIDANCE, generator=generator)


def timed(work: Callable[[], None]) -> float:
    """Returns the seconds that some work takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


@torch.inference_mode()
def step_ms(unet: Any) -> float:
    """Returns the milliseconds of one UNet call for one guided image."""
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    sample, states = torch.zeros(2, unet.config.in_channels, side, side), torch.zeros(2, 24, width)
    return 1000 * timed(lambda: unet(sample, 500, encoder_hidden_states=states, return_dict=False))


async def one(client: Client, ask: Ask) -> Answer:
    """Asks for one image while nobody else does."""
    begun = time.perf_counter()
    facts = (await client.post(GENERATE, ask.body))["aptp"]
    return Answer(ask, time.perf_counter() - begun, 0.0, facts)
