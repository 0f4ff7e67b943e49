"""What of a split is done: one small file for each unit whose rows all lie on storage.

The ledger makes a run that was killed at any point resumable. Files are written first and entries after them, each whole, so an
entry is proof of its files, and a file that no entry names is half a unit's: it is removed and the unit is done again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aptp_ray.artifacts import RunDir, RunDirError
from aptp_ray.data.encoded import parquet_bytes
from aptp_ray.data.layout import Unit
from aptp_ray.data.rows import (
    DIGEST_BYTES,
    DIGESTS,
    FILE,
    KEPT,
    NUMBER,
    REJECTED_ROWS,
    ROWS_IN,
    digests_of,
    write_file,
)
from aptp_ray.data.schema import KEY, LAST, UNREACHABLE

REPEATED = "key and caption are those of a row of an earlier shard"
_FOLDER, _MADE_BY = "_units", "made_by.json"
_STEM = re.compile(r"(?<=\d-\d{6})(-\d+)?\.parquet$")  # what follows part-<unit>-<row>


class Ledger:
    """Entries of a folder of the run directory: JSON files, each written whole."""

    def __init__(self, run: RunDir, parts: tuple[str, ...]) -> None:
        self._run, self._parts = run, parts

    def begin(self, made_by: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Returns what is done, by entry; all entries are forgotten if something else than ``made_by`` made them."""
        where = (*self._parts, _FOLDER, _MADE_BY)
        same = False
        if self._run.exists(*where):
            try:
                same = self._run.read_json(*where) == json.loads(json.dumps(made_by))
            except RunDirError:  # cut short by a host that went down
                same = False
        if not same:
            self._run.remove(*self._parts, _FOLDER)
            self._run.write_json(made_by, *where)
            return {}
        return self._entries()

    def _entries(self) -> dict[str, dict[str, Any]]:
        folder = self._run.path(*self._parts, _FOLDER)
        paths = [str(path) for path in self._run.fs.glob(f"{folder}/*.json") if not str(path).endswith(f"/{_MADE_BY}")]
        entries = {}
        for path, data in self._run.fs.cat(paths).items() if paths else ():  # object stores answer many at once
            try:
                entries[str(path).rsplit("/", 1)[-1].removesuffix(".json")] = json.loads(data)
            except ValueError:  # cut short by a host that went down: the unit is done again
                continue
        return entries

    def write(self, name: str, entry: dict[str, Any]) -> None:
        """Records that something is done."""
        write_file(self._run, json.dumps(entry, ensure_ascii=False).encode(), *self._parts, _FOLDER, f"{name}.json")

    def remove(self, name: str) -> None:
        """Forgets an entry, if it is there."""
        self._run.remove(*self._parts, _FOLDER, f"{name}.json")

    def files(self) -> set[str]:
        """Lists the files of rows that are there, as paths below the folder."""
        root = self._run.path(*self._parts)
        found = self._run.fs.find(root) if self._run.exists(*self._parts) else []
        return {str(path)[len(root) + 1 :] for path in found}

    def sweep(self, named: Iterable[str]) -> None:
        """Removes files of rows that no entry names, and what killed writers left behind."""
        keep = set(named)
        for path in sorted(self.files() - keep):
            rows = path.rsplit("/", 1)[-1].startswith("part-") and not path.startswith(f"{_FOLDER}/")
            if rows or path.endswith(".tmp"):
                self._run.remove(*self._parts, path)


