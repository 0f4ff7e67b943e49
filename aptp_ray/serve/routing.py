"""Prompts to experts in micro-batches: whatever comes while one batch is embedded forms the next."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from aptp_ray.core.router import PromptRouter


@dataclass(frozen=True)
class Route:
    """Where a prompt belongs, and why.

    Attributes:
        expert: the highest of ``scores``.
        similarity: [K] cosines with the codes.
        scores: [K] similarities plus the prices that balance the experts' shares.
    """

    expert: int
    similarity: list[float]
    scores: list[float]


Work = Callable[[list[str]], list[Route]]
Queue = deque[tuple[str, asyncio.Future[Route]]]


def route_with(router: PromptRouter) -> Work:
    """Returns the work of a :class:`RoutingQueue`."""

    def work(prompts: list[str]) -> list[Route]:
        routing = router.route(prompts)
        scores = (routing.similarity + router.prices()).tolist()
        return [Route(*row) for row in zip(routing.expert.tolist(), routing.similarity.tolist(), scores, strict=True)]

    return work


class RoutingQueue:
    """Runs ``work`` on a thread of its own, a batch at a time. All methods belong to one event loop.

    Single prompts go before those of long lists, of which a thread takes a batch at a time, so that a request for an image
    never waits for a thousand prompts that somebody else wants to know about.
    """

    def __init__(
        self,
        work: Work,
        *,
        max_batch_size: int,
        wait_s: float = 0.0,
        threads: int = 1,
        for_lists: Sequence[Work] = (),
    ) -> None:
        """Takes the work; threads start with the first prompt.

        Args:
            work: prompts -> their routes.
            max_batch_size: prompts in one call.
            wait_s: for more prompts, before a call that is not full.
            threads: torch's, in each of the threads.
            for_lists: the same work once more for each further thread, which takes of long lists alone: single prompts still
                make up batches together. Not the same object: a tokenizer serves one thread at a time.
        """
        self._works, self._max_batch_size, self._wait_s = (work, *for_lists), max_batch_size, wait_s
        # OpenMP's thread count belongs to the calling thread, so it is set in the one that computes.
        self._threads = ThreadPoolExecutor(len(self._works), "routing", initializer=torch.set_num_threads, initargs=(threads,))
        self._single: Queue = deque()
        self._many: Queue = deque()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def waiting(self) -> int:
        """Prompts that no batch has taken yet."""
        return len(self._single) + len(self._many)

    async def route(self, prompt: str) -> Route:
        """Routes one prompt."""
        return await self._put(self._single, prompt)

    async def route_many(self, prompts: Sequence[str]) -> list[Route]:
        """Routes prompts, in their order."""
        # Batches of similar lengths waste little on padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        futures = {index: self._put(self._many, prompts[index]) for index in order}
        return list(await asyncio.gather(*(futures[index] for index in range(len(prompts)))))

    def _put(self, queue: Queue, prompt: str) -> asyncio.Future[Route]:
        if not self._tasks:
            loop = asyncio.get_running_loop()
            queues = [(self._single, self._many), *((self._many,) for _ in self._works[1:])]
            self._tasks = [loop.create_task(self._run(*row)) for row in zip(self._works, queues, strict=True)]
        future: asyncio.Future[Route] = asyncio.get_running_loop().create_future()
        queue.append((prompt, future))
        self._wake.set()
        return future

    def _take(self, queues: Iterable[Queue]) -> list[tuple[str, asyncio.Future[Route]]]:
        batch: list[tuple[str, asyncio.Future[Route]]] = []
        for queue in queues:
            while queue and len(batch) < self._max_batch_size:
                prompt, future = queue.popleft()
                if not future.done():  # else whoever asked has left
                    batch.append((prompt, future))
        return batch

    async def _run(self, work: Work, queues: tuple[Queue, ...]) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not any(queues):
                self._wake.clear()
                await self._wake.wait()
            if self._wait_s and sum(map(len, queues)) < self._max_batch_size:
                await asyncio.sleep(self._wait_s)
            batch = self._take(queues)
            if not batch:
                continue
            try:
                routes = await loop.run_in_executor(self._threads, work, [prompt for prompt, _ in batch])
            except Exception as error:  # that batch's, and the callers' to report
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), route in zip(batch, routes, strict=True):
                if not future.done():
                    future.set_result(route)
