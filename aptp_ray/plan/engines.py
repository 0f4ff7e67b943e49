"""The engines of a simulated fleet: step-level batches on devices of their own, or on shared ones, advanced only when looked at.

An engine denoises all its images by one step at a time; arrivals join at the next step's beginning while there are places, as
``core/sampler.py`` does it. Between two changes of the batch all steps take the same time, so an engine jumps from change to
change: two or three events a request, however many steps it has.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
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

    The processes of one GPU take turns on it. On a CPU, lanes are cores: as many engines step at a time as there are cores (see
    ``serve/turns.py``), and a request's errands (HTTP, routing and its text before its steps, decoding and HTTP after them) run
    beside them on the same cores.
    """

    def __init__(self, lanes: int, errand_s: float = 0.0, turns: bool = False, refill_s: float = 0.0) -> None:
        """Args:
        lanes: engines that run at full speed side by side.
        errand_s: core seconds of a request outside of its steps, half of them before. Only what they take beyond that, because
            cores are taken, counts for its latency: the rest is overhead, which is known apart.
        turns: engines take turns of a step each, so that one with longer steps gets more of the device; else of equal times.
        refill_s: added to each step while engines alternate on the lanes, and find the caches full of one another's weights.
        """
        self.lanes = lanes
        self.at = 0.0
        self.working: list[Tenant] = []
        self.busy_s = 0.0
        self.errand_s = errand_s
        self._turns, self._refill_s = turns, refill_s
        # All are of one size and go at one speed, so the first ends first: what is left, what it ends with.
        self._errands: deque[tuple[float, Callable[[float], None]]] = deque()
        self._passed = 0.0  # of every errand under way, counted on: an errand ends when this comes to its mark

    def errand(self, then: Callable[[float], None]) -> None:
        """Begins half of a request's errands; ``then`` gets the time at which it is done."""
        self._errands.append((self._passed + self.errand_s / 2, then))

    def _speeds(self) -> tuple[list[float], float]:
        """Returns how fast each engine goes, and errands."""
        engines = len(self.working)
        stepping = min(self.lanes, engines)
        threads = stepping + len(self._errands)
        pace = min(1.0, self.lanes / max(1, threads))
        if engines <= self.lanes:
            return [pace] * engines, pace
        steps = [tenant.step + self._refill_s for tenant in self.working]
        parts = _rounds(steps, self.lanes) if self._turns else [stepping / engines] * engines
        return [pace * part * t.step / whole for part, t, whole in zip(parts, self.working, steps, strict=True)], pace

    def advance(self, now: float) -> None:
        working, errands = self.working, self._errands
        while working or errands:
            speeds, errand_speed = self._speeds()
            first, seconds = -1, (errands[0][0] - self._passed) / errand_speed if errands else math.inf
            for index, tenant in enumerate(working):
                if tenant.left / speeds[index] <= seconds:
                    first, seconds = index, tenant.left / speeds[index]
            if self.at + seconds > now:
                if now > self.at:
                    self._pass(now - self.at, speeds, errand_speed)
                break
            self._pass(seconds, speeds, errand_speed)
            self.at += seconds
            if first < 0:
                errands.popleft()[1](self.at)
            else:
                working[first].left = 0.0  # whatever rounding says
                if not working[first].change(self.at):
                    del working[first]
        if now < math.inf:
            self.at = max(self.at, now)

    def _pass(self, seconds: float, speeds: list[float], errand_speed: float) -> None:
        """Takes off what is done in some time."""
        seconds = max(0.0, seconds)
        self.busy_s += seconds
        self._passed += seconds * errand_speed
        for tenant, speed in zip(self.working, speeds, strict=True):
            tenant.left = max(0.0, tenant.left - seconds * speed)


def _rounds(steps: list[float], lanes: int) -> list[float]:
    """Returns which part of a lane each engine has: in a round each takes one step, and none is on two lanes at a time."""
    parts, left, total = [0.0] * len(steps), float(lanes), sum(steps)
    for index in sorted(range(len(steps)), key=lambda index: -steps[index]):
        parts[index] = min(1.0, left * steps[index] / total)
        left, total = left - parts[index], total - steps[index]
    return parts


class Tenant:
    """An engine on a shared device; its work is counted in seconds at full speed."""

    __slots__ = ("_batch", "_device", "_done", "_ledger", "_line", "_times", "_until", "batch_steps", "image_steps", "left",
                 "load", "step")  # fmt: skip

    def __init__(self, times: Times, ledger: Ledger, device: Shared) -> None:
        self._times, self._ledger, self._device = times, ledger, device
        self._batch: list[tuple[int, int]] = []
        self._line: deque[int] = deque()
        self._done = 0
        self._until = 0  # step count of its next change
        self.step = 0.0
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
        batch = self._batch
        steps = self._until - self._done
        self.batch_steps += steps
        self.image_steps += steps * len(batch)
        self._done = self._until
        while batch and batch[0][0] == self._done:
            self._finish(heappop(batch)[1], at)
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
            self.step = self._times[len(batch) - 1]
            self._until = batch[0][0]
            self.left = (self._until - self._done) * self.step

    def _finish(self, request: int, at: float) -> None:
        device, finished = self._device, self._ledger.finished
        if not device.errand_s:
            finished[request] = at
            return

        def sent(at: float) -> None:
            finished[request] = at - device.errand_s

        device.errand(sent)

    def arrive(self, request: int, now: float) -> None:
        self.load += 1
        if self._device.errand_s:
            self._device.errand(lambda at: self._enter(request, at))
        else:
            self._enter(request, now)

    def _enter(self, request: int, now: float) -> None:
        self._line.append(request)
        if not self._batch:
            self._fill(now)
            self._device.working.append(self)
        elif len(self._batch) < len(self._times) and len(self._line) == 1:
            # Joins when the step under way ends (at once, if it has only begun): no later change counts.
            steps = math.floor(self.left / self.step + 1e-9)
            self._until -= steps
            self.left = max(0.0, self.left - steps * self.step)
