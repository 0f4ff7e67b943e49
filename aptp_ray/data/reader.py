"""Encoded rows by number, read in the training process itself: Parquet row groups, some columns, a little ahead.

No Ray Data here: an executor beside each Train worker costs a small machine a good part of a core, and the order of rows has
to be the trainer's. Threads read with pyarrow, which lets go of the interpreter while it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.data.encoded import INDEX_FILE, arrow_filesystem, read_index

Ranges = Sequence[tuple[int, int]]  # half-open, of row numbers
Columns = dict[str, np.ndarray]

_THREADS = 2
_AHEAD = 4  # requests that are read before they are asked for
_FOOTERS_AT_ONCE = 16

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")


class EncodedReader:
    """Encoded (or assigned) rows of a run directory; picklable, and says nothing of storage options in its ``repr``.

    Attributes:
        num_rows: of all files.
        groups: lengths of the files' row groups, in row order.
        columns: which are read.
    """

    def __init__(self, run: RunDir, parts: Sequence[str], files: Sequence[tuple[str, Sequence[int]]], columns: Sequence[str]):
        """See :meth:`open`.

        Args:
            run: the run directory.
            parts: folder of the files.
            files: name and lengths of the row groups of each file, in row order.
            columns: which to read.
        """
        self._run, self._parts, self.columns = run, tuple(parts), tuple(columns)
        self._names = [name for name, _ in files]
        self.groups = [length for _, lengths in files for length in lengths]
        self._first_group = np.concatenate([[0], np.cumsum([len(lengths) for _, lengths in files])])  # of each file
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(self.groups, dtype=np.int64))])  # of each group
        self.num_rows = int(self._starts[-1])

    @classmethod
    def open(cls, run: RunDir, *parts: str, columns: Sequence[str]) -> EncodedReader:
        """Reads ``index.json`` and the footers of the files that it names.

        Args:
            run: the run directory.
            parts: e.g. ``"encoded", "train"`` or ``"assigned", "expert=0"``.
            columns: which columns to read; no other is fetched.

        Raises:
            RunDirError: if the split was not written to its end, files do not hold what the index says, or lack a column.
        """
        file_system = arrow_filesystem(run)

        def lengths(entry: tuple[str, int]) -> tuple[str, list[int]]:
            name, rows = entry
            try:
                footer = pq.read_metadata(run.path(*parts, name), filesystem=file_system)
            except FileNotFoundError as error:
                raise RunDirError(f"{run.address(*parts, name)} is gone: make the stage again with --overwrite") from error
            missing = [column for column in columns if column not in footer.schema.to_arrow_schema().names]
            if missing:
                raise RunDirError(f"{run.address(*parts, name)} has no column {missing[0]}: was it made with another config?")
            groups = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
            if sum(groups) != rows:
                raise RunDirError(f"{run.address(*parts, name)} holds {sum(groups)} rows, {INDEX_FILE} says {rows}")
            return name, [length for length in groups if length]

        with ThreadPoolExecutor(_FOOTERS_AT_ONCE) as pool:  # a request or two each on an object store
            files = list(pool.map(lengths, read_index(run, *parts)))
        return cls(run, parts, files, columns)

    def __repr__(self) -> str:
        return f"EncodedReader({self._run.address(*self._parts)!r}, {self.num_rows} rows of {', '.join(self.columns)})"

    def stream(self, requests: Iterable[Ranges], *, share: int = 1) -> Generator[Columns, None, None]:
        """Yields the joined rows of each request in turn.

        Bytes of equal lengths come as uint8 [n, bytes], lists of equal lengths as [n, length], texts and the like as objects.

        Args:
            requests: row ranges; a few are taken ahead.
            share: how many processes stream at the same time; readers of files do not care.

        Raises:
            RunDirError: if the files have changed since :meth:`open`.
        """
        yield from ahead(self._read, requests, threads=_THREADS, most=_AHEAD)

    def _read(self, ranges: Ranges) -> Columns:
        parts: dict[int, Columns] = {}
        pieces = list(self._pieces(ranges))
        file_system = arrow_filesystem(self._run)
        # In the order in which they lie, so that a group, and a file, is opened once even where ranges come back to it.
        by_file: dict[int, list[tuple[int, int, int, int]]] = {}
        for place, (group, begin, end) in enumerate(pieces):
            file = int(np.searchsorted(self._first_group, group, "right")) - 1
            by_file.setdefault(file, []).append((group, begin, end, place))
        for file, wanted in by_file.items():
            path = self._run.path(*self._parts, self._names[file])
            with pq.ParquetFile(path, filesystem=file_system, pre_buffer=not self._run.is_local) as source:
                for group in sorted({group for group, *_ in wanted}):
                    local = group - int(self._first_group[file])
                    table = source.read_row_group(local, columns=list(self.columns), use_threads=False)
                    if table.num_rows != self.groups[group]:
                        raise RunDirError(f"{path} was changed while it was being read: start the stage again")
                    for other, begin, end, place in wanted:
                        if other == group:
                            part = to_numpy(table.slice(begin, end - begin), path)
                            # A view of a few rows would keep all of the group in memory.
                            parts[place] = part if len(table) == end - begin else {k: v.copy() for k, v in part.items()}
        return join([parts[place] for place in range(len(pieces))])

    def _pieces(self, ranges: Ranges) -> Iterator[tuple[int, int, int]]:
        """Cuts ranges at the edges of row groups: (group, first row in it, end in it)."""
        for begin, end in ranges:
            group = int(np.searchsorted(self._starts, begin, "right")) - 1
            while begin < end:
                start, stop = int(self._starts[group]), int(self._starts[group + 1])
                yield group, begin - start, min(end, stop) - start
                begin, group = stop, group + 1


def ahead(make: Callable[[_Item], _Made], items: Iterable[_Item], *, threads: int, most: int) -> Generator[_Made, None, None]:
    """Yields ``make(item)`` of each item in order, with at most ``most`` of them made before they are asked for.

    Items are taken in the caller's thread. What was begun when the caller stops is awaited, nothing more is begun.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="reader")
    begun: deque[Future[_Made]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(make, item))
            if len(begun) > most:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def join(parts: Sequence[Columns]) -> Columns:
    """Joins rows that were read in parts."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def to_numpy(table: pa.Table, origin: str) -> Columns:
    """Columns of a table as arrays, tensors without a copy (see :meth:`EncodedReader.stream`).

    Raises:
        RunDirError: if bytes or lists of a column differ in length, or are missing.
    """
    columns: Columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        chunks = column.chunks
        arrays = [_array(chunk, name, origin) for chunk in chunks if len(chunk)]
        columns[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return columns


def _array(chunk: pa.Array, name: str, origin: str) -> np.ndarray:
    kind = chunk.type
    if pa.types.is_binary(kind) or pa.types.is_list(kind) and pa.types.is_primitive(kind.value_type):
        if chunk.null_count:
            raise RunDirError(f"{origin}: column {name} has rows without a value: make the stage again with --overwrite")
        offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        sizes = np.diff(offsets)
        if (sizes != sizes[0]).any():
            raise RunDirError(f"{origin}: values of column {name} differ in length ({sizes.min()} to {sizes.max()})")
        if pa.types.is_binary(kind):
            flat: Any = np.frombuffer(chunk.buffers()[2] or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
        else:
            flat = chunk.flatten().to_numpy()
        return flat.reshape(len(chunk), int(sizes[0]))
    if pa.types.is_primitive(kind) and not chunk.null_count:
        return chunk.to_numpy(zero_copy_only=False)
    values = np.empty(len(chunk), dtype=object)
    values[:] = chunk.to_pylist()
    return values
