"""A resumable, deterministic stream of global batches, read from a :class:`RowReader` by ranges of row numbers.

The rows are parted into *lanes*, contiguous ranges of equal length, and every global batch takes equally many rows of each
lane. A rank owns some of the lanes: it reads its own rows only, and what makes global batch n depends on the data, the seed
and n alone, not on how many workers there are nor on where a run was resumed. Within a lane, an epoch permutes the chunks
that storage reads at once (Parquet row groups), and then the rows of a *window* of some chunks: no order is drawn that
storage could not follow. All of it is arithmetic and keyed permutations, so a run resumes without reading what lies before.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from aptp_ray.config import ConfigError
from aptp_ray.core.randomness import key_seed

Rows = dict[str, np.ndarray]
Ranges = Sequence[tuple[int, int]]  # half-open, of row numbers


class RowReader(Protocol):
    """Encoded rows by number, however they are stored; picklable, so that the job opens it and workers read."""

    @property
    def num_rows(self) -> int: ...

    @property
    def groups(self) -> Sequence[int]:
        """Lengths of the chunks that are read at once, in row order."""

    def stream(self, requests: Iterable[Ranges], *, share: int = 1) -> Generator[Rows, None, None]:
        """Yields the joined rows of each request in turn, reading a little ahead.

        Args:
            requests: row ranges; taken only as fast as rows are needed.
            share: how many processes stream at the same time.
        """


def first_rows(reader: RowReader, count: int) -> Rows:
    """Returns the first rows, all of them where there are fewer than ``count``."""
    with closing(reader.stream([[(0, min(count, reader.num_rows))]])) as stream:
        return next(stream)


class Feed:
    """Iterates over this rank's share of each global batch.

    Each epoch gives every row once, and ``padding`` rows a second time, by which lanes become equally long (the last lanes
    wrap round to the first rows). Epochs follow one another without a gap: a batch may hold the end of one and the
    beginning of the next, and no tail is dropped.

    Attributes:
        mine: which rows of each global batch are this rank's.
        padding: rows of an epoch that are seen once more; fewer than there are lanes.
        epoch_rows: rows of an epoch, padding included.
    """

    def __init__(
        self,
        reader: RowReader,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        window: int,
        lanes: int,
        decode: Callable[[Rows], dict[str, Any]],
    ) -> None:
        """Lays out the lanes; reads nothing.

        Args:
            reader: of the whole data.
            global_batch_size: rows of a global batch.
            rank: of this worker.
            world_size: number of workers, at most ``lanes``; where it does not divide them, some ranks own one lane more.
            seed: of the order.
            window: rows that are held and permuted together, over all lanes and ranks.
            lanes: parts of the data; must divide ``global_batch_size``.
            decode: turns raw columns into arrays; called on this rank's rows of a batch.

        Raises:
            ConfigError: if there are no rows.
            ValueError: if the sizes do not divide.
        """
        if world_size > lanes or global_batch_size % lanes:
            raise ValueError(
                f"each of {world_size} workers needs one of {lanes} lanes, and those must divide a global batch of "
                f"{global_batch_size}: see Loop.check_division"
            )
        if reader.num_rows < 1:
            raise ConfigError("the training data has no rows: was every row rejected? see encoded/rejected.parquet")
        self._reader, self._decode, self._share = reader, decode, world_size
        self._rows_per_lane = global_batch_size // lanes  # of a batch
        length = -(-reader.num_rows // lanes)
        self.epoch_rows = length * lanes
        self.padding = self.epoch_rows - reader.num_rows
        edges = np.concatenate([[0], np.cumsum(np.asarray(reader.groups, dtype=np.int64))])
        limit = max(1, window // lanes)
        mine = range(rank * lanes // world_size, (rank + 1) * lanes // world_size)
        self.mine = slice(mine.start * self._rows_per_lane, mine.stop * self._rows_per_lane)
        self._lanes = [
            _Lane(
                index=lane,
                length=length,
                chunks=_chunks(lane * length, length, edges, limit),
                limit=limit,
                first_limit=-(-limit * (lane + 1) // lanes),
                seed=seed,
            )
            for lane in mine
        ]

    def batches(self, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Yields this rank's rows of global batches ``start_step``, ``start_step + 1``, ... without end."""
        requests = (window.ranges for window in self._windows(start_step))
        with closing(self._reader.stream(requests, share=self._share)) as stream:
            # The same windows a second time: what was asked for, beside what came.
            coming = zip(self._windows(start_step), stream, strict=False)
            held = [_Held() for _ in self._lanes]
            while True:
                parts: list[Rows] = []
                for index in range(len(held)):
                    missing = self._rows_per_lane
                    while missing:
                        if not len(held[index].order):
                            held[index] = _Held()  # lets go of the old window before the new one comes
                            held[index] = _Held.of(coming)
                        taken = held[index].take(missing)
                        parts.append(taken)
                        missing -= _length(taken)
                yield self._decode({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})

    def _windows(self, start_step: int) -> Iterator[_Window]:
        """Yields the windows of this rank's lanes in the order in which batches use them up."""
        lanes = [lane.windows(start_step * self._rows_per_lane) for lane in self._lanes]
        left = [0] * len(lanes)
        while True:
            for index, lane in enumerate(lanes):
                missing = self._rows_per_lane
                while missing:
                    if not left[index]:
                        window = next(lane)
                        left[index] = window.size - window.skip
                        yield window
                    used = min(missing, left[index])
                    left[index] -= used
                    missing -= used


