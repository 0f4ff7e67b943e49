"""Captioned images as a Ray Dataset, streamed from the tar shards that img2dataset writes.

A shard holds ``<key>.jpg|jpeg|png|webp``, ``<key>.txt`` and, where there is one, ``<key>.json``; the members of a
sample stand next to one another. Only these kinds of content are decoded, each by one fixed decoder: a shard from the
web never decides which code runs. A sample that cannot be used becomes a row with a reason: no row disappears unseen.

``ray.data.read_webdataset`` is not used: it picks decoders by file extension (``.npy`` and ``.pt`` among them), one
sample that it cannot decode fails the whole read, and it has no place for a reason.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import re
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import ray
from PIL import Image, ImageOps
from ray.data import Dataset
from ray.data.extensions import ArrowVariableShapedTensorArray

from aptp_ray.config import ConfigError
from aptp_ray.data.schema import ALTERNATES, CAPTION, GROUP, IMAGE, KEY, METADATA, RAW, REASON, SHARD

_IMAGES = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}
_TEXT, _JSON = "txt", "json"
_BLOCK_ROWS = 64  # rows decoded before they are handed on; bounds a reader's memory
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_NO_IMAGE = np.zeros((1, 1, 3), dtype=np.uint8)  # stands in a rejected row: an Arrow tensor column has no nulls


def expand(pattern: str, storage_options: dict[str, Any] | None = None) -> list[str]:
    """Lists the shards of a pattern, each as an address that any process can open.

    Args:
        pattern: a path or fsspec URI with brace ranges (``{00000..00331}``), brace lists (``{a,b}``) and globs.
        storage_options: handed to fsspec.

    Returns:
        Addresses in the order of the braces, glob matches sorted, without repeats.

    Raises:
        ConfigError: if nothing matches, or a shard that the braces name is not there.
    """
    if not pattern:
        raise ConfigError("the shard pattern is empty: set data.source.train and data.source.validation")
    named = [fsspec.core.url_to_fs(part, **(storage_options or {})) for part in _expand_braces(pattern)]
    with ThreadPoolExecutor(16) as pool:  # one request a shard on an object store
        found = list(pool.map(lambda item: _matches(*item), named))
    shards = list(dict.fromkeys(itertools.chain.from_iterable(found)))
    if not shards:
        raise ConfigError(f"no shard matches {pattern!r}: check data.source.train and .validation, and storage_options")
    missing = [path for (_, path), matches in zip(named, found, strict=True) if not matches and not _has_glob(path)]
    if missing:
        raise ConfigError(
            f"{len(missing)} of the {len(named)} shards that {pattern!r} names are missing, the first is {missing[0]}: "
            "mend the range, or use a glob (*.tar) to take what is there"
        )
    return shards


def _expand_braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    bounds = _RANGE.fullmatch(body)
    if bounds:
        first, last = bounds.groups()
        # As in a shell, a leading zero on either side pads all of the range.
        width = max(len(first), len(last)) if first.startswith("0") or last.startswith("0") else 0
        step = 1 if int(first) <= int(last) else -1
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    else:
        choices = body.split(",")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [text for choice in choices for text in _expand_braces(head + choice + tail)]


def _has_glob(path: str) -> bool:
    return any(sign in path for sign in "*?[")


def _matches(fs: fsspec.AbstractFileSystem, path: str) -> list[str]:
    if _has_glob(path):
        paths = sorted(str(match) for match in fs.glob(path))
    else:
        paths = [path] if fs.exists(path) else []
    local = "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)
    return paths if local else [fs.unstrip_protocol(item) for item in paths]


def webdataset(pattern: str, *, storage_options: dict[str, Any] | None = None) -> Dataset:
    """Streams the samples of all shards, in the order of the shards and of each shard's members.

    Returns:
        A lazy Dataset with the columns ``RAW`` and ``REASON``. REASON is ``""`` for a usable row; otherwise it says
        what is wrong with the row, and IMAGE holds one black pixel.

    Raises:
        ConfigError: as :func:`expand`, before anything is read.
    """
    shards = expand(pattern, storage_options)
    # One block, hence one task and one sequential read, a shard.
    rows = ordered(ray.data.from_items([{SHARD: shard} for shard in shards], override_num_blocks=len(shards)))
    return rows.map_batches(
        _read_shards,  # type: ignore[arg-type]  # Ray's type knows no keyword-only arguments
        batch_size=None,
        batch_format="pyarrow",
        fn_kwargs={"storage_options": storage_options or {}},
    )


def ordered(dataset: Dataset) -> Dataset:
    """Makes a Dataset keep its row order, and keep quiet where standard error is no terminal; returns it."""
    context = dataset.context
    context.execution_options.preserve_order = True
    if not sys.stderr.isatty():
        context.enable_progress_bars = False
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that there are no bars
        for handler in logging.getLogger("ray.data").handlers:
            # Ray Data's other handlers write files of Ray's session, which stay complete.
            if type(handler).__name__ == "PlainRayHandler":
                handler.setLevel(logging.WARNING)
    return dataset


def _read_shards(shards: pa.Table, *, storage_options: dict[str, Any]) -> Iterator[pa.Table]:
    for shard in shards.column(SHARD).to_pylist():
        samples = read_shard(shard, storage_options)
        while rows := list(itertools.islice(samples, _BLOCK_ROWS)):
            yield _table(rows)


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    # Types are given, never inferred: a block whose lists are all empty must have the schema of any other.
    texts = [name for name in (*RAW, REASON) if name not in (IMAGE, ALTERNATES)]
    columns: dict[str, Any] = {name: pa.array([row[name] for row in rows], pa.string()) for name in texts}
    columns[ALTERNATES] = pa.array([row[ALTERNATES] for row in rows], pa.list_(pa.string()))
    columns[IMAGE] = ArrowVariableShapedTensorArray.from_numpy([row[IMAGE] for row in rows])
    return pa.table({name: columns[name] for name in (*RAW, REASON)})


def read_shard(shard: str, storage_options: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yields one row a sample of one tar shard; see :func:`webdataset`.

    What stands before a shard's damage is yielded; the damage itself is one more row, with an empty key and a reason.
    """
    count = 0
    with fsspec.open(shard, "rb", **(storage_options or {})) as stream:
        source = _Source(stream)
        try:
            for key, members in _samples(source):
                count += 1
                yield _row(key, shard, members)
            if shard.endswith(".tar") and not source.ended_well():
                raise tarfile.ReadError("the archive's end is missing")
        except (tarfile.TarError, EOFError) as error:
            yield _rejected("", shard, f"shard is damaged after {count} samples: {error}")


