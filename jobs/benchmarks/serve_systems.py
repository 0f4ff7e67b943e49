"""What the service is measured against: its engine without a service, and two other ways of batching in its place."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import ray
from ray import serve

from aptp_ray.artifacts import RunDir
from aptp_ray.serve.expert import Expert
from aptp_ray.serve.protocol import DrawJob, Outcome, Partial
from benchmarks.serve_clients import Ask

GUIDANCE = 3.0


class BatchedExpert(Expert):
    """Request-level batching: ``serve.batch`` draws what waits together, and takes the next batch when all of it is drawn.

    Models, engine and largest batch are the expert's own. So a batch may even mix step counts, which a stock pipeline could not.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._together.set_max_batch_size(self._loop.status()["max_batch_size"])

    # Whatever waits is taken at once: to wait for more only costs latency where the batch before it is the wait.
    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.0)
    async def _together(self, jobs: list[DrawJob]) -> list[Outcome]:
        found = {item.id: item async for item in self._loop.draw(jobs) if isinstance(item, Outcome)}
        return [found[job.id] for job in jobs]

    async def draw(self, jobs: list[DrawJob]) -> AsyncIterator[Partial | Outcome]:
        """Yields one outcome a job."""
        for outcome in asyncio.as_completed([self._together(job) for job in jobs]):
            yield await outcome


class Engine:
    """An expert (or the teacher) as a plain Ray actor: the engine with the same models and threads, and no service."""

    def __init__(self, run_dir: str, expert: int | str) -> None:
        self._expert = Expert(run_dir, {}, expert)

    async def batch_size(self) -> int:
        """Returns the largest batch."""
        return (await self._expert.status())["max_batch_size"]

    async def draw(self, asks: Sequence[Ask]) -> tuple[float, float]:
        """Draws images, all asked for at once; returns when it began and when the last one was there."""
        begun = time.time()
        jobs = [DrawJob(str(n), ask.prompt, "", 1, ask.seed, ask.steps, GUIDANCE) for n, ask in enumerate(asks)]
        async for item in self._expert.draw(jobs):
            if isinstance(item, Outcome) and item.error is not None:
                raise RuntimeError(item.error)
        return begun, time.time()


class Engines:
    """Engines side by side.

    Attributes:
        sizes: the largest batch of each.
    """

    def __init__(self, run: RunDir, models: Sequence[int | str]) -> None:
        actor = ray.remote(num_cpus=0)(Engine)
        self._actors = [actor.remote(run.uri, model) for model in models]  # type: ignore[attr-defined]
        self.sizes: list[int] = ray.get([actor.batch_size.remote() for actor in self._actors])

    async def rate(self, parted: Sequence[Sequence[Ask]]) -> float:
        """Returns images a second, from the first request to the last image; each engine has its own requests."""
        spans = await asyncio.gather(*(actor.draw.remote(part) for actor, part in zip(self._actors, parted, strict=True)))
        return sum(map(len, parted)) / (max(end for _, end in spans) - min(begun for begun, _ in spans))

    def stop(self) -> None:
        """Ends the actors."""
        for actor in self._actors:
            ray.kill(actor)
