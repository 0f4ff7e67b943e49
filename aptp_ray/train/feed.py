"""A resumable, deterministic stream of global batches over the Dataset that the job hands in.

The stream is the concatenation of epochs, so no tail row is ever dropped; within an epoch, windows of rows are permuted by a
generator keyed by (seed, epoch, window). Which rows make global batch n is therefore a function of the Dataset, the seed and
n alone: not of the number of workers, and not of where a run was resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from aptp_ray.core.randomness import key_seed

Rows = dict[str, np.ndarray]

# What one worker keeps of its Dataset. A Dataset that fits is read once, before the first step: Ray Data's executor takes a
# good part of a core for as long as it streams, which a small machine's training would have to share with it.
_CACHE_BYTES = 2 << 30


class Feed:
    """Iterates over this rank's share of each global batch.

    Args:
        iterator: a ``ray.data.DataIterator`` over the whole, order-preserving Dataset (every rank sees all of it; see
            ``launch.py``); any object with ``iter_batches(batch_size=, batch_format=, prefetch_batches=)`` will do.
        total_rows: rows of one epoch; lets a resumed run skip whole epochs unread.
        global_batch_size: rows of a global batch; the world size must divide it.
        window: rows permuted together.
        decode: turns raw columns into arrays; called on this rank's rows only.
        cache_bytes: a Dataset of at most this size is kept in memory; a larger one streams anew in each epoch.
    """

    def __init__(
        self,
        iterator: Any,
        *,
        total_rows: int,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        window: int,
        decode: Callable[[Rows], Rows],
        cache_bytes: int = _CACHE_BYTES,
    ) -> None:
        if total_rows < 1:
            raise ValueError("the training data has no rows: was every row rejected? see encoded/rejected.parquet")
        if global_batch_size % world_size:
            raise ValueError(
                f"global_batch_size={global_batch_size} is not a multiple of the {world_size} workers: change "
                "loop.global_batch_size or compute.workers"
            )
        self._iterator, self._total, self._global = iterator, total_rows, global_batch_size
        self._seed, self._window, self._decode = seed, window, decode
        self._cache_bytes, self._windows = cache_bytes, list[Rows]()
        local = global_batch_size // world_size
        self._mine = slice(rank * local, (rank + 1) * local)

    def batches(self, start_step: int = 0) -> Iterator[Rows]:
        """Yields this rank's rows of global batches ``start_step``, ``start_step + 1``, ... without end."""
        skip = start_step * self._global
        epoch, skip = divmod(skip, self._total)
        pending: list[Rows] = []
        count = 0
        while True:
            for rows in self._epoch(epoch):
                size = _length(rows)
                if skip >= size:
                    skip -= size
                    continue
                if skip:
                    rows, size, skip = {k: v[skip:] for k, v in rows.items()}, size - skip, 0
                pending.append(rows)
                count += size
                if count < self._global:
                    continue
                joined = _join(pending)
                whole = count - count % self._global
                for begin in range(0, whole, self._global):
                    share = slice(begin + self._mine.start, begin + self._mine.stop)
                    yield self._decode({k: v[share] for k, v in joined.items()})
                pending = [{k: v[whole:] for k, v in joined.items()}] if count > whole else []
                count -= whole
            epoch += 1

    def _epoch(self, epoch: int) -> Iterator[Rows]:
        seen = 0
        for number, rows in enumerate(self._stream()):
            size = _length(rows)
            seen += size
            order = np.random.default_rng(key_seed(self._seed, "shuffle", epoch, number)).permutation(size)
            yield {k: v[order] for k, v in rows.items()}
        if seen != self._total:
            raise RuntimeError(
                f"an epoch gave {seen} rows, the manifest promised {self._total}: was the encoded data changed under the run?"
            )

    def _stream(self) -> Iterator[Rows]:
        """Yields the windows of an epoch, in the Dataset's order."""
        if not self._windows and self._cache_bytes:
            size = 0
            for rows in self._read():
                self._windows.append(rows)
                size += sum(_num_bytes(column) for column in rows.values())
                if size > self._cache_bytes:
                    self._windows, self._cache_bytes = [], 0
                    break
        yield from self._windows or self._read()

    def _read(self) -> Iterator[Rows]:
        # A new iterator every time: Ray Data executes the Dataset anew with each call.
        return iter(self._iterator.iter_batches(batch_size=self._window, batch_format="numpy", prefetch_batches=1))


def _length(rows: Rows) -> int:
    return len(next(iter(rows.values())))


def _join(parts: list[Rows]) -> Rows:
    if len(parts) == 1:
        return parts[0]
    return {k: np.concatenate([part[k] for part in parts]) for k in parts[0]}


def _num_bytes(column: np.ndarray) -> int:
    if column.dtype != object:
        return int(column.nbytes)
    return sum(value.nbytes if isinstance(value, np.ndarray) else len(value) for value in column)
