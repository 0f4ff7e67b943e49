"""Rows of a table become raw rows: images are fetched ahead, decoded once for neighbors that share one, and paired by row."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from aptp_ray.config import ConfigError
from aptp_ray.data.access import ABSENT, SteadyStream, Unreachable, ahead, is_local, patiently, version_of
from aptp_ray.data.decode import Unusable, decode_caption, decode_image, good_captions
from aptp_ray.data.layout import ROWS_PER_UNIT, Limits, Unit, one_line, rejected, unreachable, usable
from aptp_ray.storage import file_system

_CHUNK = 8 * 2**20


@dataclass(frozen=True)
class Record:
    """A row of a table before its image is read.

    Attributes:
        position: number of the row in its unit.
        key: of the row.
        image: path on the table's file system, or the bytes; None where there is none.
        caption: as the table has it.
        alternates: the image's other captions.
        reason: why the row cannot be used, if that is known already.
    """

    position: int
    key: str
    image: str | bytes | None = None
    caption: Any = None
    alternates: Sequence[Any] = ()
    reason: str = ""


def read_records(
    unit: Unit,
    records: Callable[[], Iterable[Record]],
    positions: Sequence[int] | None,
    *,
    open_image: Callable[[str], tuple[Any, str]],
    limits: Limits,
) -> Iterator[dict[str, Any]]:
    """Yields a raw row a record, in order.

    Args:
        unit: whose rows they are.
        records: gives them; what it raises about the store makes the unit unreachable.
        positions: only these, in this order.
        open_image: gives the file system and path on it of an image that a record names.
        limits: see :class:`~aptp_ray.data.layout.Limits`.
    """
    place = 0
    try:
        chosen: Iterable[Record] = records()
        if positions is not None:
            by_position = {record.position: record for record in chosen}
            chosen = [by_position[position] for position in positions]
        # Neighbors with one image (COCO has five captions each) read and decode it once.
        groups = (list(group) for _, group in itertools.groupby(chosen, key=_image_of))
        for group, outcome in ahead(groups, lambda group: _fetch(group[0], open_image)):
            place = group[0].position
            yield from _rows(unit, group, outcome.result(), limits)
    except (Unreachable, OSError) as error:
        yield unreachable(unit, place, error)


def _image_of(record: Record) -> tuple[Any, ...]:
    return (record.image,) if isinstance(record.image, str) and not record.reason else (record.position, None)


def _fetch(record: Record, open_image: Callable[[str], tuple[Any, str]]) -> bytes | str | None:
    """The image's bytes; None if there is none; a text that says why it cannot be read."""
    if record.reason or record.image is None or isinstance(record.image, bytes):
        return record.image if isinstance(record.image, bytes) else None
    try:
        fs, path = open_image(record.image)
    except (ValueError, ImportError) as error:  # an address of no file system that is known here
        return f"image is unreadable: {one_line(error)}"
    try:
        return patiently(lambda: bytes(fs.cat_file(path)))
    except ABSENT:
        return None
    except OSError as error:
        if isinstance(error, PermissionError) and not is_local(fs):
            raise  # of a store: its credentials have run out, or were never enough. That says nothing about the row.
        return f"image is unreadable: {one_line(error)}"  # a name that no file can have, a file that may not be read


def _rows(unit: Unit, group: list[Record], data: bytes | str | None, limits: Limits) -> Iterator[dict[str, Any]]:
    image: np.ndarray | None = None
    problem = data if isinstance(data, str) else ""
    for record in group:
        try:
            if record.reason or problem:
                raise Unusable(record.reason or problem)
            if image is None:
                try:
                    image = decode_image(data if isinstance(data, bytes) else None, limits)
                except Unusable as error:
                    problem = str(error)
                    raise
            caption = decode_caption(record.caption, limits)
            alternates = good_captions(record.alternates, limits)
        except Unusable as error:
            yield rejected(unit, record.position, record.key, str(error))
            continue
        yield usable(unit, record.position, record.key, image, caption, alternates=alternates)


