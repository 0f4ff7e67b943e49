"""A folder of images with a ``metadata.jsonl`` or ``metadata.csv``: the ``imagefolder`` convention of ``datasets``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aptp_ray.config import ConfigError
from aptp_ray.data.access import SteadyStream, Unreachable, patiently, read_range
from aptp_ray.data.decode import Unusable
from aptp_ray.data.layout import ROWS_PER_UNIT, Limits, Unit, once, one_line
from aptp_ray.data.records import Record, drawn, folder_of, image_folder, inside, line_ranges, read_records, table_info

_FILE_NAME = "file_name"
_TABLES = ("metadata.jsonl", "metadata.csv")
_CHUNK = 2**20


@dataclass(frozen=True)
class ImageFolderLayout:
    """Units are ranges of the metadata's rows; ``file_name`` may name files in folders below, and is the row's key."""

    folder: str
    caption_column: str = "text"
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    seed: int = 0
    limits: Limits = Limits()

    def units(self) -> list[Unit]:
        """Parts the metadata by rows."""
        fs, folder = image_folder(self.folder, self.storage_options, "data.source.train and .validation")
        name = next((name for name in _TABLES if patiently(partial(fs.exists, f"{folder}/{name}"))), None)
        if name is None:
            raise ConfigError(f"there is neither a {' nor a '.join(_TABLES)} in {self.folder!r}")
        address = f"{self.folder.rstrip('/')}/{name}"
        _, _, version = table_info(address, self.storage_options, "data.source.train and .validation")
        try:
            ranges, header = self._csv_ranges(address) if name.endswith(".csv") else self._jsonl_ranges(address)
        except (Unreachable, OSError) as error:
            raise ConfigError(f"cannot read {address!r}: {one_line(error)}") from error
        if not ranges:
            raise ConfigError(f"{address!r} has no rows")
        payload = json.dumps(header).encode()
        units, first = [], 0
        for index, (start, stop, rows) in enumerate(ranges):
            units.append(Unit(index, f"{address}[{first}:{first + rows}]", version, address, start, stop, first, payload))
            first += rows
        return units

    def _check_columns(self, address: str, columns: list[str]) -> None:
        for column in (_FILE_NAME, self.caption_column):
            if column not in columns:
                raise ConfigError(
                    f"{address!r} has no column {column!r}, but {', '.join(columns)}: set data.source.caption_column"
                )

    def _jsonl_ranges(self, address: str) -> tuple[list[tuple[int, int, int]], list[str]]:
        ranges = line_ranges(address, self.storage_options)
        for line in read_range(address, self.storage_options, *ranges[0][:2]).splitlines() if ranges else []:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # reported when it is read
            if isinstance(row, dict) and row:
                self._check_columns(address, list(row))
                break
        return ranges, []

    def _csv_ranges(self, address: str) -> tuple[list[tuple[int, int, int]], list[str]]:
        """A quoted caption may hold line ends, so ranges are of records, and only csv knows where one ends."""
        ranges: list[tuple[int, int, int]] = []
        with SteadyStream(address, self.storage_options) as stream:
            lines = _Lines(stream)
            reader = csv.reader(lines)
            try:
                header = next(reader, [])
                self._check_columns(address, header)
                start, rows = lines.offset, 0
                for values in reader:
                    rows += bool(values)  # an empty line is no row
                    if rows == ROWS_PER_UNIT:
                        ranges.append((start, lines.offset, rows))
                        start, rows = lines.offset, 0
                if rows:
                    ranges.append((start, lines.offset, rows))
            except csv.Error as error:
                raise ConfigError(f"{address!r} is no CSV file: line {reader.line_num}: {error}") from error
        return ranges, header

    def read(self, unit: Unit, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """See :class:`~aptp_ray.data.layout.Layout`."""
        fs, folder = folder_of(self.folder, self.storage_options)
        rows = read_records(
            unit, lambda: self._records(unit, folder), positions, open_image=lambda path: (fs, path), limits=self.limits
        )
        return rows if positions is not None else once(unit, rows)

    def _records(self, unit: Unit, folder: str) -> Iterable[Record]:
        data = read_range(unit.address, self.storage_options, unit.start, unit.stop)
        header = json.loads(unit.payload)
        rows = _csv_rows(data, header) if header else _jsonl_rows(data)
        for position, row in enumerate(rows):
            number = str(unit.first_row + position)
            if isinstance(row, str):
                yield Record(position, number, reason=row)
                continue
            name = row.get(_FILE_NAME)
            try:
                path = inside(folder, name)
            except Unusable as error:
                yield Record(position, number, reason=str(error))
                continue
            caption, others = drawn(row.get(self.caption_column), self.limits, self.seed, name)
            yield Record(position, str(name), path, caption, others)


def _jsonl_rows(data: bytes) -> Iterator[dict[str, Any] | str]:
    for line in data.removesuffix(b"\n").split(b"\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"metadata is not JSON: {error}" if line.strip() else "metadata is an empty line"
            continue
        yield row if isinstance(row, dict) else f"metadata is a JSON {type(row).__name__}, not an object"


def _csv_rows(data: bytes, header: list[str]) -> Iterator[dict[str, Any]]:
    # Bytes that are not UTF-8 become surrogates, which no caption may hold: the row is rejected, its neighbors are not.
    for values in csv.reader(io.StringIO(data.decode("utf-8", "surrogateescape"), newline="")):
        if values:
            yield dict(zip(header, values, strict=False))


class _Lines:
    """The lines of a stream as text, with the byte after the last one that was given."""

    def __init__(self, stream: SteadyStream) -> None:
        self._stream, self._rest = stream, b""
        self.offset = 0

    def __iter__(self) -> Iterator[str]:
        while chunk := self._stream.read(_CHUNK):
            lines = (self._rest + chunk).split(b"\n")
            self._rest = lines.pop()
            for line in lines:
                yield self._text(line + b"\n")
        if self._rest:
            yield self._text(self._rest)

    def _text(self, line: bytes) -> str:
        first = self.offset == 0
        self.offset += len(line)
        text = line.decode("utf-8", "surrogateescape")
        return text.removeprefix("\ufeff") if first else text
