"""The engines of a simulated fleet: step-level batches on devices of their own, or on shared ones, advanced only when looked at.

An engine denoises all its images by one step at a time; arrivals join at the next step's beginning while there are places, as
``core/sampler.py`` does it. Between two changes of the batch all steps take the same time, so an engine jumps from change to
change: two or three events a request, however many steps it has.
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heappop, heappush
from typing import Protocol

Times = tuple[float, ...]


class Ledger:
    """Where engines write what became of each request, by number.

    Attributes:
        steps: of each request.
        admitted: time at which its first step begins; NaN: not yet.
        finished: time at which its last step ends; NaN: not yet.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.admitted = [math.nan] * len(steps)
        self.finished = [math.nan] * len(steps)


class Engine(Protocol):
    """What the simulator asks of an engine. Times never go back."""

    load: int  # images in the batch and in line
    image_steps: int
    batch_steps: int

    @property
    def busy_s(self) -> float:
        """Seconds in which its device had work."""

    def advance(self, now: float) -> None:
        """Does all that happens up to ``now``."""

    def arrive(self, request: int, now: float) -> None:
        """Takes a request in; ``advance(now)`` has been called."""


class Alone:
    """An engine with a device of its own."""

    __slots__ = ("_at", "_batch", "_done", "_join", "_ledger", "_line", "_step", "_times", "batch_steps", "busy_s",
                 "image_steps", "load")  # fmt: skip

    def __init__(self, times: Times, ledger: Ledger) -> None:
        self._times, self._ledger = times, ledger
        self._batch: list[tuple[int, int]] = []  # heap of (step count at its end, request)
        self._line: deque[int] = deque()
        self._at = 0.0  # a boundary between steps
        self._done = 0  # steps up to there
        self._step = 0.0  # seconds of one, for the batch as it is
        self._join = 0  # step count at which the line may join
        self.load, self.busy_s, self.image_steps, self.batch_steps = 0, 0.0, 0, 0

    def advance(self, now: float) -> None:
        batch, line, limit = self._batch, self._line, len(self._times)
        while batch:
            until = batch[0][0]
            if line and self._join < until and len(batch) < limit:
                until = self._join
            steps = until - self._done
            at = self._at + steps * self._step
            if at > now:
                return
            self.busy_s += at - self._at
            self.batch_steps += steps
            self.image_steps += steps * len(batch)
            self._at, self._done = at, until
            finished = self._ledger.finished
            while batch and batch[0][0] == until:
                finished[heappop(batch)[1]] = at
                self.load -= 1
            if line:
                self._admit(at)
            if batch:
                self._step = self._times[len(batch) - 1]

    def _admit(self, at: float) -> None:
        batch, line, ledger = self._batch, self._line, self._ledger
        limit = len(self._times)
        while line and len(batch) < limit:
            request = line.popleft()
            ledger.admitted[request] = at
            heappush(batch, (self._done + ledger.steps[request], request))

    def arrive(self, request: int, now: float) -> None:
        self.load += 1
        if not self._batch:
            self._at = now
            self._line.append(request)
            self._admit(now)
            self._step = self._times[0]
            return
        if not self._line:
            self._join = self._done + math.ceil((now - self._at) / self._step)
        self._line.append(request)


class Shared:
    """Engines on one device, which splits itself evenly among those at work: each has full speed while there are lanes for all.

    The processes of one GPU take turns on it; on a CPU, threads share the cores.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.at = 0.0
        self.working: list[Tenant] = []
        self.busy_s = 0.0

    def advance(self, now: float) -> None:
        working = self.working
        while working:
            speed = min(1.0, self.lanes / len(working))
            first = min(working, key=_left)
            seconds = first.left / speed
            if self.at + seconds > now:
                seconds = now - self.at
                if seconds > 0:
                    self.busy_s += seconds
                    for tenant in working:
                        tenant.left -= seconds * speed
                break
            for tenant in working:
                if tenant is not first:
                    tenant.left = max(0.0, tenant.left - first.left)
            self.at += seconds
            self.busy_s += seconds
            if not first.change(self.at):
                working.remove(first)
        if now < math.inf:
            self.at = max(self.at, now)


class Tenant:
    """An engine on a shared device; its work is counted in seconds at full speed."""

    __slots__ = ("_batch", "_device", "_done", "_ledger", "_line", "_step", "_times", "_until", "batch_steps", "image_steps",
                 "left", "load")  # fmt: skip

    def __init__(self, times: Times, ledger: Ledger, device: Shared) -> None:
        self._times, self._ledger, self._device = times, ledger, device
        self._batch: list[tuple[int, int]] = []
        self._line: deque[int] = deque()
        self._done = 0
        self._until = 0  # step count of its next change
        self._step = 0.0
        self.left = 0.0  # work up to there
        self.load, self.image_steps, self.batch_steps = 0, 0, 0

    @property
    def busy_s(self) -> float:
        """Of the device; all its tenants say the same."""
        return self._device.busy_s

    def advance(self, now: float) -> None:
        self._device.advance(now)

    def change(self, at: float) -> bool:
        """The batch has come to its next change; returns whether anything is left in it."""
        batch, ledger = self._batch, self._ledger
        steps = self._until - self._done
        self.batch_steps += steps
        self.image_steps += steps * len(batch)
        self._done = self._until
        while batch and batch[0][0] == self._done:
            ledger.finished[heappop(batch)[1]] = at
            self.load -= 1
        self._fill(at)
        return bool(batch)

    def _fill(self, at: float) -> None:
        batch, line, ledger = self._batch, self._line, self._ledger
        while line and len(batch) < len(self._times):
            request = line.popleft()
            ledger.admitted[request] = at
            heappush(batch, (self._done + ledger.steps[request], request))
        if batch:
            self._step = self._times[len(batch) - 1]
            self._until = batch[0][0]
            self.left = (self._until - self._done) * self._step

    def arrive(self, request: int, now: float) -> None:
        self.load += 1
        self._line.append(request)
        if not self._batch:
            self._fill(now)
            self._device.working.append(self)
        elif len(self._batch) < len(self._times) and len(self._line) == 1:
            # Joins when the step under way ends (at once, if it has only begun): no later change counts.
            steps = math.floor(self.left / self._step + 1e-9)
            self._until -= steps
            self.left = max(0.0, self.left - steps * self._step)


def _left(tenant: Tenant) -> float:
    return tenant.left
