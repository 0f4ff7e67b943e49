"""The stream that every stage with a source writes: units -> read, decode, crop -> encode -> files, receipts, ledger.

Rows stream: units of the source -> read, decode and crop (tasks) -> encode (a pool of actors, which hold the models) -> write
(tasks) -> receipts, which the driver adds up to the ledger. What is encoded together, and which rows share a file, is settled
when a unit is read, so the files depend on the source alone: not on the number of actors, on the order in which tasks end, or
on kills and resumes in between.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.data import Dataset

from aptp_ray.artifacts import RunDir
from aptp_ray.data.accounts import Accounts
from aptp_ray.data.encoded import INDEX_FILE, REJECTED_FILE, forget
from aptp_ray.data.layout import Layout, Unit
from aptp_ray.data.ledger import Entry, Ledger, entry_name, fitting, is_complete, repeated, without
from aptp_ray.data.rows import Framing, read_units, write_chunks
from aptp_ray.data.schema import REJECTED, UNIT
from aptp_ray.data.sources import ordered
from aptp_ray.tracking import Progress

_IMAGE_BYTES = 256 << 20  # of a reading task besides its chunk: decoding, and the interpreter itself
_REJECTED_SCHEMA = pa.schema([(name, pa.string()) for name in (*REJECTED, "split")])


def write_split(
    layout: Layout,
    units: Sequence[Unit],
    output: RunDir,
    parts: tuple[str, ...],
    *,
    made_by: dict[str, Any],
    framing: Framing,
    light: bool,
    rows: int,
    encoded: Callable[[Dataset], Dataset],
    max_rejected_fraction: float,
    promised: int | None = None,
) -> Accounts:
    """Writes the rows of all units; called again after a kill, it goes on with the units that are not done.

    Args:
        layout: of the source.
        units: the layout's, which are listed once a run: that may take minutes.
        output: the run directory.
        parts: where in it the rows go.
        made_by: what decides the files besides the source; rows that something else made are made again.
        framing: how images become squares.
        light: whether rows are written without images (which are decoded and checked all the same).
        rows: of a file.
        encoded: chunks of cropped rows -> chunks of the rows that are written (see ``rows.py``).
        max_rejected_fraction: of the source rows; and of the units, as to those that stay out of reach.
        promised: see :func:`promised_rows`; for the progress.

    Raises:
        ConfigError: if the source has no units or no usable row, or too many rows are rejected.
    """
    ledger = Ledger(output, parts)
    found = ledger.begin(made_by)
    entries = fitting(found, units, ledger.files())
    pending = [unit for unit in units if unit.index not in entries]
    for name in found.keys() - {entry_name(index) for index in entries}:
        ledger.remove(name)
    if pending:
        forget(output, parts)
        ledger.sweep(name for entry in entries.values() for name in entry.files)
        chunks = encoded(_cropped(layout, pending, framing, rows, light))
        receipts = chunks.map_batches(
            write_chunks,  # type: ignore[arg-type]  # Ray's type knows no keyword-only arguments
            batch_size=None,
            batch_format="pyarrow",
            fn_kwargs={"output": output, "parts": parts},
        )
        entries |= _collect(receipts, pending, entries, ledger, promised, label="/".join(parts))
    return _settle(entries, output, parts, ledger, framing.views, max_rejected_fraction)


def promised_rows(layout: Layout, units: Sequence[Unit]) -> int | None:
    """What the layout knows of its number of rows without reading them."""
    promised = getattr(layout, "promised_rows", None)
    return promised(units) if promised is not None else None


def _cropped(layout: Layout, units: Sequence[Unit], framing: Framing, rows: int, light: bool) -> Dataset:
    """Units -> lazy chunks of cropped rows, in any order."""
    items = [asdict(unit) for unit in units]
    source = ordered(ray.data.from_items(items, override_num_blocks=len(items)))  # one block, hence one task, a unit
    context = source.context
    context.execution_options.preserve_order = False  # files are numbered by unit and row: whoever is done goes first
    context.target_max_block_size = 1  # each chunk is handed on as soon as it is there, in a block of its own
    return source.map_batches(
        read_units,  # type: ignore[arg-type]  # Ray's type knows no keyword-only arguments
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"layout": layout, "framing": framing, "rows": rows, "light": light},
        # A decoded image, and a chunk while it is put together. (It also keeps the step apart: Ray Data joins steps that ask
        # for the same resources into one, and the actors would decode.)
        memory=_IMAGE_BYTES + 3 * rows * 3 * framing.resolution**2,
    )


def _collect(
    receipts: Dataset,
    pending: Sequence[Unit],
    done: dict[int, Entry],
    ledger: Ledger,
    promised: int | None,
    label: str,
) -> dict[int, Entry]:
    """Runs the stream; each unit gets its entry as soon as its last receipt is there."""
    units = {unit.index: unit for unit in pending}
    before = sum(entry.rows_in for entry in done.values())
    total, unit_name = (promised, "rows") if promised else (len(units) + len(done), "shards")
    progress = Progress(f"encode {label}", total, unit=unit_name, start=before if promised else len(done))
    open_units: dict[int, list[dict[str, Any]]] = {}
    entries: dict[int, Entry] = {}
    rows = before
    for receipt in _rows_of(receipts):
        waiting = open_units.setdefault(receipt[UNIT], [])
        waiting.append(receipt)
        rows += receipt["rows_in"]
        if is_complete(waiting):
            entry = Entry.of(units[receipt[UNIT]], open_units.pop(receipt[UNIT]))
            entries[entry.unit] = entry
            if not entry.unreachable:  # it is tried again if this run does not come to its end
                ledger.write(entry_name(entry.unit), entry.to_json())
        progress.update(rows if promised else len(done) + len(entries), f"({len(done) + len(entries)} shards done)")
    lost = [units[index].name for index in units.keys() - entries.keys()]
    if lost:
        raise RuntimeError(f"the end of {len(lost)} shards never arrived, e.g. {sorted(lost)[0]}: run the same command again")
    return entries


def _rows_of(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield from batch.to_pylist()


def _settle(
    found: dict[int, Entry],
    output: RunDir,
    parts: tuple[str, ...],
    ledger: Ledger,
    views: int,
    max_rejected_fraction: float,
) -> Accounts:
    """All units are there: drops what is there twice, checks the sums, and publishes the split."""
    for index, repeats in repeated([found[index] for index in sorted(found)]).items():
        found[index] = without(found[index], repeats, output, parts)
        if not found[index].unreachable:
            ledger.write(entry_name(index), found[index].to_json())
    entries = [found[index] for index in sorted(found)]
    accounts = Accounts("/".join(parts), entries, views)
    _write_rejected(output, parts, entries)
    print(accounts.summary(), file=sys.stderr, flush=True)
    accounts.check(max_rejected_fraction, output.address(*parts[:-1], REJECTED_FILE))
    for entry in entries:
        if entry.unreachable:
            ledger.write(entry_name(entry.unit), entry.to_json())
    files = [(name, rows) for entry in entries for name, rows in entry.files.items()]
    ledger.sweep(name for name, _ in files)
    content = hashlib.sha256(repr([(entry.name, entry.version, entry.files, entry.digests) for entry in entries]).encode())
    output.write_json({"files": files, "content": content.hexdigest()[:16]}, *parts, INDEX_FILE)
    return accounts


def _write_rejected(output: RunDir, parts: tuple[str, ...], entries: Sequence[Entry]) -> None:
    where = (*parts[:-1], REJECTED_FILE)
    rows = [(key, entry.name, reason, parts[-1]) for entry in entries for key, reason in entry.rejected]
    columns = zip(*rows, strict=True) if rows else ([] for _ in _REJECTED_SCHEMA)
    table = pa.Table.from_arrays([pa.array(column, pa.string()) for column in columns], schema=_REJECTED_SCHEMA)
    if output.exists(*where):
        old = pq.read_table(pa.BufferReader(output.read_bytes(*where))).cast(_REJECTED_SCHEMA)
        others = old.filter(pa.array([split != parts[-1] for split in old.column("split").to_pylist()], pa.bool_()))
        table = pa.concat_tables([others, table]).sort_by("split")  # a stable sort
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    output.write_bytes(buffer.getvalue().to_pybytes(), *where)
