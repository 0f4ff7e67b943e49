"""Encoded rows on disk: where they lie, what they are made of, and how a stage reads them.

A split's folder holds ``part-<unit>-<row>.parquet`` files, numbered in row order, and ``index.json``, which names those that
count: ``{"files": [[name, rows], ...], "content": hash}``. A file that the index does not name is a killed run's.
Columns, in this order: KEY, SHARD (the unit's name), POSITION, VIEW, CAPTION, ALTERNATES, GROUP, METADATA, LATENT_MEAN,
LATENT_STD, TEXT_STATES (or TEXT_TOKENS), TEXT_LENGTH, EMBEDDING. Light rows (online mode) lack LATENT_* and TEXT_*.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pds
import pyarrow.fs as pafs
import pyarrow.parquet as pq
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
    POSITION,
    SHARD,
    TEXT_LENGTH,
    TEXT_STATES,
    TEXT_TOKENS,
    VIEW,
)
from aptp_ray.data.sources import ordered
from aptp_ray.encoding import Encoding

ENCODING_FILE = "encoding.json"
INDEX_FILE = "index.json"
REJECTED_FILE = "rejected.parquet"

# Row groups are what training permutes and reads at once: small enough to be mixed, large enough to be read in one request.
ROWS_PER_GROUP = 128


def encoded_schema(text: str = "states", mode: str = "offline") -> pa.Schema:
    """Returns the columns of encoded rows: tensors are bytes (``encoding.pack``), z is a list of floats."""
    passed_on = [
        (KEY, pa.string()),
        (SHARD, pa.string()),
        (POSITION, pa.int64()),
        (VIEW, pa.int32()),
        (CAPTION, pa.string()),
        (ALTERNATES, pa.list_(pa.string())),
        (GROUP, pa.string()),
        (METADATA, pa.string()),
    ]
    tensors = [
        (LATENT_MEAN, pa.binary()),
        (LATENT_STD, pa.binary()),
        (TEXT_STATES if text == "states" else TEXT_TOKENS, pa.binary()),
        (TEXT_LENGTH, pa.int32()),
    ]
    return pa.schema([*passed_on, *(tensors if mode == "offline" else []), (EMBEDDING, pa.list_(pa.float32()))])


ENCODED_SCHEMA = encoded_schema()
LIGHT_SCHEMA = encoded_schema(mode="online")


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Returns how rows of a schema are written."""
    noise = {LATENT_MEAN, LATENT_STD, TEXT_STATES}  # half floats do not compress; text and ids do
    return {
        "compression": {name: "NONE" if name in noise else "ZSTD" for name in schema.names},
        "use_dictionary": [SHARD, GROUP],
        "row_group_size": ROWS_PER_GROUP,
        "write_statistics": False,
    }


def parquet_bytes(rows: pa.Table) -> bytes:
    """Returns a Parquet file; the same rows give the same bytes."""
    buffer = pa.BufferOutputStream()
    pq.write_table(rows, buffer, **parquet_options(rows.schema))
    return buffer.getvalue().to_pybytes()


def read_index(run: RunDir, *parts: str) -> list[tuple[str, int]]:
    """Returns (path below ``parts``, rows) of a split's files in row order; ``"assigned"`` stands for all experts' rows.

    Raises:
        RunDirError: if the split has not been written to its end.
    """
    if run.exists(*parts, INDEX_FILE):
        return [(name, rows) for name, rows in run.read_json(*parts, INDEX_FILE)["files"]]
    found = [str(path).rsplit("/", 2)[1] for path in run.fs.glob(run.path(*parts, f"{EXPERT}=*", INDEX_FILE))]
    experts = sorted(found, key=lambda name: int(re.sub(r"\D", "", name) or 0))
    if not experts:
        raise RunDirError(f"{run.address(*parts)} holds no rows: has the stage that writes it run?")
    return [(f"{expert}/{name}", rows) for expert in experts for name, rows in read_index(run, *parts, expert)]


def files_of(run: RunDir, *parts: str) -> list[str]:
    """Lists the Parquet files of a split (paths on ``run.fs``) in row order.

    Raises:
        RunDirError: if there are none.
    """
    return [run.path(*parts, name) for name, _ in read_index(run, *parts)]


def count_rows(run: RunDir, *parts: str) -> int:
    """Counts the rows of a split from its index.

    Raises:
        RunDirError: if there are none.
    """
    return sum(rows for _, rows in read_index(run, *parts))


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


def forget(output: RunDir, parts: tuple[str, ...]) -> None:
    """Takes a split's index and its place in ``encoding.json`` away, so that no reader trusts rows that are being made."""
    where = (*parts[:-1], ENCODING_FILE)
    if output.exists(*where):
        value = output.read_json(*where)
        value["splits"].pop(parts[-1], None)
        output.write_json(value, *where)
    output.remove(*parts, INDEX_FILE)


def arrow_filesystem(run: RunDir) -> pafs.FileSystem:
    """Returns the run directory's file system as pyarrow and Ray Data take it."""
    return pafs.LocalFileSystem() if run.is_local else pafs.PyFileSystem(pafs.FSSpecHandler(run.fs))