@dataclass(frozen=True)
class Entry:
    """What became of one unit.

    Attributes:
        unit: its index.
        name: its name.
        version: of what it was read from.
        rows_in: source rows.
        rows: encoded rows, all views.
        rejected: [key, reason] of each source row that was not used.
        files: rows of each file, in row order.
        digests: of key and caption of each used source row, in hexadecimal digits.
        dropped: how many rows were dropped because another unit has them, too.
    """

    unit: int
    name: str
    version: str
    rows_in: int
    rows: int
    rejected: list[list[str]]
    files: dict[str, int]
    digests: str = field(repr=False)
    dropped: int = 0

    @property
    def unreachable(self) -> bool:
        """Whether the unit, or its end, could not be read; such a unit is tried again as long as the run goes on."""
        return any(reason.startswith(UNREACHABLE) for _, reason in self.rejected)

    @classmethod
    def of(cls, unit: Unit, receipts: Sequence[dict[str, Any]]) -> Entry:
        """Adds up a unit's receipts."""
        ordered = sorted(receipts, key=lambda receipt: receipt[NUMBER])
        files = {receipt[FILE]: receipt[KEPT] for receipt in ordered if receipt[FILE]}
        rejected = [[key, reason] for receipt in ordered for _, key, reason in json.loads(receipt[REJECTED_ROWS])]
        digests = b"".join(receipt[DIGESTS] for receipt in ordered).hex()
        rows_in = sum(receipt[ROWS_IN] for receipt in ordered)
        return cls(unit.index, unit.name, unit.version, rows_in, sum(files.values()), rejected, files, digests)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def is_complete(receipts: Sequence[dict[str, Any]]) -> bool:
    """Whether the receipts of a unit are all there: they arrive in any order, and one of them says that it is the last."""
    numbers = {receipt[NUMBER] for receipt in receipts}
    return any(receipt[LAST] and len(numbers) == receipt[NUMBER] + 1 for receipt in receipts)


def entry_name(index: int) -> str:
    return f"{index:06d}"


def fitting(found: dict[str, dict[str, Any]], units: Sequence[Unit], files: set[str]) -> dict[int, Entry]:
    """Returns the entries that hold for these units: same place, name and version, and files that are there."""
    entries = {}
    for unit in units:
        value = found.get(entry_name(unit.index))
        if value is not None and (value["name"], value["version"]) == (unit.name, unit.version) and files >= set(value["files"]):
            entries[unit.index] = Entry(**value)
    if len(entries) < len(found):
        # A unit changed. Rows that were dropped elsewhere because it had them may have no other place now.
        entries = {index: entry for index, entry in entries.items() if not entry.dropped}
    return entries


def repeated(entries: Sequence[Entry]) -> dict[int, set[bytes]]:
    """Finds rows with the key and the caption of a row of an earlier unit; returns their digests by unit."""
    raw = [bytes.fromhex(entry.digests) for entry in entries]
    digests = np.frombuffer(b"".join(raw), np.uint64).reshape(-1, 2)
    owners = np.repeat([entry.unit for entry in entries], [len(item) // DIGEST_BYTES for item in raw])
    order = np.lexsort((owners, digests[:, 1], digests[:, 0]))
    same = (digests[order[1:]] == digests[order[:-1]]).all(axis=1)
    found: dict[int, set[bytes]] = {}
    for row in order[1:][same].tolist():
        found.setdefault(int(owners[row]), set()).add(digests[row].tobytes())
    return found


def without(entry: Entry, repeats: set[bytes], run: RunDir, parts: tuple[str, ...]) -> Entry:
    """Writes files of a unit without some of its rows, and returns the entry that names these files.

    They have names of their own: until the entry is written, the old files are there and the old entry holds.
    """
    files: dict[str, int] = {}
    gone: list[list[str]] = []
    for name, count in entry.files.items():
        rows = pq.read_table(pa.BufferReader(run.read_bytes(*parts, name)))
        drop = np.array([digest in repeats for digest in digests_of(rows)], dtype=bool)
        if not drop.any():
            files[name] = count
            continue
        gone += [[key, REPEATED] for key in dict.fromkeys(rows.filter(pa.array(drop)).column(KEY).to_pylist())]
        kept = rows.filter(pa.array(~drop))
        if kept.num_rows:
            new = f"{_STEM.sub('', name)}-{entry.dropped + len(gone)}.parquet"
            write_file(run, parquet_bytes(kept), *parts, new)
            files[new] = kept.num_rows
    data = bytes.fromhex(entry.digests)
    digests = [data[start : start + DIGEST_BYTES] for start in range(0, len(data), DIGEST_BYTES)]
    return replace(
        entry,
        rows=sum(files.values()),
        rejected=entry.rejected + gone,
        files=files,
        digests=b"".join(digest for digest in digests if digest not in repeats).hex(),
        dropped=entry.dropped + len(gone),
    )
