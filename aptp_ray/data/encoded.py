"""Encoded rows on disk: where they lie, what they are made of, how a stage reads them or replaces them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.fs as pafs
import ray
from ray.data import Dataset
from ray.data.datasource.partitioning import Partitioning, PartitionStyle

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.data.schema import (
    ALTERNATES,
    CAPTION,
    EMBEDDING,
    EXPERT,
    GROUP,
    KEY,
    LATENT_MEAN,
    LATENT_STD,
    METADATA,
    SHARD,
    TENSORS,
    TEXT_LENGTH,
    TEXT_STATES,
)
from aptp_ray.data.sources import ordered
from aptp_ray.encoding import Encoding

ENCODING_FILE = "encoding.json"
REJECTED_FILE = "rejected.parquet"

# The types of schema.ENCODED in its order. Tensors are bytes (encoding.pack), z is a list of floats.
ENCODED_SCHEMA = pa.schema(
    [
        (KEY, pa.string()),
        (SHARD, pa.string()),
        (CAPTION, pa.string()),
        (ALTERNATES, pa.list_(pa.string())),
        (GROUP, pa.string()),
        (METADATA, pa.string()),
        (LATENT_MEAN, pa.binary()),
        (LATENT_STD, pa.binary()),
        (TEXT_STATES, pa.binary()),
        (TEXT_LENGTH, pa.int32()),
        (EMBEDDING, pa.list_(pa.float32())),
    ]
)

# Half-float noise does not compress; text does.
PARQUET_OPTIONS: dict[str, Any] = {
    "compression": {name: "NONE" if name in TENSORS else "ZSTD" for name in ENCODED_SCHEMA.names},
    "use_dictionary": [SHARD, GROUP],
    # Ray Data and pyarrow read by row group: this bounds what a reader of one batch holds.
    "row_group_size": 512,
    "write_statistics": False,
}


def files_of(run: RunDir, *parts: str) -> list[str]:
    """Lists the Parquet files of a folder of the run directory (its ``expert=<k>`` folders included), in row order.

    Raises:
        RunDirError: if there are none.
    """
    folder = run.path(*parts)
    patterns = (f"{folder}/part-*.parquet", f"{folder}/{EXPERT}=*/part-*.parquet")
    files = sorted(str(path) for pattern in patterns for path in run.fs.glob(pattern))
    if not files:
        raise RunDirError(f"{run.address(*parts)} holds no rows: has the stage that writes it run?")
    return files


def read_encoded(run: RunDir, *parts: str, columns: Sequence[str] | None = None) -> Dataset:
    """Reads encoded (or assigned) rows as a lazy Dataset in a fixed row order.

    Args:
        run: the run directory.
        parts: e.g. ``"encoded", "train"``, or ``"assigned", "expert=0"``, or ``"assigned"`` for all experts' rows.
        columns: which columns; None: all, and EXPERT where rows are assigned.

    Raises:
        RunDirError: if there are no rows.
    """
    # EXPERT stands in the folder's name alone; a run directory's own path is never taken for a partition.
    assigned = parts[0] == "assigned"
    partitioning = (
        Partitioning(PartitionStyle.HIVE, base_dir=run.path(parts[0]), field_types={EXPERT: int}) if assigned else None
    )
    rows = ray.data.read_parquet(
        files_of(run, *parts), filesystem=arrow_filesystem(run), partitioning=partitioning, shuffle=None
    )
    return ordered(rows if columns is None else rows.select_columns(list(columns)))


def read_table(run: RunDir, *parts: str, columns: Sequence[str]) -> pa.Table:
    """Reads some columns of a split whole into this process, in row order.

    Raises:
        RunDirError: if there are no rows.
    """
    files = pds.dataset(files_of(run, *parts), filesystem=arrow_filesystem(run), format="parquet")
    return files.to_table(columns=list(columns))


def read_first(run: RunDir, *parts: str, columns: Sequence[str], rows: int) -> dict[str, np.ndarray]:
    """Reads some columns of a split's first rows into this process, in row order, without touching the files behind them.

    Args:
        run: the run directory.
        parts: as in :func:`read_encoded`.
        columns: which columns.
        rows: how many rows; fewer come back where there are fewer.

    Returns:
        columns as Ray Data's numpy batches give them: raw bytes, or arrays.

    Raises:
        RunDirError: if there are no rows.
    """
    files = pds.dataset(files_of(run, *parts), filesystem=arrow_filesystem(run), format="parquet")
    table = files.head(rows, columns=list(columns), batch_readahead=1, fragment_readahead=1)
    return {name: _object_array(table.column(name).to_pylist()) for name in columns}


def _object_array(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def read_encoding(run: RunDir, *parts: str) -> Encoding:
    """Returns what the rows of ``parts`` (e.g. ``"encoded", "train"``) are made of.

    Raises:
        RunDirError: if that split has not been encoded to its end.
    """
    value = run.read_json(*parts[:-1], ENCODING_FILE)
    if parts[-1] not in value["splits"]:
        raise RunDirError(f"{run.address(*parts)} is not encoded to its end: run jobs/encode.py")
    return Encoding.from_json(value)


def count_rows(run: RunDir, *parts: str) -> int:
    """Counts rows from the files' footers, reading no rows.

    Raises:
        RunDirError: if there are none.
    """
    return int(pds.dataset(files_of(run, *parts), filesystem=arrow_filesystem(run), format="parquet").count_rows())


def arrow_filesystem(run: RunDir) -> pafs.FileSystem:
    """Returns the run directory's file system as pyarrow and Ray Data take it."""
    return pafs.LocalFileSystem() if run.is_local else pafs.PyFileSystem(pafs.FSSpecHandler(run.fs))


@contextmanager
def replacing(run: RunDir, *parts: str) -> Iterator[str]:
    """Yields the address of an empty folder, writable by every process of the cluster, that becomes ``parts``.

    On a disk it becomes so by a rename, when the block ends without an error. On an object store a rename is a copy of
    all bytes, so writers write in place; readers trust a folder only once ``encoding.json`` or the manifest names it,
    and both are written after this. Where the block fails, what was written is removed.
    """
    if run.is_local:
        with run.writing(*parts) as folder:
            yield str(folder)
        return
    run.remove(*parts)
    try:
        yield run.address(*parts)
    except BaseException:
        run.remove(*parts)
        raise
