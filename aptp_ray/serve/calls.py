"""How the ingress calls the router: within the request's deadline, and again if the router's replica is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from aptp_ray.serve.dispatch import LOST
from aptp_ray.serve.environment import way_of_calling
from aptp_ray.serve.protocol import ApiError, DrawJob, Drawn, Outcome, Partial, Placed
from aptp_ray.serve.routing import Route

logger = logging.getLogger("ray.serve")

_BACKOFF_S = 0.1
_GRACE_S = 0.5  # the expert drops a late job itself, and frees its place; this is for all that can hold up its answer
_HEALTH_TIMEOUT_S = 20.0


class RouterCalls:
    """The router as the ingress sees it: failures come out as :class:`ApiError`."""

    def __init__(self, router: DeploymentHandle, retries: int) -> None:
        self._router, self._retries = router, retries

    async def draw(self, job: DrawJob) -> Drawn:
        """Returns a job's images and where they were drawn."""
        for attempt in range(self._retries + 1):
            response: Any = self._method("draw").remote(_renamed(job, attempt))
            try:
                async with asyncio.timeout(_seconds_left(job)):
                    drawn: Drawn = await response
                check(drawn.outcome)
                return drawn
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                response.cancel()  # does nothing to one that has ended
                await self._think_again(error, attempt)
        raise _lost()

    async def stream(self, job: DrawJob) -> AsyncGenerator[Placed | Partial | Drawn, None]:
        """Yields where a job goes, its previews, and its images."""
        sent: set[tuple[int, int]] = set()
        placed: Placed | None = None
        for attempt in range(self._retries + 1):
            items: Any = self._method("stream", stream=True).remote(_renamed(job, attempt))
            try:
                while True:
                    async with asyncio.timeout(_seconds_left(job)):
                        item = await anext(items)
                    if isinstance(item, Placed):
                        if placed is None:
                            yield item
                        placed = item
                    elif isinstance(item, Outcome):
                        check(item)
                        assert placed is not None
                        yield Drawn(item, placed)
                        return
                    elif (item.index, item.number) not in sent:
                        sent.add((item.index, item.number))
                        yield item
            except (asyncio.CancelledError, GeneratorExit):
                items.cancel()
                raise
            except Exception as error:
                items.cancel()
                await self._think_again(error, attempt)
        raise _lost()

    async def route(self, prompts: Sequence[str], deadline: float) -> list[Route]:
        """Returns where prompts belong."""
        for attempt in range(self._retries + 1):
            response: Any = self._method("route").remote(list(prompts))
            try:
                async with asyncio.timeout(max(0.0, deadline - time.time())):
                    routes: list[Route] | Outcome = await response
                if isinstance(routes, Outcome):
                    check(routes)
                    raise _lost()
                return routes
            except asyncio.CancelledError:
                response.cancel()
                raise
            except Exception as error:
                response.cancel()
                await self._think_again(error, attempt)
        raise _lost()

    async def health(self) -> dict[str, str]:
        """Returns "ok" or what is wrong, by deployment; a broadcast passes the queues: a busy service is not an ill one."""
        try:
            answers = await self._router.broadcast("health").results_async(timeout_s=_HEALTH_TIMEOUT_S, return_exceptions=True)
        except Exception as error:
            logger.warning("the router did not answer a health check: %r", error)
            answers = []
        good = [answer for answer in answers if isinstance(answer, dict)]
        # One replica of several that is just being replaced does not make the service unready.
        return {name: state for answer in good for name, state in answer.items()} or {"router": "no answer"}

    def _method(self, name: str, **options: Any) -> Any:
        return self._router.options(method_name=name, **options, **way_of_calling())

    async def _think_again(self, error: Exception, attempt: int) -> None:
        """Returns, after a pause, if another attempt is worth it; raises what the client is told if not."""
        if isinstance(error, TimeoutError):
            raise late() from error
        if isinstance(error, BackPressureError):
            message = "the service is overloaded; try again in 1 s"
            raise ApiError(503, message, code="overloaded", retry_after_s=1) from error
        if not isinstance(error, (*LOST, StopAsyncIteration)):
            raise error
        logger.warning("the router's replica was lost (%s), attempt %d", type(error).__name__, attempt + 1)
        await asyncio.sleep(_BACKOFF_S * 2**attempt)


def check(outcome: Outcome) -> None:
    """Raises: ApiError: if a job was not drawn."""
    if outcome.error is None:
        return
    code = {400: "invalid_value", 503: "overloaded", 504: "timeout"}.get(outcome.status)
    retry = outcome.retry_after_s or (1 if outcome.status == 503 else None)
    raise ApiError(outcome.status, outcome.error, code=code, retry_after_s=retry)


def late() -> ApiError:
    """Returns the answer to a request whose deadline has passed."""
    return ApiError(504, "the request's deadline has passed before its images were drawn", code="timeout")


def _lost() -> ApiError:
    return ApiError(503, "the router was lost more often than a request is sent again; try again", retry_after_s=1)


def _renamed(job: DrawJob, attempt: int) -> DrawJob:
    # What an attempt before this one left behind must not be taken for this one's.
    return replace(job, id=f"{job.id}.{attempt}")


def _seconds_left(job: DrawJob) -> float | None:
    return None if job.deadline is None else max(0.0, job.deadline + _GRACE_S - time.time())
