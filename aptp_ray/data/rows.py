"""What Ray Data's tasks do with rows before and after the encoders.

Imports no torch: tasks run in many worker processes, and each would spend seconds importing what only the actors use.

Between its tasks the stream carries *chunks*: one Ray row holds the rows that become one file, as Arrow IPC bytes. Ray Data
cuts and joins blocks between rows as it sees fit, so what is encoded together, and what a file holds, depends on the unit alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from aptp_ray.artifacts import RunDir
from aptp_ray.config import ConfigError
from aptp_ray.data.encoded import LIGHT_SCHEMA, parquet_bytes
from aptp_ray.data.layout import DUPLICATE, Layout, Unit
from aptp_ray.data.schema import CAPTION, EMBEDDING, IMAGE, KEY, LAST, ORDINAL, REASON, SHARD, UNIT, VIEW

# What encoding leaves as it is, and what it reads besides.
PASSED_ON = tuple(name for name in LIGHT_SCHEMA.names if name != EMBEDDING)
CROPPED_SCHEMA = pa.schema([LIGHT_SCHEMA.field(name) for name in PASSED_ON] + [pa.field(IMAGE, pa.binary())])

# A chunk: UNIT, ORDINAL (of its first row), LAST, and:
NUMBER = "number"  # int32: the chunk's number in its unit
ROWS_IN = "rows_in"  # int32: source rows of the chunk, rejected ones counted
REJECTED_ROWS = "rejected"  # str: JSON list of [number of the row in its unit, key, reason]
ROWS = "rows"  # bytes: Arrow IPC stream of the other rows, all views
_HEAD = [(UNIT, pa.int32()), (ORDINAL, pa.int32()), (NUMBER, pa.int32()), (LAST, pa.bool_()), (ROWS_IN, pa.int32())]
CHUNK_SCHEMA = pa.schema([*_HEAD, (REJECTED_ROWS, pa.string()), (ROWS, pa.binary())])

# A receipt for a written chunk: the chunk's columns but ROWS, and:
FILE = "file"  # str: "" where no row was left
KEPT = "kept"  # int32: rows of the file
DIGESTS = "digests"  # bytes: a digest of key and caption for each source row of the file
RECEIPT_SCHEMA = pa.schema(
    [*_HEAD, (REJECTED_ROWS, pa.string()), (FILE, pa.string()), (KEPT, pa.int32()), (DIGESTS, pa.binary())]
)
DIGEST_BYTES = 16

_ATTEMPTS = 3  # at writing a file


@dataclass(frozen=True)
class Framing:
    """How an image becomes the squares that the VAE sees.

    The shorter side is resized to ``resolution`` (Lanczos); ``crop`` decides which square of the longer side is taken.

    Attributes:
        resolution: pixels of the square's side.
        crop: "center", or "random", drawn by key.
        flip: mirror a view with probability one half, drawn by key.
        views: how many squares are made of one image, each a row of its own.
        seed: of the draws; they depend on (seed, unit name, key, view) alone.
    """

    resolution: int
    crop: str = "center"
    flip: bool = False
    views: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.crop not in ("center", "random"):
            raise ConfigError(f"encode.crop={self.crop!r} is neither center nor random")
        if self.resolution < 1 or self.views < 1:
            raise ConfigError(f"data.resolution={self.resolution} and encode.views={self.views} have to be at least 1")
        if self.views > 1 and self.crop == "center" and not self.flip:
            raise ConfigError(
                f"encode.views={self.views} would encode the same square again: set encode.crop=random or encode.flip=true"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def frames(self, row: dict[str, Any]) -> list[bytes]:
        """Returns all views of a raw row's image, each the pixels of [resolution, resolution, 3]."""
        return [self.frame(row, view) for view in range(self.views)]

    def frame(self, row: dict[str, Any], view: int = 0) -> bytes:
        """Returns one view of a raw row's image; it does not depend on which others are asked for."""
        pixels, side = row[IMAGE], self.resolution
        height, width = pixels.shape[:2]
        scale = side / min(height, width)
        spare = [max(0, round(length * scale) - side) for length in (width, height)]  # pixels that the square leaves over
        left, top, mirrored = spare[0] // 2, spare[1] // 2, False
        if self.flip or self.crop == "random":
            from aptp_ray.core.randomness import key_seed  # imports torch, which center crops do without

            draws = np.random.default_rng(key_seed(self.seed, "crop", row[SHARD], row[KEY], view))
            drawn = [int(draws.integers(0, length + 1)) for length in spare]
            if self.crop == "random":
                left, top = drawn
            mirrored = self.flip and bool(draws.random() < 0.5)
        if scale == 1:
            square = pixels[top : top + side, left : left + side]
        else:
            # The square alone is resized: a picture a million times as wide as high would not fit into memory resized.
            box = (left / scale, top / scale, min(width, (left + side) / scale), min(height, (top + side) / scale))
            square = np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS, box=box))
        return np.ascontiguousarray(square[:, ::-1] if mirrored else square).tobytes()


