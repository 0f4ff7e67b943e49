"""Calls that take turns with the steps of a training loop, in its own process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aptp_ray.config import Loop
from aptp_ray.train.loop import Parts
from aptp_ray.train.worker import Worker


@contextmanager
def between_steps(callback: Callable[[float], None]) -> Iterator[None]:
    """Has the loop of this process call back before each step but the first, with the seconds since the step before began.

    What the callback itself takes is in nobody's seconds.
    """
    train = Worker.train

    def with_callback(worker: Worker, parts: Parts, loop: Loop) -> None:
        inputs, begun = parts.inputs, 0.0

        def then(rows: dict[str, Any], step: int, mine: slice) -> dict[str, Any]:
            nonlocal begun
            if begun and step >= 0:  # validation counts downwards
                callback(time.monotonic() - begun)
            begun = time.monotonic()
            return inputs(rows, step, mine)

        parts.inputs = then
        train(worker, parts, loop)

    Worker.train = with_callback  # type: ignore[method-assign]
    try:
        yield
    finally:
        Worker.train = train  # type: ignore[method-assign]


def in_turns(
    stage: Callable[[dict[str, Any]], None], settings: dict[str, Any], begin: int, bare: dict[str, Callable[[], Any]]
) -> None:
    """Runs a stage's worker, and from step ``begin`` on bare calls between its steps; writes the mean seconds of each."""
    worker = Worker.start(settings)
    taken: dict[str, list[float]] = {name: [] for name in ("step", *bare)}

    def callback(seconds: float) -> None:
        taken["step"].append(seconds)
        if len(taken["step"]) < begin:
            return
        for name, call in bare.items():
            begun = time.monotonic()
            call()
            taken[name].append(time.monotonic() - begun)

    with between_steps(callback):
        stage(settings)
    steps, rounds = taken.pop("step"), len(next(iter(taken.values()))) - 1  # a bare call's first warms it up
    # Means: what comes once in a while, as the log, is a part of the step.
    means = {name: statistics.fmean(values[1:]) for name, values in taken.items()} | {"step": statistics.fmean(steps[-rounds:])}
    worker.run.write_json(means, "train", worker.name, "seconds.json")
