"""What a UNet costs to run: time of a denoising step by batch size, MACs, parameters; measured where nothing else runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch

from aptp_ray.artifacts import RunDir
from aptp_ray.config import Config
from aptp_ray.core.image_request import ImageRequest
from aptp_ray.core.int8 import count_weights
from aptp_ray.core.macs import count_macs
from aptp_ray.core.sampler import Sampler
from aptp_ray.encoding import Encoding
from aptp_ray.evaluate.generation import open_sampler, open_unet
from aptp_ray.evaluate.systems import Painter

# Steps that are timed, after the first two of a batch.
_STEPS, _SKIPPED = 8, 2
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def step_times(sampler: Sampler, sizes: Sequence[int], *, guidance_scale: float, rounds: int = 3) -> dict[int, float]:
    """Median seconds of one denoising step of the serving sampler, guidance included, by images in the batch.

    Sizes take turns, so that a machine that slows down in the middle slows all of them.
    """
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for index in range(rounds):
        for size in sizes:
            sampler.max_batch_size = size
            handles = [
                sampler.submit(ImageRequest("a cat", seed, index, _STEPS + _SKIPPED + 2, guidance_scale)) for seed in range(size)
            ]
            while sampler.busy and len(times[size]) < (index + 1) * _STEPS:
                begun = time.perf_counter()
                sampler.step()
                _synchronise()
                # Not the steps in which images join, and none after which one leaves and is decoded.
                if all(handle.step > _SKIPPED and handle.state == "active" for handle in handles):
                    times[size].append(time.perf_counter() - begun)
            for handle in handles:
                sampler.cancel(handle)
    return {size: median(found) for size, found in times.items()}


def measure_costs(config: Config, run: RunDir, painters: Sequence[Painter], pool: Sequence[Any]) -> dict[Painter, dict[str, Any]]:
    """Measures each UNet, one after another, in one actor while the others rest.

    Args:
        config: ``evaluation.batch_sizes``, ``sampling`` and ``compute`` decide how.
        run: whose encoded rows say at which text length MACs are counted.
        painters: who; those that differ only in the number of steps are measured once.
        pool: from :func:`~aptp_ray.evaluate.generation.artists`.
    """
    encoding = Encoding.from_json(run.read_json("encoded", "encoding.json"))
    ready = {one.ready.remote(): one for one in pool}
    artist = ready[ray.wait(list(ready))[0][0]]
    unets = {(painter.run_uri, painter.expert): painter for painter in painters}
    found = ray.get(artist.call.remote(_measure, config, list(unets.values()), encoding.latent_shape[1:], encoding.num_tokens))
    by_unet = dict(zip(unets, found, strict=True))
    return {painter: by_unet[painter.run_uri, painter.expert] for painter in painters}


def _measure(config: Config, painters: Sequence[Painter], latent_size: tuple[int, int], num_tokens: int) -> list[dict[str, Any]]:
    """All UNets, one after another; in an actor."""
    device = "cuda" if config.compute.gpus_per_worker > 0 else "cpu"
    return [_measure_one(config, painter, device, latent_size, num_tokens) for painter in painters]


def _measure_one(config: Config, painter: Painter, device: str, latent_size: tuple[int, int], num_tokens: int) -> dict[str, Any]:
    reset_peak_memory(device)
    home = RunDir(painter.run_uri, config.storage_options)
    unet = open_unet(config, home, painter, device)
    sampler = open_sampler(config, home, painter, device, unet=unet)
    times = step_times(sampler, config.evaluation.batch_sizes, guidance_scale=config.sampling.guidance_scale)
    return {
        "macs": count_macs(unet, latent_size=latent_size, num_tokens=num_tokens),
        "parameters": count_weights(unet),
        "step_ms": {str(size): 1000 * seconds for size, seconds in times.items()},
        "peak_memory_mb": peak_memory_mb(device),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)",
    }


def reset_peak_memory(device: str) -> None:
    """Makes :func:`peak_memory_mb` forget what was."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR_REFS.exists():
        _CLEAR_REFS.write_text("5")  # resets VmHWM (proc(5)); other systems than Linux keep the process's peak


def peak_memory_mb(device: str) -> float:
    """The most that was in use: of the GPU, or by this process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
