"""What happens to an image before its first step and after its last, done beside the denoising of the others.

A thread prepares and decodes while another denoises: torch lets go of Python's lock inside its operators, and on a GPU the
thread has a CUDA stream of its own. Without a thread the same work is done in place, whenever it is asked for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aptp_ray.core.image_request import Handle


@dataclass(frozen=True)
class Undecoded:
    """Latents on their way to pixels: an image at its end, or (with a number) its preview.

    Attributes:
        handle: whose they are.
        latents: [channels, height, width] float32.
        number: of the preview.
        ready: on a GPU, the event after which the latents are there.
    """

    handle: Handle
    latents: Tensor
    number: int | None = None
    ready: Any = None


@dataclass(frozen=True)
class Finished:
    """Something that was prepared (``of`` is a handle) or decoded, or the error instead."""

    of: Handle | Undecoded
    result: Any = None
    error: Exception | None = None


class Side:
    """Takes handles to prepare and latents to decode, and gives back what became of them, in order.

    Preparing goes first: an image that waits for its text leaves a place in the batch empty. All methods belong to the
    denoising thread.

    Attributes:
        pending: pieces of work that have been put in and not yet taken out.
        in_place: whether there is no thread.
    """

    def __init__(
        self,
        prepare: Callable[[list[Handle]], list[Any]],
        decode: Callable[[list[Undecoded]], list[Any]],
        *,
        device: torch.device,
        threads: int | None = None,
        chunk: Callable[[Undecoded], int] = lambda item: 1,
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the thread, if there is to be one.

        Args:
            prepare: one result a handle.
            decode: one result an item; all items of a call have one shape.
            device: where both run.
            threads: torch's thread count in the thread; None: no thread.
            chunk: how many items like this one are decoded at once; bounds memory, and how long a preparation waits.
            on_progress: called, from the thread, whenever something is there to be taken out.
        """
        self._prepare, self._decode, self._chunk, self._on_progress = prepare, decode, chunk, on_progress
        self._device, self._threads = device, threads
        self._handles: deque[Handle] = deque()
        self._undecoded: deque[Undecoded] = deque()
        self._finished: deque[Finished] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._stream: Any = None
        self.pending = 0
        self.in_place = threads is None
        self._thread: threading.Thread | None = None
        if threads is not None:
            self._thread = threading.Thread(target=self._run, name="beside-denoising", daemon=True)
            self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether what is put in will be done."""
        return not self._closed and (self._thread is None or self._thread.is_alive())

    def prepare(self, handles: list[Handle]) -> None:
        """Puts images in whose text is to be encoded."""
        self._put(self._handles, handles)

    def decode(self, items: list[Undecoded]) -> None:
        """Puts latents in."""
        self._put(self._undecoded, items)

    def take(self, *, wait: bool = False) -> list[Finished]:
        """Takes out what is finished.

        Args:
            wait: until there is something, if anything is pending.

        Raises:
            RuntimeError: if the thread has ended, and nothing will ever come.
        """
        if self._thread is None:
            while self._one():
                pass
        with self._changed:
            while wait and self.pending and not self._finished:
                if not self._changed.wait(timeout=1.0) and not self.alive:
                    raise RuntimeError("the thread that encodes and decodes has ended; see the log for its error")
            finished = list(self._finished)
            self._finished.clear()
        self.pending -= len(finished)
        return finished

    def close(self) -> None:
        """Ends the thread after the piece of work that it is at."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    # -- its parts -------------------------------------------------------------------------------------------------------

    def _put(self, queue: deque[Any], items: list[Any]) -> None:
        if not items:
            return
        self.pending += len(items)
        with self._changed:
            queue.extend(items)
            self._changed.notify_all()

    def _run(self) -> None:
        torch.set_num_threads(self._threads or 1)  # OpenMP's thread count belongs to the calling thread
        context: AbstractContextManager[Any] = nullcontext()
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            context = torch.cuda.stream(self._stream)  # sets the thread's current device, too
        with context:
            while True:
                with self._changed:
                    while not (self._closed or self._handles or self._undecoded):
                        self._changed.wait()
                    if self._closed:
                        return
                self._one()
                self._on_progress()

    def _one(self) -> bool:
        """Does one piece of work; tells whether there was any."""
        with self._changed:
            handles = list(self._handles)
            self._handles.clear()
            items = [] if handles else self._next_items()
        if handles:
            finished = _apart_on_error(self._prepare, handles)
        elif items:
            for item in items:
                if item.ready is not None and self._stream is not None:
                    self._stream.wait_event(item.ready)
                    item.latents.record_stream(self._stream)
            finished = _apart_on_error(self._decode, items)
        else:
            return False
        if self._stream is not None:
            self._stream.synchronize()  # waits without Python's lock; what is handed over is really there
        with self._changed:
            self._finished.extend(finished)
            self._changed.notify_all()
        return True

    def _next_items(self) -> list[Undecoded]:
        items: list[Undecoded] = []
        queue = self._undecoded
        while queue and (not items or queue[0].latents.shape == items[0].latents.shape):
            if items and len(items) >= self._chunk(items[0]):
                break
            items.append(queue.popleft())
        return items


@torch.inference_mode()
def _apart_on_error(work: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Finished]:
    """Runs ``work`` on all items at once; if that raises, on each apart, so that only the culprit fails."""
    try:
        return [Finished(item, result) for item, result in zip(items, work(items), strict=True)]
    except Exception as error:
        if len(items) == 1:
            return [Finished(items[0], error=error)]
    return [finished for item in items for finished in _apart_on_error(work, [item])]