def framed(row: dict[str, Any], framing: Framing, views: Iterable[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yields a usable raw row once for each view (None: all), with VIEW, and IMAGE as :meth:`Framing.frame` gives it."""
    for view in range(framing.views) if views is None else views:
        yield row | {VIEW: view, IMAGE: framing.frame(row, view)}


def cropped_table(rows: Sequence[dict[str, Any]], *, light: bool = False) -> pa.Table:
    """Returns framed rows as the table that :class:`~aptp_ray.data.encoder.Encoder` takes; light: without images."""
    fields = [field for field in CROPPED_SCHEMA if not (light and field.name == IMAGE)]
    return pa.table({field.name: pa.array([row[field.name] for row in rows], field.type) for field in fields})


def chunk_rows(rows_per_file: int, batch_size: int, bytes_in: int, bytes_out: int) -> int:
    """Returns how many rows a file holds: as asked, unless so many would not fit into the tasks' memory.

    Args:
        rows_per_file: as asked.
        batch_size: rows that are encoded at once, of which a chunk is a multiple where it can.
        bytes_in: of a cropped row.
        bytes_out: of an encoded row.
    """
    limit = max(1, min(rows_per_file, (128 << 20) // max(1, bytes_in), (256 << 20) // max(1, bytes_out)))
    return limit - limit % batch_size if limit > batch_size else limit


def read_units(units: pa.Table, *, layout: Layout, framing: Framing, rows: int, light: bool) -> Iterator[pa.Table]:
    """The first task of the stream: reads, decodes and crops a unit, and yields its chunks.

    Every unit has one chunk that is its LAST, even where nothing in it is usable.
    """
    for item in units.to_pylist():
        unit = Unit(**item)
        chunk = _Chunk(unit.index, framing, light)
        seen: set[str] = set()
        for row in layout.read(unit):
            if len(chunk.rows) + framing.views > max(rows, framing.views):
                yield chunk.table(last=False)
                chunk = chunk.following()
            reason = row[REASON] or (DUPLICATE if row[KEY] in seen else "")
            if not reason:
                seen.add(row[KEY])
            chunk.add(row, reason)
        yield chunk.table(last=True)


class _Chunk:
    """Rows of a unit on their way into one file."""

    def __init__(self, unit: int, framing: Framing, light: bool, first: int = 0, number: int = 0) -> None:
        self._unit, self._framing, self._light, self._first, self._number = unit, framing, light, first, number
        self._rows_in = 0
        self._rejected: list[tuple[int, str, str]] = []
        self.rows: list[dict[str, Any]] = []

    def following(self) -> _Chunk:
        return _Chunk(self._unit, self._framing, self._light, self._first + self._rows_in, self._number + 1)

    def add(self, row: dict[str, Any], reason: str) -> None:
        if reason:
            self._rejected.append((self._first + self._rows_in, row[KEY], reason))
        elif self._light:
            texts = {name: value for name, value in row.items() if name != IMAGE}  # the image has served: it could be decoded
            self.rows.extend(texts | {VIEW: view} for view in range(self._framing.views))
        else:
            self.rows.extend(framed(row, self._framing))
        self._rows_in += 1

    def table(self, last: bool) -> pa.Table:
        rows = pack_rows(cropped_table(self.rows, light=self._light))
        values = {
            UNIT: self._unit, ORDINAL: self._first * self._framing.views, NUMBER: self._number, LAST: last,
            ROWS_IN: self._rows_in, REJECTED_ROWS: json.dumps(self._rejected), ROWS: rows,
        }  # fmt: skip
        return pa.table({name: pa.array([value], CHUNK_SCHEMA.field(name).type) for name, value in values.items()})


def pack_rows(rows: pa.Table) -> bytes:
    """Returns a table as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as writer:
        writer.write_table(rows.combine_chunks())
    return sink.getvalue().to_pybytes()


def unpack_rows(chunk: pa.Table, index: int = 0) -> pa.Table:
    """Returns the rows of one chunk of a table of chunks, without copying them."""
    return pa.ipc.open_stream(chunk.column(ROWS)[index].as_buffer()).read_all()


def write_chunks(chunks: pa.Table, *, output: RunDir, parts: tuple[str, ...]) -> pa.Table:
    """The last task of the stream: writes each chunk's rows into a file of their own and returns a receipt for each.

    A task that runs again writes the same files again: names and content depend on the unit alone.
    """
    receipts: list[dict[str, Any]] = []
    for index, head in enumerate(chunks.drop_columns([ROWS]).to_pylist()):
        rows = unpack_rows(chunks, index)
        name = f"part-{head[UNIT]:06d}-{head[ORDINAL]:06d}.parquet" if rows.num_rows else ""
        if name:
            write_file(output, parquet_bytes(rows), *parts, name)
        digests = b"".join(digests_of(rows, first_views=True))
        receipts.append(head | {FILE: name, KEPT: rows.num_rows, DIGESTS: digests})
    return pa.Table.from_pylist(receipts, schema=RECEIPT_SCHEMA)


def digests_of(rows: pa.Table, *, first_views: bool = False) -> list[bytes]:
    """Returns what tells whether two rows of different units are the same: a digest of key and caption for each row."""
    columns = [rows.column(name).to_pylist() for name in (KEY, CAPTION, VIEW)]
    return [
        hashlib.blake2b(f"{key}\x00{caption}".encode(), digest_size=DIGEST_BYTES).digest()
        for key, caption, view in zip(*columns, strict=True)
        if not (first_views and view)
    ]


def write_file(output: RunDir, data: bytes, *parts: str) -> None:
    """Writes a file whole, and once more where the store refuses it for a moment."""
    for attempt in range(_ATTEMPTS):
        try:
            return output.write_bytes(data, *parts)
        except OSError:
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(2.0**attempt)


def binary_column(values: np.ndarray) -> pa.Array:
    """[n, ...] -> n byte strings in one buffer, without a Python object for each."""
    values = np.ascontiguousarray(values)
    each = values[0].nbytes if len(values) else 0
    offsets = np.arange(len(values) + 1, dtype=np.int64) * each
    if offsets[-1] >= 2**31:
        raise ValueError(f"{len(values)} tensors of {each} bytes exceed 2 GB: lower encode.batch_size")
    return pa.Array.from_buffers(
        pa.binary(), len(values), [None, pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(values)]
    )


def pixels_of(images: pa.ChunkedArray) -> np.ndarray:
    """A column of equally large squares as bytes -> uint8 [n, side, side, 3], read-only, without copying."""
    array = images.combine_chunks() if images.num_chunks != 1 else images.chunk(0)
    _, offsets, data = array.buffers()
    bounds = np.frombuffer(offsets, np.int32)[array.offset : array.offset + len(array) + 1]
    side = round(((bounds[1] - bounds[0]) / 3) ** 0.5)
    return np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]].reshape(len(array), side, side, 3)
