"""Several training runs at once, each started by a Ray task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray

T = TypeVar("T")


def side_by_side(call: Callable[..., Any], items: Iterable[tuple[T, dict[str, Any]]], at_once: int) -> Iterator[tuple[T, Any]]:
    """Calls a function that starts runs once for each item, in their order, some at once.

    In tasks, because ``TorchTrainer.fit()`` needs the main thread of its process.

    Args:
        call: with keyword arguments.
        items: what each call is for, and its arguments.
        at_once: how many calls are under way at most.

    Yields:
        each item and the reference to its task, which has ended: ``ray.get`` gives its result, or raises what ended it.
    """
    start = ray.remote(num_cpus=0, max_retries=0)(call)
    waiting, running = list(items), dict[Any, T]()
    while waiting or running:
        while waiting and len(running) < at_once:
            item, arguments = waiting.pop(0)
            running[start.remote(**arguments)] = item
        (done,), _ = ray.wait(list(running))
        yield running.pop(done), done
