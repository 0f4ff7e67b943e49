"""Conceptual Captions as its publisher lays it out: a TSV of captions and addresses, beside the images downloaded by it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aptp_ray.config import ConfigError
from aptp_ray.data.access import Unreachable, is_local, patiently, read_range
from aptp_ray.data.layout import ROWS_PER_UNIT, Limits, Unit, one_line
from aptp_ray.data.records import Record, folder_of, image_folder, line_ranges, read_records, table_info


@dataclass(frozen=True)
class ConceptualCaptionsLayout:
    """Units are ranges of lines. The row number in an image's name pairs it with its caption; nothing is counted."""

    tsv: str
    images: str
    storage_options: dict[str, Any] = field(default_factory=dict, repr=False)
    limits: Limits = Limits()

    def units(self) -> list[Unit]:
        """Parts the TSV by lines, and gives each part the names of its images.

        The folder is listed once, here. The usual downloader names files ``<row>_<crc32 of the address>``, so names could be
        tried one by one instead; but a third of the addresses lead nowhere by now, each such row would have to be
        looked for in the listing all the same, and other downloaders choose other names.
        """
        _, _, version = table_info(self.tsv, self.storage_options, "data.source.*.tsv")
        fs, folder = image_folder(self.images, self.storage_options, "data.source.*.images")
        ranges = line_ranges(self.tsv, self.storage_options)
        if not ranges:
            raise ConfigError(f"{self.tsv!r} is empty: data.source.*.tsv wants lines of caption, tab and address")
        names = _names_by_range(fs, folder, len(ranges))
        if not any(names):
            raise ConfigError(
                f"of the files in {self.images!r}, none is named <row>_<hash>, with a row of {self.tsv!r}: "
                "check data.source.*.images"
            )
        units, first = [], 0
        for index, (start, stop, lines) in enumerate(ranges):
            payload = bytes(names[index])
            units.append(
                Unit(
                    index,
                    name=f"{self.tsv}[{first}:{first + lines}]",
                    version=f"{version}-{zlib.crc32(payload):08x}",  # images that came later count
                    address=self.tsv,
                    start=start,
                    stop=stop,
                    first_row=first,
                    payload=payload,
                )
            )
            first += lines
        return units

    def read(self, unit: Unit, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """See :class:`~aptp_ray.data.layout.Layout`."""
        fs, folder = folder_of(self.images, self.storage_options)
        return read_records(
            unit, lambda: self._records(unit, folder), positions, open_image=lambda path: (fs, path), limits=self.limits
        )

    def _records(self, unit: Unit, folder: str) -> Iterable[Record]:
        names: dict[int, list[str]] = {}
        for name in unit.payload.decode("utf-8", "surrogateescape").split("\n"):
            if name:
                names.setdefault(int(name.partition("_")[0]), []).append(name)
        data = read_range(unit.address, self.storage_options, unit.start, unit.stop)
        for position, line in enumerate(data.removesuffix(b"\n").split(b"\n")):
            row = unit.first_row + position
            caption, tab, address = line.removesuffix(b"\r").partition(b"\t")
            if not tab:
                yield Record(position, str(row), reason="line has no tab between caption and address")
            elif row not in names:
                yield Record(position, str(row), reason="image is missing")
            else:
                name = _best(names[row], address)
                yield Record(position, str(row), image=f"{folder}/{name}", caption=caption)


def _best(names: list[str], address: bytes) -> str:
    """One of a row's files: that whose hash is its address's, where there are several."""
    own = str(zlib.crc32(address))
    return min(names, key=lambda name: (name.partition("_")[2].partition(".")[0] != own, name))


def _names_by_range(fs: Any, folder: str, count: int) -> list[bytearray]:
    """The names of the images of each range, joined: three million of them are 60 MB so, and ten times that as objects."""
    found = [bytearray() for _ in range(count)]
    for name in _names(fs, folder):
        digits, _, rest = name.partition("_")
        if rest and digits.isascii() and digits.isdigit() and len(digits) < 16 and "\n" not in name:
            part = int(digits) // ROWS_PER_UNIT
            if part < count:
                found[part] += name.encode("utf-8", "surrogateescape") + b"\n"
    # In a fixed order, so that a unit's version does not depend on how the listing came.
    return [bytearray(b"".join(sorted(names.splitlines(keepends=True)))) for names in found]


def _names(fs: Any, folder: str) -> Iterator[str]:
    if is_local(fs):
        with os.scandir(folder) as entries:
            for entry in entries:
                yield entry.name
        return
    try:
        listing = patiently(lambda: fs.ls(folder, detail=False))
    except (Unreachable, OSError) as error:
        raise ConfigError(f"cannot list {folder!r} ({one_line(error)}): check data.source.*.images") from error
    for path in listing:
        yield str(path).rstrip("/").rpartition("/")[2]