class _Source:
    """Remembers the last bytes read: tarfile takes a shard that was cut between two members for a whole one."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._tail = stream, b""

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._stream.read(size)
        self._tail = (self._tail + data[-tarfile.BLOCKSIZE :])[-tarfile.BLOCKSIZE :]
        return data

    def ended_well(self) -> bool:
        """POSIX ustar: an archive ends with blocks of zeros."""
        return len(self._tail) == tarfile.BLOCKSIZE and not any(self._tail)


def _samples(source: _Source) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Groups neighbouring members that share a name up to the first dot of its last part."""
    current: str | None = None
    members: dict[str, bytes] = {}
    with tarfile.open(fileobj=source, mode="r|*") as archive:  # type: ignore[call-overload]
        for member in archive:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            key = f"{folder}/{stem}" if folder not in ("", ".") else stem
            if key != current:
                if current is not None:
                    yield current, members
                current, members = key, {}
            extension = extension.lower()
            if extension in _IMAGES or extension in (_TEXT, _JSON):
                content = archive.extractfile(member)
                members[extension] = content.read() if content else b""
    if current is not None:
        yield current, members


def _row(key: str, shard: str, members: dict[str, bytes]) -> dict[str, Any]:
    try:
        image = _image(members)
        caption = _caption(members)
        alternates, group, metadata = _metadata(members)
    except _Unusable as problem:
        return _rejected(key, shard, str(problem))
    return {
        KEY: key,
        SHARD: shard,
        IMAGE: image,
        CAPTION: caption,
        ALTERNATES: alternates,
        GROUP: group,
        METADATA: metadata,
        REASON: "",
    }


def _rejected(key: str, shard: str, reason: str) -> dict[str, Any]:
    return {
        KEY: key,
        SHARD: shard,
        IMAGE: _NO_IMAGE,
        CAPTION: "",
        ALTERNATES: [],
        GROUP: "",
        METADATA: "",
        REASON: reason,
    }


class _Unusable(Exception):
    """A sample that cannot be used; the message is the reason."""


def _image(members: dict[str, bytes]) -> np.ndarray:
    found = next(((kind, members[kind]) for kind in _IMAGES if kind in members), None)
    if found is None:
        raise _Unusable("image is missing")
    kind, data = found
    if not data:
        raise _Unusable(f"image is unreadable: the {kind} file is empty")
    try:
        # Only the formats named above are tried, whatever the bytes claim to be.
        with Image.open(io.BytesIO(data), formats=tuple(dict.fromkeys(_IMAGES.values()))) as image:
            return np.asarray(_opaque(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files (SyntaxError, struct.error, ...)
        raise _Unusable(f"image is unreadable: {type(error).__name__}: {' '.join(str(error).split())[:200]}") from error


def _opaque(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")  # on white, as browsers show it: what lies under full transparency is arbitrary
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _caption(members: dict[str, bytes]) -> str:
    if _TEXT not in members:
        raise _Unusable("caption is missing")
    caption = _utf8(members[_TEXT], "caption").strip()
    if not caption:
        raise _Unusable("caption is empty")
    return caption


def _metadata(members: dict[str, bytes]) -> tuple[list[str], str, str]:
    if _JSON not in members:
        return [], "", ""
    text = _utf8(members[_JSON], "metadata")
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _Unusable(f"metadata is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _Unusable(f"metadata is a JSON {type(value).__name__}, not an object")
    alternates, group = value.get("alternates") or [], value.get("group")
    if not isinstance(alternates, list) or not all(isinstance(item, str) for item in alternates):
        raise _Unusable("metadata field 'alternates' is not a list of strings")
    return alternates, "" if group is None else str(group), text


def _utf8(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Unusable(f"{what} is not UTF-8: {error}") from error