@dataclass(frozen=True)
class _Window:
    """Rows of one lane that are read and permuted together; ``skip`` of them were seen before a resume."""

    ranges: tuple[tuple[int, int], ...]
    size: int
    key: tuple[object, ...]
    skip: int

    def order(self) -> np.ndarray:
        return np.random.default_rng(key_seed(*self.key)).permutation(self.size)[self.skip :]


@dataclass(frozen=True)
class _Lane:
    """One lane of the data.

    Attributes:
        index, length: of the lane.
        chunks: int64 [n, 2], row ranges that are read at once, none longer than ``limit``.
        limit: rows of a window.
        first_limit: rows of an epoch's first window. It differs from lane to lane: lanes whose windows are equally long
            would otherwise all need their next one at the same step.
        seed: of the order.
    """

    index: int
    length: int
    chunks: np.ndarray
    limit: int
    first_limit: int
    seed: int

    def windows(self, start: int) -> Iterator[_Window]:
        """Yields windows from the ``start``-th row of the lane's endless order on."""
        first, before = divmod(start, self.length)
        for epoch in itertools.count(first):
            for number, ranges in enumerate(self._epoch(epoch)):
                size = sum(end - begin for begin, end in ranges)
                if before >= size:
                    before -= size
                    continue
                yield _Window(tuple(ranges), size, (self.seed, "rows", epoch, self.index, number), before)
                before = 0

    def _epoch(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """Yields the row ranges of an epoch's windows: permuted chunks, as many as fit into a window."""
        order = np.random.default_rng(key_seed(self.seed, "chunks", epoch, self.index)).permutation(len(self.chunks))
        limit, size = self.first_limit, 0
        ranges: list[tuple[int, int]] = []
        for begin, end in self.chunks[order].tolist():
            while size + end - begin > limit:
                if not ranges:  # only in the first window: it ends within a chunk
                    ranges = [(begin, begin + limit)]
                    begin += limit
                yield ranges
                limit, size, ranges = self.limit, 0, []
            ranges.append((begin, end))
            size += end - begin
        yield ranges


class _Held:
    """What is left of a window that has been read."""

    def __init__(self, rows: Rows | None = None, order: np.ndarray | None = None) -> None:
        self._rows = rows or {}
        self.order = order if order is not None else np.empty(0, dtype=np.int64)

    @classmethod
    def of(cls, coming: Iterator[tuple[_Window, Rows]]) -> _Held:
        found = next(coming, None)
        if found is None:
            raise RuntimeError("the reader's stream ended before its requests did")
        window, rows = found
        if _length(rows) != window.size:
            raise RuntimeError(f"the reader gave {_length(rows)} rows for the ranges {window.ranges}")
        return cls(rows, window.order())

    def take(self, count: int) -> Rows:
        taken, self.order = self.order[:count], self.order[count:]
        return {name: column[taken] for name, column in self._rows.items()}


def _chunks(start: int, length: int, edges: np.ndarray, limit: int) -> np.ndarray:
    """Cuts a lane at the edges of the reader's groups, where it wraps round, and into parts of at most ``limit`` rows.

    Returns:
        int64 [n, 2], half-open ranges of row numbers.
    """
    total = int(edges[-1])
    chunks: list[tuple[int, int]] = []
    position, stop = start, start + length
    while position < stop:
        begin = position % total
        end = min(begin + stop - position, total)
        inner = edges[np.searchsorted(edges, begin, "right") : np.searchsorted(edges, end, "left")].tolist()
        for low, high in itertools.pairwise([begin, *inner, end]):
            parts = -(-(high - low) // limit)
            cuts = [low + (high - low) * part // parts for part in range(parts + 1)]
            chunks += itertools.pairwise(cuts)
        position += end - begin
    return np.array(chunks, dtype=np.int64)


def _length(rows: Rows) -> int:
    return len(next(iter(rows.values())))
