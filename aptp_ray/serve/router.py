"""The router's deployment: prompts in micro-batches to their experts, one call a group."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections import defaultdict
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from ray import serve
from ray.serve.handle import DeploymentHandle

from aptp_ray.artifacts import load_run, resolve_source
from aptp_ray.core.code_router import Routing
from aptp_ray.core.router import PromptRouter
from aptp_ray.serve.protocol import DrawJob, Drawn, Outcome

logger = logging.getLogger("ray.serve")

_HEALTH_TIMEOUT_S = 10.0


class Router:
    """The deployment ``router``; needs the run directory and the experts' handles, in the order of their ids."""

    def __init__(self, run_dir: str, storage_options: dict[str, Any], experts: list[DeploymentHandle]) -> None:
        run, config = load_run(run_dir, storage_options)
        # Routing is made in a thread of its own, whose OpenMP count is its own, too.
        self._thread = ThreadPoolExecutor(
            1, "router", initializer=torch.set_num_threads, initargs=(config.serve.threads_per_expert,)
        )
        # The config's name for the encoder, not the path on record, which another machine may not have. The router
        # compares fingerprints, so a wrong encoder is refused.
        source = resolve_source(config.router.prompt_encoder)
        self._router = PromptRouter.from_pretrained(run.local("router"), prompt_encoder=source)
        if self._router.num_codes != len(experts):
            raise ValueError(f"{run.uri}: router/ has {self._router.num_codes} codes, routing.json {len(experts)} experts")
        self._experts = experts
        self._dispatch.set_max_batch_size(config.serve.route_batch_size)  # type: ignore[attr-defined]
        self._dispatch.set_batch_wait_timeout_s(config.serve.route_wait_ms / 1000)  # type: ignore[attr-defined]
        self._outcomes: dict[str, tuple[int, asyncio.Future[Outcome]]] = {}  # of jobs that are with an expert
        self._routing: set[str] = set()  # jobs of a batch that is being routed
        self._gone: set[str] = set()  # those of them whose client left meanwhile
        self._tasks: set[asyncio.Task[None]] = set()

    # -- drawing ---------------------------------------------------------------------------------------------------------

    async def draw(self, job: DrawJob) -> Drawn:
        """Routes a job and returns what its expert made of it; a caller that leaves takes its job out of the batch."""
        try:
            expert, similarity, outcome = await self._dispatch(job)
            return Drawn(await outcome, expert, similarity)
        except asyncio.CancelledError:
            if job.id in self._outcomes:
                self._detached(self._cancel(self._outcomes[job.id][0], job.id))
            elif job.id in self._routing:
                self._gone.add(job.id)
            # Otherwise it still waits for a batch to form, from which serve.batch drops it.
            raise

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005, max_concurrent_batches=2)
    async def _dispatch(self, jobs: list[DrawJob]) -> list[tuple[int, list[float], asyncio.Future[Outcome]]]:
        """Routes a micro-batch and hands each group to its expert; does not wait for images."""
        ids = {job.id for job in jobs}
        self._routing |= ids
        try:
            routing = await self._route([job.prompt for job in jobs])
        finally:
            self._routing -= ids
            gone = self._gone & ids
            self._gone -= ids
        results: list[tuple[int, list[float], asyncio.Future[Outcome]]] = []
        groups: dict[int, list[DrawJob]] = defaultdict(list)
        for job, routed, similarity in zip(jobs, routing.expert.tolist(), routing.similarity.tolist(), strict=True):
            expert = routed if job.expert is None else job.expert
            future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            results.append((expert, similarity, future))
            if job.id not in gone:
                self._outcomes[job.id] = (expert, future)
                groups[expert].append(job)
        for expert, group in groups.items():
            self._detached(self._follow(expert, group))
        return results

    async def _follow(self, expert: int, group: list[DrawJob]) -> None:
        """One streaming call for a group; each job's caller is answered as soon as its images are there."""
        try:
            stream: Any = self._experts[expert].options(stream=True).draw.remote(group)
            async for outcome in stream:
                self._settle(outcome)
        except Exception:  # the replica died, say: its jobs fail, nobody else's
            logger.exception("expert-%d lost a group of %d jobs", expert, len(group))
        finally:
            for job in group:
                self._settle(Outcome(job.id, error=f"expert-{expert} did not finish the job; try again", status=503))

    def _settle(self, outcome: Outcome) -> None:
        _, future = self._outcomes.pop(outcome.id, (None, None))
        if future is not None and not future.done():
            future.set_result(outcome)

    async def _cancel(self, expert: int, job_id: str) -> None:
        # A group call belongs to several clients, so it cannot itself be cancelled for one; which replica has it is
        # not known here, so all of that expert's are told.
        await self._experts[expert].broadcast("cancel", [job_id]).results_async(timeout_s=30, return_exceptions=True)

    def _detached(self, work: Coroutine[Any, Any, None]) -> None:
        """Runs ``work`` outside of any request's context: Serve cancels a request's calls when its client leaves."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- the rest --------------------------------------------------------------------------------------------------------

    async def route(self, prompts: list[str]) -> tuple[list[int], list[list[float]]]:
        """Returns each prompt's expert and its similarity with every code."""
        routing = await self._route(prompts)
        return routing.expert.tolist(), routing.similarity.tolist()

    async def _route(self, prompts: list[str]) -> Routing:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._router.route, prompts)

    async def health(self) -> dict[str, str]:
        """Asks every replica of every expert; returns "ok" or what is wrong, by name."""
        await self._route(["is anyone there"])
        answers = await asyncio.gather(*(self._ask(handle) for handle in self._experts))
        return {"router": "ok"} | {f"expert-{index}": answer for index, answer in enumerate(answers)}

    @staticmethod
    async def _ask(handle: DeploymentHandle) -> str:
        try:  # a broadcast passes the queues: a busy expert is not an ill one
            answers = await handle.broadcast("status").results_async(timeout_s=_HEALTH_TIMEOUT_S, return_exceptions=True)
        except TimeoutError:
            return f"no answer in {_HEALTH_TIMEOUT_S:.0f} s"
        if not answers:
            return "no replica is running"
        return next((f"{type(a).__name__}: unhealthy" for a in answers if isinstance(a, BaseException)), "ok")
