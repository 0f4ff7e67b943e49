"""Jobs to experts: admission, groups, retries after a lost replica, and cancellation.

Images are functions of their request, so a job whose replica died is simply sent again.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

from grpc.aio import AioRpcError
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from aptp_ray.sections import Serve
from aptp_ray.serve.environment import way_of_calling
from aptp_ray.serve.metrics import RouterMeters
from aptp_ray.serve.protocol import DrawJob, Outcome, Overloaded, Partial, Placed
from aptp_ray.serve.routing import Route
from aptp_ray.serve.spill import Load, place

logger = logging.getLogger("ray.serve")

# The replica died, is unreachable, or was stopped while it had the group: another one can do the same. (Serve wraps the
# death of an actor behind a stream into its own exceptions, and a replica that is stopped by force cancels its tasks. Where
# replicas call each other by gRPC, a connection that breaks in the midst of a call comes out as gRPC's own error.)
LOST = (RayActorError, RayServeException, TaskCancelledError, AioRpcError)
_STATUS_PERIOD_S = 0.5
_BACKOFF_S = 0.1
_ALPHA = 0.2  # of a new step time in the running mean


@dataclass(eq=False)
class Group:
    """Tickets that share a call, and the task that follows it."""

    tickets: list[Ticket]
    task: asyncio.Task[None]


@dataclass(eq=False)
class Ticket:
    """A job on its way, and where its previews and its outcome go."""

    job: DrawJob
    placed: Placed
    items: asyncio.Queue[Partial | Outcome] = field(default_factory=asyncio.Queue)
    attempt: str = ""  # the job's id in the present attempt
    group: Group | None = None
    ended: bool = False
    seen: set[tuple[int, int]] = field(default_factory=set)  # previews that were passed on

    async def follow(self) -> AsyncIterator[Partial | Outcome]:
        """Yields previews, then the outcome."""
        while True:
            item = await self.items.get()
            yield item
            if isinstance(item, Outcome):
                return


class Dispatcher:
    """Hands jobs to experts, those that arrive together in groups. All methods belong to one event loop."""

    def __init__(
        self, experts: list[DeploymentHandle], models: list[str], macs_ratios: list[float], options: Serve, meters: RouterMeters
    ) -> None:
        self._experts, self._models, self._macs_ratios = experts, models, macs_ratios
        self._options, self._meters = options, meters
        self._images = [0] * len(experts)  # under way, sent by this router
        self._seen: list[dict[str, Any]] = [{} for _ in experts]  # what their replicas said last, summed up
        self._step_ms = [0.0] * len(experts)
        self._outbox: dict[int, list[Ticket]] = defaultdict(list)
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    # -- admission -------------------------------------------------------------------------------------------------------

    def load(self, expert: int) -> Load:
        """Returns what is known of an expert: its own count, or ours where that is higher."""
        options, seen = self._options, self._seen[expert]
        replicas = seen.get("replicas", max(1, options.replicas))
        # Other routers have jobs there, too; what is still on its way is only in this one's count.
        images = max(self._images[expert], seen.get("images", 0))
        most = options.max_replicas if options.replicas < options.max_replicas else max(1, options.replicas)
        room = most * (options.batch_limit + options.max_waiting_images) // options.router_replicas - self._images[expert]
        places = replicas * seen.get("max_batch_size", options.batch_limit)
        return Load(images, places, self._step_ms[expert], room)

    def submit(self, job: DrawJob, route: Route | None) -> Ticket:
        """Chooses the expert and queues the job for it.

        Args:
            job: as the request has it.
            route: of its prompt; None: the job names its expert.

        Raises:
            Overloaded: if the expert's queue is full.
        """
        if route is None:
            assert job.expert is not None
            placed = Placed(job.expert)
        else:
            placed = self._place(job, route)
        model, load = self._models[placed.expert], self.load(placed.expert)
        # A job larger than all room is taken when nothing else is there.
        if load.room < job.n and self._images[placed.expert]:
            self._meters.refused(model)
            seconds = load.latency_ms(job.n, job.num_inference_steps) / 1000
            raise Overloaded(f"{model} has no room for {job.n} more images", min(60, max(1, math.ceil(seconds))))
        if placed.spilled_from is not None:
            self._meters.spilled(self._models[placed.spilled_from], model)
        ticket = Ticket(job, placed)
        self._count(placed.expert, job.n)
        if not self._outbox:
            # Runs when all callers whose prompts were in the same micro-batch have been here: they make the groups.
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox[placed.expert].append(ticket)
        return ticket

    def _place(self, job: DrawJob, route: Route) -> Placed:
        options = self._options
        if not options.spill or options.latency_budget_ms is None:
            return Placed(route.expert, route.similarity, route.scores)
        expert = place(
            route.expert,
            images=job.n,
            steps=job.num_inference_steps,
            budget_ms=options.latency_budget_ms,
            scores=route.scores,
            macs_ratios=self._macs_ratios[: len(route.scores)],
            loads=[self.load(expert) for expert in range(len(route.scores))],
        )
        return Placed(expert, route.similarity, route.scores, None if expert == route.expert else route.expert)

    def watch(self) -> None:
        """Begins to ask the experts for their loads, where spilling needs them; may be called again."""
        if self._options.spill and self._watch is None:
            self._watch = self._detached(self._watch_loads())

    async def _watch_loads(self) -> None:
        while True:
            for expert, handle in enumerate(self._experts):
                answers = await ask(handle, _STATUS_PERIOD_S * 4)
                if answers:
                    self._seen[expert] = {
                        "replicas": len(answers),
                        "images": sum(a["active"] + a["waiting"] for a in answers),
                        "max_batch_size": max(a["max_batch_size"] for a in answers),
                    }
                    known = [a["step_ms"] for a in answers if a["step_ms"]]
                    self._step_ms[expert] = max(known, default=self._step_ms[expert])
                else:  # it is idle, or starts: nothing is spilled to it
                    self._seen[expert] = {"replicas": 0}
            await asyncio.sleep(_STATUS_PERIOD_S)

    def _count(self, expert: int, images: int) -> None:
        self._images[expert] += images
        self._meters.in_flight(self._models[expert], self._images[expert])

    # -- groups ----------------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, defaultdict(list)
        for expert, tickets in outbox.items():
            group: list[Ticket] = []
            for ticket in tickets:
                # A group beyond one batch would keep one replica busy while another has nothing to do.
                if group and sum(t.job.n for t in group) + ticket.job.n > self._options.batch_limit:
                    self._send(expert, group)
                    group = []
                group.append(ticket)
            if group:
                self._send(expert, group)

    def _send(self, expert: int, tickets: list[Ticket]) -> None:
        group = Group(tickets, self._detached(self._follow(expert, tickets)))
        for ticket in tickets:
            ticket.group = group

    async def _follow(self, expert: int, group: list[Ticket]) -> None:
        """Sends a group, again to another replica or the next one where that was lost, and passes on what comes back."""
        model = self._models[expert]
        try:
            for attempt in range(self._options.retries + 1):
                left = {f"{ticket.job.id}.{attempt}": ticket for ticket in group if not ticket.ended}
                if not left:
                    return
                if attempt:
                    self._meters.retried(model, len(left))
                    await asyncio.sleep(_BACKOFF_S * 2**attempt)
                for name, ticket in left.items():
                    ticket.attempt = name
                try:
                    await self._stream(expert, left)
                except LOST as error:
                    logger.warning("%s lost a group of %d jobs: %s", model, len(left), type(error).__name__)
        except asyncio.CancelledError:  # all of its callers have left
            raise
        except Exception:  # not of a kind that another replica would do better
            logger.exception("%s failed a group of %d jobs", model, len(group))
        finally:
            message = f"{model} did not finish the job; try again"
            for ticket in group:
                self._deliver(ticket, Outcome(ticket.job.id, error=message, status=503))

    async def _stream(self, expert: int, left: dict[str, Ticket]) -> None:
        jobs = [replace(ticket.job, id=name) for name, ticket in left.items()]
        stream: Any = self._experts[expert].options(method_name="draw", stream=True, **way_of_calling()).remote(jobs)
        try:
            async for item in stream:
                ticket = left.get(item.id)
                if ticket is not None:
                    self._deliver(ticket, replace(item, id=ticket.job.id))
        except asyncio.CancelledError:
            stream.cancel()
            raise

    def _deliver(self, ticket: Ticket, item: Partial | Outcome) -> None:
        if ticket.ended:
            return
        if isinstance(item, Partial):
            key = (item.index, item.number)
            if key in ticket.seen:  # of an attempt before this one
                return
            ticket.seen.add(key)
        else:
            self._end(ticket, item)
        ticket.items.put_nowait(item)

    def _end(self, ticket: Ticket, outcome: Outcome) -> None:
        ticket.ended = True
        expert, job = ticket.placed.expert, ticket.job
        self._count(expert, -job.n)
        self._meters.ended(self._models[expert], job, outcome)
        if outcome.timings is not None:
            step_ms, mean = outcome.timings.denoise_ms / job.num_inference_steps, self._step_ms[expert]
            self._step_ms[expert] = step_ms if not mean else mean + _ALPHA * (step_ms - mean)

    # -- leaving ---------------------------------------------------------------------------------------------------------

    def leave(self, ticket: Ticket) -> None:
        """Takes a job out of the batch, wherever it is; does nothing to one that has ended."""
        if ticket.ended:
            return
        self._end(ticket, Outcome(ticket.job.id, error="cancelled", status=499))
        expert = ticket.placed.expert
        if ticket.group is None:
            waiting = self._outbox.get(expert, [])
            if ticket in waiting:
                waiting.remove(ticket)
            return
        if all(mate.ended for mate in ticket.group.tickets):
            ticket.group.task.cancel()
        elif ticket.attempt:
            # A call that belongs to other clients, too, cannot itself be cancelled; which replica has it is not known
            # here, so all of that expert's are told.
            self._detached(self._cancel(expert, ticket.attempt))

    async def _cancel(self, expert: int, name: str) -> None:
        try:
            await self._experts[expert].broadcast("cancel", [name]).results_async(timeout_s=30, return_exceptions=True)
        except (TimeoutError, RayServeException) as error:  # a job whose replica is gone needs no cancelling
            logger.warning("%s did not hear that a client left: %s", self._models[expert], type(error).__name__)

    def _detached(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs ``work`` outside of any request's context: Serve cancels a request's calls when its client leaves."""
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def ask(handle: DeploymentHandle, timeout_s: float) -> list[Any]:
    """Returns the status of every replica that answers; a broadcast passes the queues, so a busy expert answers, too."""
    try:
        answers = await handle.broadcast("status").results_async(timeout_s=timeout_s, return_exceptions=True)
    except (TimeoutError, RayServeException):  # Serve raises the latter where no replica runs
        return []
    return [answer for answer in answers if not isinstance(answer, BaseException)]
