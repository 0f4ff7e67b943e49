"""Turns on the cores of one machine: no more experts denoise at the same time than there are cores for them.

The replicas of several experts on one CPU would otherwise be switched every few milliseconds, and each time find the caches
full of another expert's activations and weights (a tenth of the time, measured on two cores). A turn is one step, so every
expert goes on all the same.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

logger = logging.getLogger("ray.serve")

# Beside a step of 20 ms or more.
_LOOK_S = 0.0005
# A seat whose process is stopped, or at a step that takes this long, holds nobody up for longer.
_PATIENCE_S = 2.0


class Turns:
    """Seats for the processes of this machine: a context manager that waits for a seat, though not forever.

    Locks on files: a process that is killed leaves its seat.
    """

    def __init__(self, folder: Path, seats: int, patience_s: float = _PATIENCE_S) -> None:
        """Opens the seats.

        Args:
            folder: made if it is not there; all who take turns name the same.
            seats: likewise.
            patience_s: after which one goes on without a seat.

        Raises:
            OSError: if the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # Who holds it is next: so whoever has just had a turn does not get the seat that it leaves.
        self._next = (folder / "next").open("a")
        self._seats = [(folder / f"seat-{number}").open("a") for number in range(seats)]
        self._patience_s = patience_s
        self._mine: IO[str] | None = None

    def __enter__(self) -> None:
        deadline = time.monotonic() + self._patience_s
        if not self._lock_one([self._next], deadline):
            return
        try:
            self._mine = self._lock_one(self._seats, deadline)
        finally:
            fcntl.flock(self._next, fcntl.LOCK_UN)

    def __exit__(self, *_: object) -> None:
        if self._mine is not None:
            fcntl.flock(self._mine, fcntl.LOCK_UN)
            self._mine = None

    @staticmethod
    def _lock_one(files: Sequence[IO[str]], deadline: float) -> IO[str] | None:
        while True:
            for file in files:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return file
                except BlockingIOError:
                    continue
            if time.monotonic() > deadline:
                return None
            time.sleep(_LOOK_S)


def turns_on_this_machine(threads: int) -> Turns | None:
    """Returns the turns of everybody's experts here, or None where there is no place for locks.

    Args:
        threads: that each expert computes with.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    folder = Path(tempfile.gettempdir()) / f"aptp_ray-turns-{os.getuid()}-{threads}"
    try:
        return Turns(folder, max(1, cores // threads))
    except OSError as error:
        logger.warning("experts do not take turns on the cores: %s", error)
        return None
