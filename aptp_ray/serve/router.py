"""The router's deployment: where each prompt belongs, and its way there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray.serve.handle import DeploymentHandle
from transformers import AutoTokenizer

from aptp_ray.artifacts import RunDir, load_run, resolve_source
from aptp_ray.config import Config
from aptp_ray.core.router import PromptRouter
from aptp_ray.serve.dispatch import Dispatcher, Ticket, ask
from aptp_ray.serve.metrics import RouterMeters
from aptp_ray.serve.protocol import DrawJob, Drawn, Outcome, Overloaded, Partial, Placed
from aptp_ray.serve.routing import Route, RoutingQueue, route_with

logger = logging.getLogger("ray.serve")

_HEALTH_TIMEOUT_S = 10.0
_MOST_WAITING_PROMPTS = 4096  # of lists that somebody wants to know about


class Router:
    """The deployment ``router``; needs the run directory and the handles of its models, in the order of their numbers."""

    def __init__(
        self,
        run_dir: str,
        storage_options: dict[str, Any],
        options: dict[str, Any],
        experts: list[DeploymentHandle],
        models: list[str],
        macs_ratios: list[float],
    ) -> None:
        run, config = load_run(run_dir, storage_options)
        self._options = config.serve.model_copy(update=options)
        router = load_router(run, config)
        self._models, self._experts = models, experts
        if router.num_codes > len(experts):
            raise ValueError(f"{run.uri}: router/ has {router.num_codes} codes, routing.json {len(experts)} experts")
        self._count_tokens = _TokenCount(run)
        self._meters = RouterMeters()
        self._routing = RoutingQueue(
            route_with(router),
            max_batch_size=self._options.route_batch_size,
            wait_s=self._options.route_wait_ms / 1000,
            threads=self._options.threads_per_expert,
            # Its weights are mapped from the same files: they are there once.
            for_lists=[route_with(load_router(run, config)) for _ in range(self._options.route_workers - 1)],
        )
        self._dispatcher = Dispatcher(experts, models, macs_ratios, self._options, self._meters)
        self._jobs = 0  # in here, being routed or with an expert
        self._most_jobs = most_jobs(len(experts), self._options)

    # -- drawing ---------------------------------------------------------------------------------------------------------

    async def draw(self, job: DrawJob) -> Drawn:
        """Routes a job and returns what its expert made of it; a caller that leaves takes its job out of the batch."""
        placed = Placed(0)
        async with aclosing(self.stream(job)) as items:
            async for item in items:
                if isinstance(item, Placed):
                    placed = item
                elif isinstance(item, Outcome):
                    return Drawn(item, placed)
        raise RuntimeError(f"job {job.id} ended without an outcome")

    async def stream(self, job: DrawJob) -> AsyncGenerator[Placed | Partial | Outcome, None]:
        """Yields where a job goes, its previews, and its outcome; only the outcome (503) if there is no room for it."""
        if self._jobs >= self._most_jobs:
            self._meters.refused("auto" if job.expert is None else self._models[job.expert])
            yield _refusal(job.id, Overloaded(f"{self._jobs} requests are under way", 1))
            return
        self._jobs += 1
        ticket: Ticket | None = None
        try:
            route = await self._route(job.prompt) if job.expert is None else None
            try:
                ticket = self._dispatcher.submit(job, route)
            except Overloaded as error:
                yield _refusal(job.id, error)
                return
            yield replace(ticket.placed, text_tokens=self._count_tokens(job))
            async for item in ticket.follow():
                yield item
        finally:
            self._jobs -= 1
            if ticket is not None:
                self._dispatcher.leave(ticket)

    async def _route(self, prompt: str) -> Route:
        begun = time.perf_counter()
        route = await self._routing.route(prompt)
        self._meters.routed(self._models[route.expert], route.similarity[route.expert], 1000 * (time.perf_counter() - begun))
        return route

    # -- the rest --------------------------------------------------------------------------------------------------------

    async def route(self, prompts: Sequence[str]) -> list[Route] | Outcome:
        """Returns each prompt's expert and why; an outcome (503) if very many prompts wait already."""
        if self._routing.waiting > _MOST_WAITING_PROMPTS:
            return _refusal("", Overloaded(f"{self._routing.waiting} prompts wait to be routed", 5))
        if len(prompts) == 1:
            return [await self._routing.route(prompts[0])]
        return await self._routing.route_many(prompts)

    async def check_health(self) -> None:
        """Serve calls this before it sends the first request, and then every few seconds."""
        self._dispatcher.watch()

    async def health(self) -> dict[str, str]:
        """Asks every replica of every model; returns "ok", "idle" (none runs, and none needs to) or what is wrong, by name."""
        await self._routing.route("is anyone there")
        answers = await asyncio.gather(*(ask(handle, _HEALTH_TIMEOUT_S) for handle in self._experts))
        missing = "idle" if self._options.replicas == 0 else "no replica answers"
        return {"router": "ok"} | {
            model: "ok" if answer else missing for model, answer in zip(self._models, answers, strict=True)
        }


def _refusal(job_id: str, error: Overloaded) -> Outcome:
    message = f"the service is overloaded ({error.what}); try again in {error.retry_after_s} s"
    return Outcome(job_id, error=message, status=503, retry_after_s=error.retry_after_s)


def most_jobs(experts: int, options: Any) -> int:
    """Returns how many jobs one router replica holds: what its share of the experts draws at once, and the queue."""
    places = experts * max(1, options.replicas, options.max_replicas) * options.batch_limit
    return max(1, (places + options.max_queued_requests) // options.router_replicas)


def load_router(run: RunDir, config: Config) -> PromptRouter:
    """Loads a run's router with its prompt encoder."""
    # The config's name for the encoder, not the path on record, which another machine may not have. The router compares
    # fingerprints, so a wrong encoder is refused.
    source = resolve_source(config.router.prompt_encoder, config.storage_options)
    return PromptRouter.from_pretrained(run.local("router"), prompt_encoder=source)


class _TokenCount:
    """Counts what the teacher's text encoder reads of a job, for ``usage``."""

    def __init__(self, run: RunDir) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(f"{run.local('teacher')}/tokenizer")

    def __call__(self, job: DrawJob) -> int:
        texts = [job.prompt, job.negative_prompt] if job.negative_prompt else [job.prompt]
        most = self._tokenizer.model_max_length
        return sum(min(len(ids), most) for ids in self._tokenizer(texts).input_ids)