def drawn(value: Any, limits: Limits, *key: object) -> tuple[Any, list[Any]]:
    """Draws one of a list of captions, among those that can be used; the others come second.

    Args:
        value: a caption, or a list of them.
        limits: of captions.
        *key: (seed, the row's key): the draw depends on nothing else, so that data moved elsewhere gives the same rows.
    """
    if not isinstance(value, list | tuple | np.ndarray):
        return value, []
    captions = list(value)
    good = good_captions(captions, limits)
    if not good:
        return (captions[0] if captions else None), []
    # As core.randomness keys its generators; that module imports torch, which costs a reading task seconds.
    digest = hashlib.sha256("\x1f".join(map(str, ("caption", *key))).encode()).digest()
    choice = int(np.random.default_rng(int.from_bytes(digest[:8], "little")).integers(len(good)))
    return good[choice], good[:choice] + good[choice + 1 :]


def inside(folder: str, name: Any) -> str:
    """Returns the path of a file that a table names.

    Raises:
        Unusable: if it is no name, or leaves the folder: a table from the web does not choose which files are opened.
    """
    if not isinstance(name, str) or not name.strip():
        raise Unusable("file_name is missing")
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or name.startswith("/") or "\0" in name or "://" in name:
        raise Unusable(f"file_name {name[:200]!r} is no path inside of the image folder")
    return f"{folder.rstrip('/')}/{name.removeprefix('./')}"


def table_info(address: str, storage_options: dict[str, Any], knob: str) -> tuple[Any, str, str]:
    """Returns a table's file system, path and version.

    Raises:
        ConfigError: if it is not there.
    """
    fs, path = _file_system(address, storage_options, knob)
    try:
        info = patiently(lambda: fs.info(path))
    except (Unreachable, OSError) as error:
        raise ConfigError(f"cannot read {address!r} ({one_line(error)}): check {knob} and storage_options") from error
    if info.get("type") == "directory":
        raise ConfigError(f"{address!r} is a folder, and {knob} wants a file")
    return fs, path, version_of(info)


def image_folder(address: str, storage_options: dict[str, Any], knob: str) -> tuple[Any, str]:
    """Returns a folder's file system and path.

    Raises:
        ConfigError: if it is not there.
    """
    fs, path = _file_system(address, storage_options, knob)
    try:
        there = patiently(lambda: fs.isdir(path))
    except (Unreachable, OSError) as error:
        raise ConfigError(f"cannot look into {address!r} ({one_line(error)}): check {knob} and storage_options") from error
    if not there:
        raise ConfigError(f"there is no folder {address!r}, or nothing in it: check {knob} and storage_options")
    return fs, path


def folder_of(address: str, storage_options: dict[str, Any]) -> tuple[Any, str]:
    """As :func:`image_folder`, without a look at whether it is there."""
    fs, path = file_system(address, storage_options)
    return fs, str(path).rstrip("/")


def _file_system(address: str, storage_options: dict[str, Any], knob: str) -> tuple[Any, str]:
    try:
        return file_system(address, storage_options)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
        raise ConfigError(f"cannot open {address!r}: {error}; check {knob}") from error


def line_ranges(address: str, storage_options: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Parts a text file into ranges of ``ROWS_PER_UNIT`` lines.

    Returns:
        (first byte, end, number of lines) of each range. Only these are held, whatever the file's length.
    """
    ends: list[np.ndarray] = []
    count = offset = last = 0
    with SteadyStream(address, storage_options) as stream:
        while chunk := stream.read(_CHUNK):
            places = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == 10) + (offset + 1)
            first = -(count + 1) % ROWS_PER_UNIT  # index of the first line end that is a multiple
            ends.append(places[first::ROWS_PER_UNIT])
            count += len(places)
            last = int(places[-1]) if len(places) else last
            offset += len(chunk)
    if offset > last:
        count += 1  # the last line has no end
    bounds = [0, *(int(end) for end in np.concatenate(ends))] if ends else [0]
    if bounds[-1] < offset:
        bounds.append(offset)
    pairs = list(itertools.pairwise(bounds))
    return [(start, stop, min(ROWS_PER_UNIT, count - number * ROWS_PER_UNIT)) for number, (start, stop) in enumerate(pairs)]
