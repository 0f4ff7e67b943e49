"""What every layout of captioned images shares: units, rows, and the promise that a read goes through or says why not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from aptp_ray.data.schema import (
    ALTERNATES,
    CAPTION,
    GROUP,
    IMAGE,
    KEY,
    METADATA,
    POSITION,
    REASON,
    SHARD,
    UNREACHABLE,
)

NO_IMAGE = np.zeros((1, 1, 3), dtype=np.uint8)  # stands in a rejected row: an Arrow tensor column has no nulls
ROWS_PER_UNIT = 1000  # of a table: long enough to keep a reader busy, short enough to be done again after a kill
DUPLICATE = "key is a duplicate in its shard"


@dataclass(frozen=True)
class Limits:
    """What is too much to be decoded."""

    max_pixels: int = 100_000_000
    max_caption_characters: int = 2000


@dataclass(frozen=True)
class Unit:
    """What one task reads in sequence: a tar shard, or a range of rows of a table.

    Attributes:
        index: place among the split's units.
        name: stands in the rows' SHARD column; unique in the split.
        version: changes with the files that the unit is read from, "" where that is unknown.
        address: the file, as any process can open it.
        start: first byte or row of a range.
        stop: end of the range, exclusive.
        first_row: number of the range's first row in its table, where ``start`` counts bytes.
        payload: what a reader needs besides, so that no task has to parse a whole table again.
    """

    index: int
    name: str
    version: str = ""
    address: str = ""
    start: int = 0
    stop: int = 0
    first_row: int = 0
    payload: bytes = field(default=b"", repr=False)


class Layout(Protocol):
    """A way in which captioned images lie on storage. Picklable, and small enough to be sent to every task."""

    def units(self) -> list[Unit]:
        """Lists what there is to read.

        Raises:
            ConfigError: naming what was looked for and what was found, before any work.
        """
        ...

    def read(self, unit: Unit, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """Yields the raw rows of a unit (the columns ``schema.RAW_ROW``) in order, usable or not.

        Args:
            unit: one of :meth:`units`.
            positions: only these rows, in this order; no more of the unit is read than they need.

        Yields:
            A usable row has REASON ``""``. Any other row has the reason, and one black pixel for an image. Damage in a unit
            is one more such row. A unit that stays out of reach ends with a row whose reason starts with ``UNREACHABLE``.
        """
        ...


def usable(
    unit: Unit,
    position: int,
    key: str,
    image: np.ndarray,
    caption: str,
    *,
    alternates: Sequence[str] = (),
    group: str = "",
    metadata: str = "",
) -> dict[str, Any]:
    """Returns a raw row."""
    return {
        KEY: text_of(key),
        SHARD: unit.name,
        IMAGE: image,
        CAPTION: caption,
        ALTERNATES: list(alternates),
        GROUP: text_of(group),
        METADATA: metadata,
        POSITION: position,
        REASON: "",
    }


def rejected(unit: Unit, position: int, key: str, reason: str) -> dict[str, Any]:
    """Returns the raw row of something that cannot be used."""
    return usable(unit, position, key, NO_IMAGE, "") | {REASON: text_of(reason)}


def unreachable(unit: Unit, position: int, error: BaseException) -> dict[str, Any]:
    """Returns the last raw row of a unit that stays out of reach."""
    return rejected(unit, position, "", f"{UNREACHABLE}: {one_line(error)}")


def once(unit: Unit, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rejects rows whose key another row of the unit had before them, whether that one was usable or not."""
    seen: set[str] = set()
    for row in rows:
        if row[KEY] and row[KEY] in seen:
            row = rejected(unit, row[POSITION], row[KEY], DUPLICATE)
        seen.add(row[KEY])
        yield row


def one_line(error: BaseException) -> str:
    """Returns an exception's type and the start of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def text_of(text: str) -> str:
    """Returns text that Arrow can hold: names in archives and JSON may have lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
