"""Parquet files with images in them, read by row groups where they lie: nothing is downloaded as a whole, or cached."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow.parquet as pq

from aptp_ray.config import ConfigError
from aptp_ray.data.access import Unreachable, patiently
from aptp_ray.data.layout import ROWS_PER_UNIT, Unit, one_line
from aptp_ray.data.patterns import Found
from aptp_ray.storage import file_system

_BATCH_ROWS = 32


@contextmanager
def _opened(address: str, storage_options: dict[str, Any]) -> Iterator[pq.ParquetFile]:
    fs, path = file_system(address, storage_options)
    with fs.open(path, "rb") as stream, pq.ParquetFile(stream) as file:
        yield file


def parquet_columns(address: str, storage_options: dict[str, Any]) -> list[str]:
    """Returns the names of a file's columns."""
    with _opened(address, storage_options) as file:
        return list(file.schema_arrow.names)


def parquet_units(files: Sequence[Found], storage_options: dict[str, Any], part: Callable[[int], tuple[int, int]]) -> list[Unit]:
    """Parts files into runs of row groups with at least ``ROWS_PER_UNIT`` rows.

    Args:
        files: in order.
        storage_options: for fsspec.
        part: says of the number of all rows which of them are wanted: the first, and the end.

    Raises:
        ConfigError: if a file cannot be read.
    """

    def group_rows(file: Found) -> list[int]:
        def attempt() -> list[int]:
            with _opened(file.address, storage_options) as opened:
                meta = opened.metadata
                return [meta.row_group(index).num_rows for index in range(meta.num_row_groups)]

        try:
            return patiently(attempt)
        except (Unreachable, OSError) as error:
            raise ConfigError(f"cannot read {file.address!r} as Parquet: {one_line(error)}") from error

    with ThreadPoolExecutor(16) as pool:
        lengths = list(pool.map(group_rows, files))
    first, last = part(sum(map(sum, lengths)))
    units: list[Unit] = []
    offset = 0  # of the file among all rows
    for file, groups in zip(files, lengths, strict=True):
        start = 0
        for stop in _bounds(groups):
            low, high = max(start, first - offset), min(stop, last - offset)
            if low < high:
                name = f"{file.address}[{low}:{high}]"
                units.append(Unit(len(units), name, file.version or "", file.address, low, high, offset + low))
            start = stop
        offset += sum(groups)
    return units


def _bounds(groups: Sequence[int]) -> Iterator[int]:
    """Ends of runs of row groups; the group is the least that can be read, so it is never parted."""
    total = since = 0
    for index, rows in enumerate(groups):
        total, since = total + rows, since + rows
        if since >= ROWS_PER_UNIT or index == len(groups) - 1:
            yield total
            since = 0


def parquet_rows(
    unit: Unit, columns: Sequence[str], storage_options: dict[str, Any], wanted: Sequence[int] | None, skip: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (position, row) of a unit in order, without the first ``skip``; groups without a wanted row are not read."""
    rows = range(unit.start, unit.stop) if wanted is None else sorted(unit.start + position for position in wanted)
    rows = rows[skip:]
    with _opened(unit.address, storage_options) as file:
        meta, first = file.metadata, 0
        for group in range(meta.num_row_groups):
            end = first + meta.row_group(group).num_rows
            here = rows[bisect.bisect_left(rows, first) : bisect.bisect_left(rows, end)]
            start = first
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=list(columns)) if here else ():
                stop = start + batch.num_rows
                for row in here[bisect.bisect_left(here, start) : bisect.bisect_left(here, stop)]:
                    yield row - unit.start, batch.slice(row - start, 1).to_pylist()[0]
                start = stop
            first = end
