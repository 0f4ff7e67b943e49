"""The engine's thread: a :class:`Sampler` driven step by step, which jobs join and leave while it runs."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from aptp_ray.core.image_request import Handle, ImageRequest
from aptp_ray.core.sampler import Sampler
from aptp_ray.serve.protocol import DrawJob, Outcome, Partial, Timings

logger = logging.getLogger("ray.serve")

_REMEMBERED_CANCELS = 4096
_CANCELLED = 499  # nginx's status for a client that closed the connection; nobody is left to read it
_TOO_LATE = 504
_SMOOTHING = 0.1  # weight of the latest step in the running mean of step times


@dataclass(eq=False)
class _Running:
    """A job in the engine and where its answers go."""

    job: DrawJob
    answer: Callable[[Partial | Outcome], None]  # from the engine's thread
    arrived_at: float
    handles: list[Handle] = field(default_factory=list)


class DrawingLoop:
    """Runs a sampler in a thread of its own, merging arrivals and cancellations between its steps.

    The sampler belongs to that thread; :meth:`draw` and :meth:`cancel` leave word for it, from any event loop.
    """

    def __init__(self, sampler: Sampler, threads: int = 1, turns: AbstractContextManager[None] | None = None) -> None:
        """Starts the thread.

        Args:
            sampler: nobody else's from now on.
            threads: torch's, on a CPU.
            turns: entered for each step of the batch; see :class:`~aptp_ray.serve.turns.Turns`.
        """
        self._sampler = sampler
        self._turns: AbstractContextManager[None] = turns or nullcontext()
        self._inbox: deque[_Running | str] = deque()  # jobs, and ids to cancel
        self._left: deque[_Running] = deque()  # jobs whose caller has gone
        self._running: dict[str, list[_Running]] = {}
        # A cancellation may overtake its job on the way here.
        self._cancelled_early: OrderedDict[str, None] = OrderedDict()
        self._step_ms: dict[int, float] = {}  # running mean by images in the batch
        self._ended = {"done": 0, "cancelled": 0, "failed": 0}  # jobs, since the start
        self._counts = (0, 0)  # images in the batch and in line, for other threads to read
        self._something = threading.Event()
        sampler.on_progress = self._something.set
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(threads,), name="denoising", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs, and the sampler's, too."""
        return self._thread.is_alive() and self._sampler.alive

    def status(self) -> dict[str, Any]:
        """Returns images in the batch and in line, the batch's limit, the time of a step, and how many jobs have ended how."""
        active, waiting = self._counts
        return {
            "active": active,
            "waiting": waiting + sum(r.job.n for r in list(self._inbox) if isinstance(r, _Running)),
            "max_batch_size": self._sampler.max_batch_size,
            "step_ms": round(self.step_ms(active), 3),
            **self._ended,
        }

    def step_ms(self, images: int) -> float:
        """Returns the running mean of a step with about so many images; 0 before the first step."""
        known = dict(self._step_ms)
        return known[min(known, key=lambda size: abs(size - images))] if known else 0.0

    async def draw(self, jobs: list[DrawJob]) -> AsyncIterator[Partial | Outcome]:
        """Yields previews, and one outcome a job, its last (status 499: cancelled). Leaving early cancels what is left."""
        loop, answers = asyncio.get_running_loop(), asyncio.Queue[Partial | Outcome]()

        def answer(item: Partial | Outcome) -> None:
            try:
                loop.call_soon_threadsafe(answers.put_nowait, item)
            except RuntimeError:  # the event loop is closed: nobody waits any more
                logger.debug("nobody waits for job %s", item.id)

        now = time.perf_counter()
        left = {job.id: _Running(job, answer, now) for job in jobs}
        self._inbox.extend(left.values())
        self._something.set()
        try:
            while left:
                item = await answers.get()
                if isinstance(item, Outcome):
                    left.pop(item.id, None)
                yield item
        finally:
            if left:
                self._left.extend(left.values())
                self._something.set()

    def cancel(self, ids: Iterable[str]) -> None:
        """Drops jobs before the next step; ids that are not here are remembered for a while."""
        self._inbox.extend(ids)
        self._something.set()

    def close(self) -> None:
        """Ends the thread after the step that it is at; jobs that are left get a 503."""
        self._closed = True
        self._something.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    # -- in the engine's thread ------------------------------------------------------------------------------------------

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # OpenMP's thread count belongs to the calling thread
        while not self._closed:
            # Cleared before it is looked at what has come: nothing that comes later is slept through.
            self._something.clear()
            self._merge()
            self._drop_late()
            self._step()
            self._deliver()
            self._count()
            if not self._sampler.ready:
                self._something.wait()
        self._merge()
        for running in self._all():
            self._end(running, Outcome(running.job.id, error="the replica is shutting down", status=503))
        self._sampler.close()

    def _all(self) -> list[_Running]:
        return [running for group in self._running.values() for running in group]

    def _merge(self) -> None:
        """Cancellations leave, arrivals join, in the order in which they came."""
        while self._inbox:
            item = self._inbox.popleft()
            if isinstance(item, _Running):
                if item.job.id in self._cancelled_early:
                    self._end(item, Outcome(item.job.id, error="cancelled", status=_CANCELLED))
                else:
                    self._join(item)
            elif item in self._running:
                for running in list(self._running[item]):
                    self._end(running, Outcome(item, error="cancelled", status=_CANCELLED))
            else:
                self._cancelled_early[item] = None
        while len(self._cancelled_early) > _REMEMBERED_CANCELS:
            self._cancelled_early.popitem(last=False)
        while self._left:
            running = self._left.popleft()
            if running in self._running.get(running.job.id, ()):
                self._end(running, Outcome(running.job.id, error="cancelled", status=_CANCELLED))

    def _join(self, running: _Running) -> None:
        job = running.job
        self._running.setdefault(job.id, []).append(running)
        try:
            for index in range(job.n):
                request = ImageRequest(
                    prompt=job.prompt,
                    seed=job.seed,
                    index=index,
                    num_inference_steps=job.num_inference_steps,
                    guidance_scale=job.guidance_scale,
                    negative_prompt=job.negative_prompt,
                    size=job.size,
                    previews=job.partial_images,
                )
                running.handles.append(self._sampler.submit(request))
        except ValueError as error:
            self._end(running, Outcome(job.id, error=str(error), status=400))

    def _drop_late(self) -> None:
        now = time.time()
        for running in self._all():
            if running.job.deadline is not None and running.job.deadline <= now:
                message = "the deadline has passed before the image was drawn"
                self._end(running, Outcome(running.job.id, error=message, status=_TOO_LATE))

    def _step(self) -> None:
        began, active = time.perf_counter(), self._sampler.active
        try:
            # To take in what was done beside the steps needs no turn.
            with self._turns if self._sampler.ready else nullcontext():
                self._sampler.step(wait=False)
        except Exception:  # the sampler keeps failures to their image; what still escapes ends those in it
            logger.exception("a denoising step failed")
            for running in self._all():
                self._end(running, Outcome(running.job.id, error="the image could not be drawn", status=500))
            return
        if active:
            took = 1000 * (time.perf_counter() - began)
            mean = self._step_ms.get(active, took)
            self._step_ms[active] = mean + _SMOOTHING * (took - mean)

    def _deliver(self) -> None:
        for running in self._all():
            handles = running.handles
            for index, handle in enumerate(handles):
                for preview in handle.previews:
                    running.answer(Partial(running.job.id, index, preview.number, preview.pixels))
                handle.previews.clear()
            failed = next((handle for handle in handles if handle.state == "failed"), None)
            if failed is not None:
                logger.error("job %s failed", running.job.id, exc_info=failed.error)
                message = str(failed.error) if isinstance(failed.error, ArithmeticError) else "the image could not be drawn"
                self._end(running, Outcome(running.job.id, error=message, status=500))
            elif all(handle.state == "done" for handle in handles):
                images = [handle.pixels for handle in handles if handle.pixels is not None]
                self._end(running, Outcome(running.job.id, images=images, timings=_timings(running)))

    def _end(self, running: _Running, outcome: Outcome) -> None:
        for handle in running.handles:
            self._sampler.cancel(handle)  # frees the places of those still under way
        group = self._running.get(running.job.id, [])
        if running in group:
            group.remove(running)
        if not group:
            self._running.pop(running.job.id, None)
        self._ended["done" if outcome.error is None else "cancelled" if outcome.status == _CANCELLED else "failed"] += 1
        self._count()  # before the answer, so that who gets it sees itself gone
        running.answer(outcome)

    def _count(self) -> None:
        self._counts = (self._sampler.active, self._sampler.waiting)


def _timings(running: _Running) -> Timings:
    handles = running.handles
    admitted = min(handle.admitted_at for handle in handles)
    denoised = max(handle.denoised_at for handle in handles)
    return Timings(
        queue_ms=1000 * (admitted - running.arrived_at),
        denoise_ms=1000 * (denoised - admitted),
        decode_ms=1000 * (max(handle.ended_at for handle in handles) - denoised),
        batch_size=sum(handle.company for handle in handles) / sum(handle.step for handle in handles),
    )
