"""One expert's deployment: loads what a run directory holds of it, and draws."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import torch

from aptp_ray.artifacts import RunDir, load_run
from aptp_ray.config import Config
from aptp_ray.core.batch_profile import BatchProfile, cached_profile
from aptp_ray.core.components import Components, denoiser_dir, load_components, load_unet
from aptp_ray.core.int8 import quantize_weights, weight_bytes
from aptp_ray.core.sampler import Sampler
from aptp_ray.serve.drawing import DrawingLoop
from aptp_ray.serve.protocol import TEACHER, DrawJob, Outcome, Partial
from aptp_ray.serve.turns import turns_on_this_machine

logger = logging.getLogger("ray.serve")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Expert:
    """The deployment ``expert-<k>`` or ``teacher``; needs only the run directory.

    Weights are mapped from their files, so on a CPU in fp32 the replicas of a node share one copy of them in its page cache,
    the VAE and the text encoder of all experts included; in another precision, with ``serve.weights: int8``, and on a GPU, each
    replica holds its own.
    """

    def __init__(
        self, run_dir: str, storage_options: dict[str, Any], expert: int | str, options: dict[str, Any] | None = None
    ) -> None:
        """Loads the models, finds the largest batch that pays and starts the drawing loop.

        Args:
            run_dir: any fsspec URI.
            storage_options: of the run directory.
            expert: its id, or "teacher".
            options: fields of the config's ``serve`` section to change.
        """
        began = time.perf_counter()
        run, config = load_run(run_dir, storage_options)
        config = config.model_copy(update={"serve": config.serve.model_copy(update=options or {})})
        serve = config.serve
        # Loading and measuring run on this thread, whose OpenMP count is its own.
        torch.set_num_threads(serve.threads_per_expert)
        unet, components = _load(run, config, expert)
        sampler = Sampler.from_components(
            unet,
            components,
            scheduler=config.sampling.scheduler,
            resolution=config.data.resolution,
            # Beside the steps, so that neither a new text nor a finished image holds up the images under way.
            side_threads=serve.threads_per_expert,
        )
        profile = self._profile(unet, sampler, components, serve.batch_limit)
        sampler.max_batch_size = profile.best()
        # A throw-away image, so that the first client does not pay for lazy initialisation.
        sampler.generate(["warm up"], [0], num_inference_steps=2, guidance_scale=config.sampling.guidance_scale)
        self._name = str(expert) if expert == TEACHER else f"expert-{expert}"
        self._device = next(unet.parameters()).device
        turns = turns_on_this_machine(serve.threads_per_expert) if self._device.type == "cpu" else None
        self._loop = DrawingLoop(sampler, serve.threads_per_expert, turns)
        self._say_hello(unet, components, sampler, profile, time.perf_counter() - began)

    @staticmethod
    def _profile(unet: Any, sampler: Sampler, components: Components, limit: int) -> BatchProfile:
        """Measures, or finds on record, how the UNet's step time grows with the batch."""
        # Not in the run directory: it holds for this machine alone.
        folder = Path(os.environ.get("APTP_CACHE", Path.home() / ".cache" / "aptp_ray")) / "batch_profiles"
        return cached_profile(
            folder,
            unet,
            latent_shape=sampler.sizes.latent_shape,
            num_tokens=components.text().shape[0],
            limit=limit,
        )

    def _say_hello(self, unet: Any, components: Components, sampler: Sampler, profile: BatchProfile, seconds: float) -> None:
        weight = next(unet.parameters())
        parts = {"UNet": unet, "VAE": components.vae, "text encoder": components.text_encoder}
        if components.text_encoder_2 is not None:
            parts["second text encoder"] = components.text_encoder_2
        sizes = ", ".join(f"{name} {_megabytes(part):.0f} MB" for name, part in parts.items())
        steps = ", ".join(f"{size}: {ms:.1f}" for size, ms in zip(profile.sizes, profile.guided_ms, strict=True))
        logger.info(
            "%s is loaded in %.1f s: %s; %s on %s. Memory: %.0f MB, of which %.0f MB shared with other processes. Largest batch: "
            "%d (ms a step by images: %s; %s). Sizes: multiples of %d, at most %d pixels",
            self._name, seconds, sizes, weight.dtype, profile.device, *memory_mb(self._device), sampler.max_batch_size, steps,
            profile.stopped, sampler.sizes.multiple, sampler.sizes.max_pixels,
        )  # fmt: skip

    async def draw(self, jobs: list[DrawJob]) -> AsyncIterator[Partial | Outcome]:
        """Yields previews, and one outcome a job, as they come."""
        async for item in self._loop.draw(jobs):
            yield item

    async def cancel(self, ids: list[str]) -> None:
        """Drops jobs, wherever in this replica they are."""
        self._loop.cancel(ids)

    async def status(self) -> dict[str, Any]:
        """Returns the loop's counts and the memory in use; an answer also says that the replica is up."""
        self.check_health()
        return {**self._loop.status(), "memory_mb": round(memory_mb(self._device)[0], 1)}

    def check_health(self) -> None:
        """Serve replaces a replica whose check raises."""
        if not self._loop.alive:
            raise RuntimeError("the drawing loop has ended")
        if self._device.type == "cuda":
            torch.cuda.mem_get_info(self._device)  # raises after an error from which a process's GPU context cannot recover

    def __del__(self) -> None:
        """Serve calls this once no request is left, or ``graceful_shutdown_timeout_s`` is over: drained before, not here."""
        loop = getattr(self, "_loop", None)  # absent if loading failed
        if loop is not None:
            loop.close()


def _load(run: RunDir, config: Config, expert: int | str) -> tuple[Any, Components]:
    serve = config.serve
    device, dtype = "cuda" if serve.gpus_per_expert > 0 else "cpu", _DTYPES[serve.precision]
    teacher = run.local("teacher")
    folder = denoiser_dir(teacher) if expert == TEACHER else Path(run.local("experts", str(expert)))
    components = load_components(teacher, dtype=dtype, device=device)
    unet = load_unet(folder, dtype=dtype, device=device)
    if serve.weights == "int8":
        unet = quantize_weights(unet)
    if device == "cuda":
        # Tensor cores read convolutions this way; on a CPU it gained nothing (measured), and copies would not be shared.
        unet = unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        components.vae.to(memory_format=torch.channels_last)
    return unet, components


def _megabytes(module: torch.nn.Module) -> float:
    return weight_bytes(module) / 2**20


def memory_mb(device: torch.device) -> tuple[float, float]:
    """Returns what this process holds, in MiB, and how much of it may be shared with others: on a GPU, of the GPU's."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**20, 0.0
    try:
        _, resident, shared = Path("/proc/self/statm").read_text().split()[:3]
    except OSError:  # not Linux
        return 0.0, 0.0
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    return int(resident) * page, int(shared) * page
