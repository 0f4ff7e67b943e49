"""One expert's deployment: a :class:`Sampler` driven step by step, which jobs join and leave while it runs."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from aptp_ray.artifacts import load_run
from aptp_ray.core.components import load_components, load_unet
from aptp_ray.core.image_request import Handle, ImageRequest
from aptp_ray.core.sampler import Sampler
from aptp_ray.serve.protocol import DrawJob, Outcome

logger = logging.getLogger("ray.serve")

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_REMEMBERED_CANCELS = 4096
_CANCELLED = 499  # nginx's status for a client that closed the connection; nobody is left to read it


@dataclass(eq=False)
class _Running:
    """A job in the engine and where its outcome goes."""

    job: DrawJob
    outcomes: asyncio.Queue[Outcome]
    handles: list[Handle] = field(default_factory=list)


class DrawingLoop:
    """Runs a sampler in a thread of its own, merging arrivals and cancellations between its steps.

    All methods belong to one event loop; the sampler is touched by the loop's task and its thread in turns, never at once.
    """

    def __init__(self, sampler: Sampler, threads: int = 1) -> None:
        self._sampler = sampler
        # OpenMP's thread count belongs to the calling thread, so it is set in the one that computes.
        self._thread = ThreadPoolExecutor(1, "sampler", initializer=torch.set_num_threads, initargs=(threads,))
        self._running: dict[str, _Running] = {}
        self._arrived: list[_Running] = []
        self._cancelled: set[str] = set()
        # A cancellation may overtake its job on the way here.
        self._cancelled_early: OrderedDict[str, None] = OrderedDict()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._ended = {"done": 0, "cancelled": 0, "failed": 0}  # jobs, since the start

    @property
    def active(self) -> int:
        """Images in the batch and waiting for a place in it."""
        return self._sampler.active + self._sampler.waiting

    def status(self) -> dict[str, int]:
        """Returns images under way ("active") and how many jobs are done, cancelled and failed."""
        return {"active": self.active, **self._ended}

    @property
    def alive(self) -> bool:
        return self._task is None or not self._task.done()

    async def draw(self, jobs: list[DrawJob]) -> AsyncIterator[Outcome]:
        """Yields one outcome a job, as they end (status 499: cancelled). Leaving early cancels what is left."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())
        outcomes: asyncio.Queue[Outcome] = asyncio.Queue()
        left = {job.id for job in jobs}
        for job in jobs:
            if job.id in self._cancelled_early:
                outcomes.put_nowait(Outcome(job.id, error="cancelled", status=_CANCELLED))
            else:
                self._running[job.id] = running = _Running(job, outcomes)
                self._arrived.append(running)
        self._wake.set()
        try:
            while left:
                outcome = await outcomes.get()
                left.discard(outcome.id)
                yield outcome
        finally:
            self.cancel(left)

    def cancel(self, ids: Iterable[str]) -> None:
        """Drops jobs before the next step; ids that are not here are remembered for a while."""
        for job_id in ids:
            if job_id in self._running:
                self._cancelled.add(job_id)
                self._wake.set()
            else:
                self._cancelled_early[job_id] = None
        while len(self._cancelled_early) > _REMEMBERED_CANCELS:
            self._cancelled_early.popitem(last=False)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._merge()
            if not self.active:
                self._wake.clear()
                continue
            try:
                await loop.run_in_executor(self._thread, self._sampler.step)
            except Exception:  # the sampler keeps failures to their image; what still escapes ends those in it
                logger.exception("a denoising step failed")
                for running in list(self._running.values()):
                    self._end(running, Outcome(running.job.id, error="the image could not be drawn", status=500))
            self._deliver()

    def _merge(self) -> None:
        """Between steps: cancellations leave, arrivals join."""
        for running in self._arrived:
            if running.job.id in self._cancelled:
                continue
            job = running.job
            try:
                for index in range(job.n):
                    request = ImageRequest(
                        prompt=job.prompt,
                        seed=job.seed,
                        index=index,
                        num_inference_steps=job.num_inference_steps,
                        guidance_scale=job.guidance_scale,
                        negative_prompt=job.negative_prompt,
                    )
                    running.handles.append(self._sampler.submit(request))
            except ValueError as error:
                self._end(running, Outcome(job.id, error=str(error), status=400))
        self._arrived.clear()
        for job_id in self._cancelled & self._running.keys():
            self._end(self._running[job_id], Outcome(job_id, error="cancelled", status=_CANCELLED))
        self._cancelled.clear()

    def _deliver(self) -> None:
        for running in list(self._running.values()):
            handles = running.handles
            failed = next((handle for handle in handles if handle.state == "failed"), None)
            if failed is not None:
                logger.error("job %s failed", running.job.id, exc_info=failed.error)
                message = str(failed.error) if isinstance(failed.error, ArithmeticError) else "the image could not be drawn"
                self._end(running, Outcome(running.job.id, error=message, status=500))
            elif handles and all(handle.state == "done" for handle in handles):
                images = [np.asarray(handle.pil()) for handle in handles]
                self._end(running, Outcome(running.job.id, images=images))

    def _end(self, running: _Running, outcome: Outcome) -> None:
        for handle in running.handles:
            self._sampler.cancel(handle)  # frees the places of those still under way
        self._running.pop(running.job.id, None)
        self._ended["done" if outcome.error is None else "cancelled" if outcome.status == _CANCELLED else "failed"] += 1
        running.outcomes.put_nowait(outcome)


class Expert:
    """The deployment ``expert-<k>``; needs only the run directory."""

    def __init__(self, run_dir: str, storage_options: dict[str, Any], expert: int) -> None:
        run, config = load_run(run_dir, storage_options)
        options = config.serve
        device = "cuda" if options.gpus_per_expert > 0 else "cpu"
        dtype = _DTYPES[options.precision]
        # Loading runs on this thread, whose count is its own.
        torch.set_num_threads(options.threads_per_expert)
        components = load_components(run.local("teacher"), dtype=dtype, device=device)
        sampler = Sampler.from_components(
            load_unet(run.local("experts", str(expert)), dtype=dtype, device=device),
            components,
            scheduler=config.sampling.scheduler,
            max_batch_size=options.max_batch_size,
            resolution=config.data.resolution,
        )
        # One step on a throw-away image, so that the first client does not pay for lazy initialisation.
        sampler.generate(["warm up"], [0], num_inference_steps=1, guidance_scale=config.sampling.guidance_scale)
        self._loop = DrawingLoop(sampler, options.threads_per_expert)

    async def draw(self, jobs: list[DrawJob]) -> AsyncIterator[Outcome]:
        """Yields one outcome a job, as they end."""
        async for outcome in self._loop.draw(jobs):
            yield outcome

    async def cancel(self, ids: list[str]) -> None:
        """Drops jobs, wherever in this replica they are."""
        self._loop.cancel(ids)

    async def status(self) -> dict[str, int]:
        """Returns the loop's counts; an answer also says that the replica is up."""
        self.check_health()
        return self._loop.status()

    def check_health(self) -> None:
        """Serve replaces a replica whose check raises."""
        if not self._loop.alive:
            raise RuntimeError("the drawing loop has ended")
